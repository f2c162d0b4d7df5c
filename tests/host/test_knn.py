"""The host's online kNN metric after the plugin's repair: against a plain loop over queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinovmf_plugin import host  # noqa: F401  (repairs the metric)

WeightedKNNClassifier = pytest.importorskip("solo.utils.knn").WeightedKNNClassifier


def _data(classes: int = 6, train: int = 40, test: int = 13) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, 5, generator=g)
    labels = torch.arange(train) % classes
    bank = (centers[labels] + torch.randn(train, 5, generator=g)) * (1 + torch.rand(train, 1))
    test_labels = torch.arange(test) % classes
    queries = centers[test_labels] + torch.randn(test, 5, generator=g)
    return bank, labels, queries, test_labels


def _reference(bank, labels, queries, test_labels, k, cosine, temperature=0.07, top=1) -> float:
    """One query at a time, votes in a dictionary."""
    hits = 0
    bank, queries = bank.double().numpy(), queries.double().numpy()
    for query, label in zip(queries, test_labels.tolist(), strict=True):
        if cosine:
            s = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        else:
            s = 1 / (np.linalg.norm(bank - query, axis=1) + 1e-5)
        votes: dict[int, float] = {}
        for i in np.argsort(-s)[:k]:
            weight = np.exp(s[i] / temperature) if cosine else s[i]
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + weight
        hits += label in sorted(votes, key=votes.get, reverse=True)[:top]
    return 100 * hits / len(queries)


def _metric(data, **kwargs) -> WeightedKNNClassifier:
    metric = WeightedKNNClassifier(**kwargs)
    bank, labels, queries, test_labels = data
    for part in torch.arange(len(bank)).split(7):
        metric.update(train_features=bank[part], train_targets=labels[part])
    for part in torch.arange(len(queries)).split(4):
        metric.update(test_features=queries[part], test_targets=test_labels[part])
    return metric


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_compute__equals_a_plain_loop(distance, k):
    data = _data()
    top1, _ = _metric(data, k=k, distance_fx=distance).compute()
    assert top1 == pytest.approx(_reference(*data, k, distance == "cosine"), abs=1e-4)
    assert 20 < top1 < 100


def test_compute__top5_counts_the_five_heaviest_classes():
    data = _data(classes=9, train=90)
    top1, top5 = _metric(data, k=40).compute()
    assert top5 == pytest.approx(_reference(*data, 40, True, top=5), abs=1e-4)
    assert top1 < top5 < 100.001


@pytest.mark.parametrize("size", [1, 100, 10**9])
def test_compute__chunks_do_not_matter(size):
    data = _data()
    whole = _metric(data, k=5).compute()
    assert _metric(data, k=5, max_distance_matrix_size=size).compute() == whole


def test_class_missing_from_validation__is_no_crash():
    """The host sizes its table of votes by the labels it sees in the test set."""
    bank, labels, queries, test_labels = _data()
    only = test_labels == 5
    data = (bank, labels, queries[only], test_labels[only])
    top1, _ = _metric(data, k=5).compute()
    assert top1 == pytest.approx(_reference(*data, 5, True), abs=1e-4)


def test_class_missing_from_training__is_a_miss():
    bank, labels, queries, test_labels = _data()
    known = labels != 5
    only = test_labels == 5
    data = (bank[known], labels[known], queries[only], test_labels[only])
    assert _metric(data, k=5).compute() == (0.0, 0.0)


def test_fewer_images_than_k_and_classes_than_five():
    data = _data(classes=2, train=3, test=4)
    top1, top5 = _metric(data, k=20).compute()
    assert top1 == pytest.approx(_reference(*data, 3, True), abs=1e-4)
    assert top5 == 100.0


def test_half_precision_features():
    bank, labels, queries, test_labels = _data()
    data = (bank.bfloat16(), labels, queries.bfloat16(), test_labels)
    rounded = (bank.bfloat16().float(), labels, queries.bfloat16().float(), test_labels)
    assert _metric(data, k=5).compute() == _metric(rounded, k=5).compute()


def test_compute__forgets_what_it_has_counted():
    metric = _metric(_data(), k=5)
    metric.compute()
    for name in ("train_features", "train_targets", "test_features", "test_targets"):
        assert getattr(metric, name) == []


def test_nothing_to_compare__minus_one():
    metric = WeightedKNNClassifier()
    assert metric.compute() == (-1.0, -1.0)


@pytest.mark.parametrize("distance", ["manhattan", None])
def test_unknown_distance__named(distance, tiny_cfg, build):
    with pytest.raises(ValueError, match=r"knn_eval\.distance_func=.* choose cosine or euclidean"):
        WeightedKNNClassifier(distance_fx=distance)


def test_unknown_distance_in_the_config__named_before_training(tiny_cfg, build):
    cfg = tiny_cfg(**{"knn_eval.enabled": True, "knn_eval.distance_func": "manhattan"})
    with pytest.raises(ValueError, match=r"knn_eval\.distance_func='manhattan'"):
        build(cfg)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_distance_of_the_config__is_used(tiny_cfg, build, distance):
    cfg = tiny_cfg(**{"knn_eval.enabled": True, "knn_eval.distance_func": distance})
    cfg.knn_eval.k = 3
    module = build(cfg)
    assert (module.knn.distance_fx, module.knn.k) == (distance, 3)


def _on_rank(rank: int) -> dict[str, object]:
    bank, labels, queries, test_labels = _data()
    mine, theirs = slice(0, 25), slice(25, 40)
    part = mine if rank == 0 else theirs
    test_part = slice(0, 9) if rank == 0 else slice(9, 13)
    metric = WeightedKNNClassifier(k=5)
    results = []
    for _ in range(2):  # two epochs
        metric.update(train_features=bank[part], train_targets=labels[part])
        metric.update(test_features=queries[test_part], test_targets=test_labels[test_part])
        results.append(metric.compute())
    return {"results": results, "left": len(metric.train_features)}


def test_two_processes__equal_one(ddp):
    expected = _metric(_data(), k=5).compute()
    for rank in ddp(_on_rank):
        assert rank["results"] == [expected, expected]
        assert rank["left"] == 0  # or the bank grows with every epoch
