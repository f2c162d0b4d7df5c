"""Repairs of the host's online kNN metric, the same in both generations.

- torchmetrics 0.12 and later refuse the ``compute_on_step`` argument that the host passes;
- the host sizes its table of votes by the number of *distinct test labels*, so a class that is missing
  from the validation subset indexes out of range;
- images of the bank without a label (-1) have no vote: to drop them in every step waits for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from solo.utils.knn import WeightedKNNClassifier
from torch import Tensor
from torch.nn import functional as F

__all__ = ["check_distance", "repair_knn"]


def check_distance(name: str) -> None:
    """Raise a ValueError unless the online kNN knows this distance."""
    if name not in ("cosine", "euclidean"):
        raise ValueError(f"knn_eval.distance_func={name!r} is unknown: choose cosine or euclidean")


def _init(
    self: Any,
    k: int = 20,
    T: float = 0.07,
    max_distance_matrix_size: int = int(5e6),
    distance_fx: str = "cosine",
    epsilon: float = 0.00001,
    dist_sync_on_step: bool = False,
) -> None:
    super(WeightedKNNClassifier, self).__init__(dist_sync_on_step=dist_sync_on_step)
    check_distance(distance_fx)
    self.k, self.T, self.distance_fx, self.epsilon = k, T, distance_fx, epsilon
    self.max_distance_matrix_size = max_distance_matrix_size
    for name in ("train_features", "train_targets", "test_features", "test_targets"):
        self.add_state(name, default=[], persistent=False)


@torch.no_grad()
def _compute(self: Any) -> tuple[float, float]:
    if not self.train_features or not self.test_features:
        return -1.0, -1.0
    bank, queries = torch.cat(self.train_features).float(), torch.cat(self.test_features).float()
    bank_labels, labels = torch.cat(self.train_targets), torch.cat(self.test_targets)
    known = bank_labels >= 0
    bank, bank_labels = bank[known], bank_labels[known]
    if not len(bank):
        return -1.0, -1.0
    cosine = self.distance_fx == "cosine"
    if cosine:
        bank, queries = F.normalize(bank), F.normalize(queries)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    k = min(self.k, len(bank))
    correct = torch.zeros(2, device=bank.device)
    chunk = max(1, self.max_distance_matrix_size // len(bank))
    for query, label in zip(queries.split(chunk), labels.split(chunk), strict=True):
        similarity = query @ bank.T if cosine else 1 / (torch.cdist(query, bank) + self.epsilon)
        similarity, index = similarity.topk(k)
        # relative to the nearest one's, so that a small temperature cannot overflow
        weight = ((similarity - similarity[:, :1]) / self.T).exp() if cosine else similarity
        votes: Tensor = torch.zeros(len(query), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], weight)
        heaviest, classes = votes.topk(min(5, num_classes))
        hits = (classes == label.unsqueeze(1)) & (
            heaviest > 0
        )  # a class without a vote is no guess
        correct += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()])
    top1, top5 = (100 * correct / len(queries)).tolist()
    self.reset()
    return top1, top5


def repair_knn() -> None:
    """Make ``solo.utils.knn.WeightedKNNClassifier`` usable; idempotent.

    The class object is changed in place, since the host's modules hold references to it.
    """
    if WeightedKNNClassifier.__init__ is not _init:
        WeightedKNNClassifier.__init__ = _init
        # torchmetrics wraps `compute` per instance when it is constructed
        WeightedKNNClassifier.compute = _compute
