"""Retrieval scores against an implementation that walks down each ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from dinovmf_plugin.evaluation.retrieval.scores import (
    average_precision,
    mean_average_precision,
    precision_at,
    query_scores,
    rank_database,
    revisited_scores,
    split_difficulty,
)


def walk(ranking, positives, junk, cutoffs=(1, 5, 10)):
    """AP and P@k by walking down the ranking with counters, one image at a time."""
    seen = hits = 0
    area = 0.0
    trace = []
    for image in ranking:
        if image in junk:
            continue
        before = hits / seen if seen else 1.0
        seen += 1
        if image in positives:
            hits += 1
            area += (before + hits / seen) / 2 / len(positives)
        trace.append(image in positives)
    last = max((i + 1 for i, hit in enumerate(trace) if hit), default=0)
    precisions = []
    for k in cutoffs:
        k = min(k, last)
        precisions.append(sum(trace[:k]) / k if k else 0.0)
    return area, precisions


def random_problem(rng):
    size = int(rng.integers(3, 60))
    images = rng.permutation(size)
    n_pos = int(rng.integers(1, size))
    n_junk = int(rng.integers(0, size - n_pos + 1))
    ranking = rng.permutation(size)
    if rng.random() < 0.2:  # an incomplete ranking
        ranking = ranking[: int(rng.integers(1, size + 1))]
    return ranking, images[:n_pos], images[n_pos : n_pos + n_junk]


def test_query_scores__3000_random_rankings_with_junk():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        ranking, positives, junk = random_problem(rng)
        area, precisions = walk(ranking.tolist(), set(positives.tolist()), set(junk.tolist()))
        scores = query_scores(ranking[:, None], [positives], [junk])
        assert list(scores) == ["AP", "P@1", "P@5", "P@10"]
        got = [values[0] for values in scores.values()]
        np.testing.assert_allclose(got, [area, *precisions], atol=1e-12)


def test_single_query_functions__are_the_same_numbers():
    rng = np.random.default_rng(6)
    for _ in range(50):
        ranking, positives, junk = random_problem(rng)
        area, precisions = walk(ranking.tolist(), set(positives.tolist()), set(junk.tolist()))
        assert average_precision(ranking, positives, junk) == pytest.approx(area, abs=1e-12)
        for k, expected in zip((1, 5, 10), precisions, strict=True):
            assert precision_at(ranking, positives, junk, k=k) == pytest.approx(expected, abs=1e-12)


def test_mean_average_precision__many_queries_with_and_without_positives():
    rng = np.random.default_rng(1)
    for _ in range(100):
        size, queries = int(rng.integers(5, 40)), int(rng.integers(1, 9))
        ranks = np.stack([rng.permutation(size) for _ in range(queries)], axis=1)
        positives, junk = [], []
        for _ in range(queries):
            images = rng.permutation(size)
            a, b = sorted(rng.integers(0, size, 2))
            positives.append(images[:a].tolist())
            junk.append(images[a:b].tolist())
        expected = [
            walk(ranks[:, q].tolist(), set(positives[q]), set(junk[q]))[0]
            for q in range(queries)
            if positives[q]
        ]
        got = mean_average_precision(ranks, positives, junk)
        assert math.isnan(got) if not expected else got == pytest.approx(np.mean(expected))


def test_average_precision__upper_half_is_scikit_learns():
    """The mean of the precisions *after* each hit is the usual step AP."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        size = 30
        ranking, labels = rng.permutation(size), np.zeros(size)
        positives = rng.permutation(size)[:7]
        labels[positives] = 1
        scores = np.empty(size)
        scores[ranking] = -np.arange(size)
        step = average_precision_score(labels, scores)
        places = np.flatnonzero(labels[ranking])
        before = np.mean([1.0 if r == 0 else j / r for j, r in enumerate(places)])
        assert average_precision(ranking, positives) == pytest.approx((step + before) / 2)


