"""Linear probes on frozen features: the paper's [C] and [D] columns.

Protocol (DINO's linear evaluation; Tables 2 and 9-11): SGD with momentum 0.9 and no weight decay, batch
1024, 100 epochs, learning rate ``0.001 * batch / 256`` on a cosine to zero per epoch; random resized
crops (8-100 %, bilinear) and flips; validation on resize 256 (bicubic) and center crop 224. The official
number is the best validation epoch. The paper does not state a learning rate for its own models: a
grid is trained in one pass, and the results say which learning rate, which epoch, and who chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinovmf_plugin.evaluation.linear.probes import Features, train_probes
from dinovmf_plugin.features.checks import check_features

__all__ = [
    "DEFAULT_LRS",
    "PROTOCOL_LR",
    "holdout_rows",
    "linear_accuracy",
    "scaled_lrs",
    "summarize_probes",
]

PROTOCOL_LR = 1e-3
DEFAULT_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def scaled_lrs(lrs: Sequence[float], batch_size: int) -> list[float]:
    """Learning rates times ``batch_size / 256``, the total batch of all ranks.

    Example:
        >>> scaled_lrs([0.001], 1024)
        [0.004]
    """
    return [lr * batch_size / 256 for lr in lrs]


def holdout_rows(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out for choosing, class by class; at least one stays in each.

    Raises:
        ValueError: if ``fraction`` is not below 1, or a class has one image only.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"linear.holdout={fraction} must be at least 0 and below 1")
    if fraction == 0:
        return list(range(len(labels))), []
    rng = np.random.default_rng(seed)
    y = labels.numpy()
    held: list[NDArray[np.int64]] = []
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        if len(rows) < 2:
            raise ValueError(f"linear.holdout={fraction}: class {label} has a single image")
        held.append(rows[: min(len(rows) - 1, max(1, round(fraction * len(rows))))])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), chosen).tolist(), chosen.tolist()


def _entry(scores: Tensor, epoch: int, probe: int, lrs: Sequence[float]) -> dict[str, Any]:
    top1, top5 = scores[epoch, probe].tolist()
    return {"top1": top1, "top5": top5, "lr": float(lrs[probe]), "epoch": epoch + 1}


def _argmax(scores: Tensor) -> tuple[int, int]:
    """(epoch, probe) of the best top-1; of equal ones the earliest epoch, then the smallest rate."""
    flat = int(scores[..., 0].flatten().argmax())
    return divmod(flat, scores.shape[1])


def summarize_probes(
    history: Mapping[str, Mapping[str, Tensor]], lrs: Sequence[float], protocol_lr: float
) -> dict[str, dict[str, Any]]:
    """What may be reported about every feature, and who chose it.

    Args:
        history: of ``train_probes``, with a set ``val`` and perhaps ``holdout``.
        lrs: the grid as configured (before scaling).
        protocol_lr: the official learning rate.

    Returns:
        Per feature: ``best`` (epoch and lr chosen on the validation set itself: optimistic, but what
        the official code reports), ``last`` (final epoch at every lr: nobody chose),
        ``protocol_lr`` (best and last epoch at the official lr, if the grid has it), ``chosen`` (epoch
        and lr chosen on the held-out training images, if any), and ``curves``.
    """
    results = {}
    for name, scores in history["val"].items():
        final = len(scores) - 1
        result: dict[str, Any] = {
            "best": _entry(scores, *_argmax(scores), lrs)
            | {"selected_on": "validation set (optimistic)"},
            "last": [_entry(scores, final, p, lrs) for p in range(len(lrs))],
            "curves": {"lr": [float(lr) for lr in lrs], "top1": scores[..., 0].T.tolist()},
        }
        same = [p for p, lr in enumerate(lrs) if np.isclose(lr, protocol_lr)]
        if same:
            at_lr = scores[:, same]
            epoch, _ = _argmax(at_lr)
            result["protocol_lr"] = {
                "best": _entry(scores, epoch, same[0], lrs)
                | {"selected_on": "epoch on the validation set (optimistic)"},
                "last": _entry(scores, final, same[0], lrs) | {"selected_on": "nothing"},
            }
        if "holdout" in history:
            choice = _argmax(history["holdout"][name])
            result["chosen"] = _entry(scores, *choice, lrs) | {
                "selected_on": "held-out training images"
            }
        results[name] = result
    return results


def linear_accuracy(
    train_features: Features,
    train_labels: Tensor,
    val_features: Features,
    val_labels: Tensor,
    *,
    lrs: Sequence[float] = DEFAULT_LRS,
    epochs: int = 100,
    batch_size: int = 1024,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    holdout: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Probes on features that are already there (no augmentation); see ``summarize_probes``.

    Args:
        train_features: ``{name: (N, D)}``.
        train_labels: ``(N,)`` in ``0 .. C - 1``.
        val_features: ``{name: (M, D)}``.
        val_labels: ``(M,)``.
        lrs: grid, before scaling by ``batch_size / 256``.
        epochs: passes.
        batch_size: images per update.
        momentum: of SGD.
        weight_decay: of SGD.
        holdout: share of the training images that chooses instead of the validation set.
        seed: of weights, order and held-out images.
        device: where the probes are trained.
        progress: show a progress bar.

    Raises:
        ValueError: if inputs do not fit, hold a NaN, or a number makes no sense.

    Example:
        >>> x, y = {"cls": torch.eye(4)}, torch.arange(4)
        >>> linear_accuracy(x, y, x, y, lrs=[100.0], epochs=20, batch_size=4)["cls"]["best"]["top1"]
        100.0
    """
    for name in train_features:
        check_features(train_features[name], train_labels, f"linear training {name}")
        check_features(val_features[name], val_labels, f"linear validation {name}")
    if min(int(labels.min()) for labels in (train_labels, val_labels)) < 0:
        raise ValueError("linear labels must be 0 .. C - 1, got a negative one")
    if batch_size < 1:
        raise ValueError(f"linear.batch_size={batch_size} must be at least 1")
    fit, held = holdout_rows(train_labels, holdout, seed)
    rows = torch.tensor(fit)

    def batches(epoch: int) -> Any:
        generator = torch.Generator().manual_seed(seed + epoch)
        for part in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
            yield {name: value[part] for name, value in train_features.items()}, train_labels[part]

    sets = {"val": (val_features, val_labels)}
    if held:
        kept = {name: value[held] for name, value in train_features.items()}
        sets["holdout"] = (kept, train_labels[held])
    history = train_probes(
        batches,
        sets,
        int(torch.cat([train_labels, val_labels]).max()) + 1,
        lrs=scaled_lrs(lrs, batch_size),
        epochs=epochs,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
        device=device,
        progress=progress,
    )
    return summarize_probes(history, lrs, PROTOCOL_LR)
