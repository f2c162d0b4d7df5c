"""Prototypes that EM moves, and prototypes that start from the data (docs/em.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core import distributed
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.methods.base import SelfDistillation
from dinovmf_plugin.mixture import em
from dinovmf_plugin.mixture.components import (
    OnlineComponents,
    over_ranks,
    relative_magnitudes,
)
from dinovmf_plugin.mixture.initialization import (
    initialization_rows,
    kmeans_plusplus_directions,
    seed_rows,
    spherical_kmeans,
)

__all__ = ["ComponentsByEM", "starting_parameters"]

_EM_STEPS = 10
_FEW = 256  # components up to which the careful start is affordable


def starting_parameters(
    embeddings: Tensor, num_components: int, how: str, seed: int
) -> em.Statistics:
    """Components of some embeddings: their statistics after spherical k-means or EM.

    Args:
        embeddings: unit vectors ``(N, p)`` on the CPU, at least as many as components.
        num_components: ``K``.
        how: ``kmeans`` or ``em`` (ten EM iterations from k-means).
        seed: of the start.

    Returns:
        Statistics of all rows in float64.

    Raises:
        ValueError: if there are fewer rows than components.

    Example:
        >>> y = torch.eye(3).repeat(20, 1)
        >>> starting_parameters(y, 3, "kmeans", 0).counts.tolist()
        [20.0, 20.0, 20.0]
    """
    random = np.random.RandomState(seed)
    if len(embeddings) < num_components:
        raise ValueError(
            f"init_prototypes={how} starts {num_components} prototypes from embeddings of one epoch, but "
            f"there are {len(embeddings)}: reduce method_kwargs.num_prototypes"
        )
    if num_components <= _FEW:
        directions = kmeans_plusplus_directions(embeddings, num_components, random)
    else:
        directions = spherical_kmeans(embeddings, seed_rows(embeddings, num_components, random))
    chunks = embeddings.split(em.chunk_rows(*directions.shape))
    statistics = em.hard_statistics(chunks, directions)
    for _ in range(_EM_STEPS if how == "em" else 0):
        parameters = em.maximization(statistics, directions)
        directions = parameters.directions
        statistics = em.sufficient_statistics(chunks, parameters)
    # in an order that rounding does not change, as it may change that of k-means
    order = F.normalize(statistics.sums, dim=1)[:, 0].argsort()
    return dataclasses.replace(
        statistics, counts=statistics.counts[order], sums=statistics.sums[order]
    )


class ComponentsByEM(SelfDistillation):
    """What ``prototype_update=em`` and ``init_prototypes`` add to a method with prototypes.

    With ``em`` the prototypes have no gradient; ``observe`` takes statistics of the teacher's embeddings
    when targets are made, and after the step the components move, for student and teacher at once.
    """

    components: OnlineComponents | None
    _observed: em.Statistics | None = None

    @property
    def prototype_layers(self) -> list[Prototypes]:
        """Of student and teacher."""
        return [self.head.last_layer, self.momentum_head.last_layer]  # type: ignore[list-item]

    def make_components(self) -> None:
        """Take the prototypes out of the optimizer, if EM is to move them."""
        s = self.settings
        self.components = None
        if s.prototype_update == "em":
            self.components = OnlineComponents(s.num_prototypes, s.proj_output_dim, s.em_memory)
            for layer in self.prototype_layers:
                layer.requires_grad_(False)

    def observe(self, embeddings: Tensor, weight: float = 1.0) -> None:
        """The E step on the teacher's embeddings ``(rows, p)``, each of which counts ``weight`` times.

        Nothing in the first ``freeze_last_layer`` epochs, or if the prototypes follow the gradient.
        """
        if self.components is None or self.current_epoch < self.settings.freeze_last_layer:
            return
        found = self.components.observe(embeddings, self.prototype_layers[1]).weighted(weight)
        self._observed = found if self._observed is None else self._observed + found

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the teacher, then the components: every micro-batch, as the center."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.components is None or self._observed is None:
            return
        statistics, self._observed = over_ranks(self._observed), None
        self.components.move(statistics, self.prototype_layers)
        self.log("train_log_likelihood", statistics.log_likelihood / statistics.rows)

    def on_train_start(self) -> None:
        """Start the prototypes from the data, if that is asked for and nothing was trained yet."""
        super().on_train_start()
        if self.settings.init_prototypes != "random" and self.trainer.global_step == 0:
            self.initialize_prototypes()

    @torch.no_grad()
    def initialize_prototypes(self) -> None:
        """Embed images with the teacher, cluster, and write the prototypes of student and teacher.

        The same on every rank. Random numbers that training will draw are not touched.
        """
        s = self.settings
        embeddings = self._first_embeddings(initialization_rows(s.num_prototypes))
        found = starting_parameters(
            embeddings, s.num_prototypes, s.init_prototypes, int(self.cfg.get("seed", None) or 0)
        )
        fitted = em.maximization(found, self.prototype_layers[1].directions().cpu())
        for layer in self.prototype_layers:
            layer.weight_v.copy_(fitted.directions)
            if s.init_prototypes == "em" and s.normalization == "vmf":
                magnitudes = relative_magnitudes(fitted.concentrations, found.counts)
                layer.weight_g.copy_(magnitudes.unsqueeze(1))
        if self.components is not None:
            device = self.components.counts.device
            self.components.move(
                em.Statistics(
                    found.counts.float().to(device),
                    found.sums.float().to(device),
                    found.log_likelihood.to(device),
                    found.rows,
                ),
                self.prototype_layers,
            )
        rank_zero_info(
            f"init_prototypes={s.init_prototypes}: {s.num_prototypes} prototypes from {len(embeddings)} "
            f"embeddings, {int((found.counts >= 1).sum())} of them with at least one"
        )

    def _first_embeddings(self, rows: int) -> Tensor:
        """The teacher's embeddings of the first batches' large crops, of all ranks, on the CPU."""
        found, have = [], 0
        training, crops_of = self.momentum_backbone.training, self.num_large_crops
        self.momentum_backbone.eval()
        precision = self.trainer.precision_plugin
        with isolate_rng(), precision.forward_context():
            for batch in self.trainer.train_dataloader:
                _, crops, _ = self.trainer.strategy.batch_to_device(precision.convert_input(batch))
                embeddings = self.momentum_head(self.pooled_teacher(list(crops)[:crops_of])).float()
                found.append(_of_all_ranks(embeddings).cpu())
                have += len(found[-1])
                if have >= rows:
                    break
        self.momentum_backbone.train(training)
        embeddings = torch.cat(found)
        return embeddings[embeddings[:, 0].argsort()]  # ranks hand them over in another order

    def pooled_teacher(self, crops: list[Tensor]) -> Tensor:
        """The teacher's features of crops, ``(rows, D)``."""
        raise TypeError(f"{type(self).__name__} does not define pooled_teacher")


def _of_all_ranks(rows: Tensor) -> Tensor:
    """Rows of all ranks, as many of each, in the ranks' order."""
    if not distributed.is_distributed():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(distributed.world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
