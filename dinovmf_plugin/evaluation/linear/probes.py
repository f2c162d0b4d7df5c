"""Many linear classifiers trained at once on the same frozen features.

All learning rates of a grid share one matrix product per feature: their weights are one tensor
``(P, C, D)``. Their losses are summed, so that their gradients stay apart, and the optimizer updates views
of that tensor with one learning rate each: the same numbers as P separate trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

__all__ = ["ProbeBank", "train_probes"]

Features = Mapping[str, Tensor]
EpochBatches = Callable[[int], Iterable[tuple[Features, Tensor]]]


class ProbeBank:
    """``P`` linear classifiers on one feature, with SGD; weights N(0, 0.01), zero biases.

    All classifiers start from the same weights, so that the learning rate alone tells them apart.

    Args:
        dim: feature size ``D``.
        num_classes: ``C``.
        lrs: ``P`` learning rates.
        epochs: length of the cosine schedule to zero, stepped per epoch.
        momentum: of SGD.
        weight_decay: of SGD.
        seed: of the weights.
        device: of the weights.

    Example:
        >>> bank = ProbeBank(8, 3, lrs=[0.1, 1.0], epochs=1)
        >>> bank.logits(torch.randn(5, 8)).shape
        torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        lrs: Sequence[float],
        epochs: int,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        probes = len(lrs)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(num_classes, dim, generator=generator) * 0.01
        self.weight = start.expand(probes, -1, -1).clone().to(device).requires_grad_()
        self.bias = torch.zeros(probes, num_classes, device=device, requires_grad=True)
        groups: list[dict[str, Any]] = []
        self.gradients: list[Tensor] = []
        # torch's optimizer sees P separate parameters that share storage with the stacked tensors
        for whole in (self.weight, self.bias):
            whole.grad = gradient = torch.zeros_like(whole)
            self.gradients.append(gradient)
            for p, lr in enumerate(lrs):
                view = whole.detach()[p].requires_grad_()
                view.grad = gradient[p]
                groups.append({"params": [view], "lr": lr})
        self.optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=momentum, weight_decay=weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs)

    def logits(self, features: Tensor) -> Tensor:
        """``(B, D)`` to ``(P, B, C)``."""
        probes, classes, dim = self.weight.shape
        flat = F.linear(features, self.weight.reshape(-1, dim), self.bias.reshape(-1))
        return flat.view(-1, probes, classes).transpose(0, 1)

    def step(self, features: Tensor, labels: Tensor, distributed: bool = False) -> Tensor:
        """One update of all probes from one batch; their losses ``(P,)`` before it."""
        logits = self.logits(features)
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none"
        ).mean(dim=1)
        for gradient in self.gradients:  # in place: the optimizer's views share this memory
            gradient.zero_()
        losses.sum().backward()
        if distributed:
            for gradient in self.gradients:
                dist.all_reduce(gradient)
                gradient.div_(dist.get_world_size())
        self.optimizer.step()
        return losses.detach()

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor, batch_size: int = 4096) -> Tensor:
        """Top-1 and top-5 accuracy in percent, ``(P, 2)``; top-5 of the first ``min(5, C)``."""
        device = self.weight.device
        hits = torch.zeros(len(self.weight), 2, dtype=torch.int64, device=device)
        for x, y in zip(features.split(batch_size), labels.split(batch_size), strict=True):
            logits = self.logits(x.to(device))
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == y.to(device)[:, None]
            hits += torch.stack([best[..., 0].sum(1), best.any(-1).sum(1)], dim=1)
        return (100.0 * hits.double() / len(labels)).cpu()


def train_probes(
    epoch_batches: EpochBatches,
    evaluation_sets: Mapping[str, tuple[Features, Tensor]],
    num_classes: int,
    *,
    lrs: Sequence[float],
    epochs: int,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    distributed: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Train every learning rate on every feature in the same passes, and score after each epoch.

    Args:
        epoch_batches: given the epoch (from 0), yields ``({feature: (B, D)}, labels (B,))``.
        evaluation_sets: name to ``({feature: (N, D)}, labels (N,))``.
        num_classes: ``C``; labels are ``0 .. C - 1``.
        lrs: learning rates as SGD uses them (scaled by the batch already).
        epochs: passes over the training set.
        momentum: of SGD.
        weight_decay: of SGD.
        seed: of the weights.
        device: where the probes live.
        distributed: average the gradients over the ranks (equal batches on every rank).
        progress: show a progress bar.

    Returns:
        ``{set: {feature: (epochs, P, 2)}}``: top-1 and top-5 in percent.

    Raises:
        ValueError: if there are no learning rates, a learning rate or ``epochs`` is not positive, or
            an epoch has no batch.
    """
    if not lrs or min(lrs) <= 0 or epochs < 1:
        raise ValueError(f"lrs={list(lrs)} must all be positive and epochs={epochs} at least 1")
    some_features = next(iter(evaluation_sets.values()))[0]
    banks = {
        name: ProbeBank(
            value.shape[1],
            num_classes,
            lrs=lrs,
            epochs=epochs,
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            device=device,
        )
        for name, value in some_features.items()
    }
    history: dict[str, dict[str, list[Tensor]]] = {
        kind: {name: [] for name in banks} for kind in evaluation_sets
    }
    with tqdm(desc="linear probes", unit="img", disable=not progress) as bar:
        for epoch in range(epochs):
            seen = 0
            for features, labels in epoch_batches(epoch):
                for name, bank in banks.items():
                    bank.step(features[name].to(device), labels.to(device), distributed)
                seen += len(labels)
                bar.update(len(labels))
            if not seen:
                raise ValueError("linear probes: an epoch without a single training image")
            for bank in banks.values():
                bank.scheduler.step()
            for kind, (features, labels) in evaluation_sets.items():
                for name, bank in banks.items():
                    history[kind][name].append(bank.accuracy(features[name], labels))
            first = history[next(iter(evaluation_sets))]
            top1 = {name: f"{rows[-1][:, 0].max():.1f}" for name, rows in first.items()}
            bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", **top1)
    return {
        kind: {name: torch.stack(rows) for name, rows in of_kind.items()}
        for kind, of_kind in history.items()
    }
