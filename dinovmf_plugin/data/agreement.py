"""Do all ranks have the same images? Counted and compared before training, so that none waits for ever."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.source import Source

__all__ = ["same_on_all_ranks"]

T = TypeVar("T", bound=Source)


def same_on_all_ranks(list_them: Callable[[], T], key: str, world_size: int) -> T:
    """List the images on every rank, and compare.

    Args:
        list_them: lists this rank's images.
        key: config key of the images, for messages.
        world_size: number of processes that call this together.

    Returns:
        The images of this rank.

    Raises:
        ValueError: on every rank, if two of them have other numbers or names of images, or if the listing
            failed on another rank; one sentence with ranks, hosts and numbers.
        Exception: what the listing raises here.
    """
    if world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return list_them()
    images, error = None, None
    try:
        images = list_them()
    except (OSError, ValueError, UnreadableImageError) as raised:
        error = raised
    digest = None
    if images is not None:
        digest = hashlib.sha256(images.listing()).hexdigest()
    mine = (socket.gethostname(), None if images is None else len(images), digest, str(error))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if error is not None:
        raise error
    for rank, (host, count, _, reason) in enumerate(every):
        if count is None:
            raise ValueError(f"rank {rank} on {host} cannot list its images: {reason}")
    first_host, first_count, first_digest, _ = every[0]
    for rank, (host, count, found, _) in enumerate(every):
        places = f"rank 0 on {first_host} and rank {rank} on {host}"
        if count != first_count:
            raise ValueError(
                f"{key} holds {first_count} images for rank 0 on {first_host} and {count} for rank {rank} on "
                f"{host}: all ranks need the same images, copy them again"
            )
        if found != first_digest:
            raise ValueError(
                f"{key} holds {count} images for {places}, but their names or classes differ: all ranks need "
                "the same images, copy them again"
            )
    assert images is not None
    return images