def test_revisited_scores__difficulties_move_images_between_positive_and_ignored():
    rng = np.random.default_rng(3)
    size, queries = 50, 6
    ranks = np.stack([rng.permutation(size) for _ in range(queries)], axis=1)
    truth = []
    for query in range(queries):
        images = rng.permutation(size)
        hard = images[5:9] if query else images[:0]  # query 0 has no hard positive
        truth.append({"easy": images[:5], "hard": hard, "junk": images[9:15], "bbx": [0, 0, 1, 1]})
    scores = revisited_scores(ranks, truth)
    assert list(scores) == ["easy", "medium", "hard"]
    for difficulty, score in scores.items():
        assert list(score) == ["mAP", "mP@1", "mP@5", "mP@10"]
        values = []
        for query, entry in enumerate(truth):
            easy, hard, junk = (set(entry[f].tolist()) for f in ("easy", "hard", "junk"))
            wanted, ignored = {
                "easy": (easy, junk | hard),
                "medium": (easy | hard, junk),
                "hard": (hard, junk | easy),
            }[difficulty]
            if wanted:
                area, precisions = walk(ranks[:, query].tolist(), wanted, ignored)
                values.append([area, *precisions])
        assert len(values) == (5 if difficulty == "hard" else 6)
        assert list(score.values()) == pytest.approx(np.mean(values, axis=0).tolist())


def test_revisited_scores__perfect_and_worst():
    truth = [{"easy": [0, 1], "hard": [2], "junk": [3]}]
    perfect = revisited_scores(np.array([[3], [0], [1], [2], [4], [5]]), truth)
    assert all(value == 1 for score in perfect.values() for value in score.values())
    worst = revisited_scores(np.array([[3], [4], [5], [2], [1], [0]]), truth)
    assert worst["hard"]["mAP"] == pytest.approx((0 + 1 / 3) / 2)
    assert worst["hard"]["mP@1"] == 0


def test_query_scores__nan_without_positives():
    scores = query_scores(np.array([[0], [1]]), [[]], [[1]])
    assert all(math.isnan(values[0]) for values in scores.values())


def test_rank_database__cosine_order_and_stable_ties():
    torch.manual_seed(0)
    database, queries = torch.randn(40, 8) * torch.rand(40, 1) * 9, torch.randn(3, 8)
    database[20] = database[10] * 2  # the same direction: ties keep database order
    ranks = rank_database(database, queries)
    for q in range(3):
        cosine = np.array(
            [float(np.dot(d, queries[q]) / np.linalg.norm(d)) for d in database.double().numpy()]
        )
        assert (np.diff(cosine[ranks[:, q]]) <= 1e-6).all()
        places = ranks[:, q].tolist()
        assert places.index(10) + 1 == places.index(20)


@pytest.mark.parametrize(
    ("ranks", "positives", "junk", "message"),
    [
        (np.zeros((3, 2, 1), int), [[0]], [[]], r"\(database, queries\), got shape"),
        (np.array([[0, 1, 2]]), [[0]], [[]], "has 3 queries, but positives are given for 1"),
        (np.array([[0], [1]]), [[0]], [[], []], "junk for 2"),
        (np.array([[0], [0]]), [[0]], [[]], "ranks of query 0 name a database image twice"),
        (np.array([[0.5], [1]]), [[0]], [[]], "ranks of query 0 must be a flat list"),
        (np.array([[0], [1]]), [[0]], [[0]], "database image 0 is both positive and junk"),
        (np.array([[0], [1]]), [[0, 0]], [[]], "positives of query 0 name"),
        (np.array([[0], [1]]), [[-1]], [[]], "positives of query 0 must be"),
    ],
)
def test_bad_input__one_sentence(ranks, positives, junk, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(ranks, positives, junk)


def test_bad_difficulty_and_missing_field():
    with pytest.raises(ValueError, match="must be one of easy, medium, hard"):
        split_difficulty([], "middling")
    with pytest.raises(ValueError, match="ground truth of query 0 has no 'junk'"):
        revisited_scores(np.array([[0]]), [{"easy": [0], "hard": []}])
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        precision_at([0], [0], k=0)
