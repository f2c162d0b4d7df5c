import numpy as np
import pytest
import torch

from dinovmf_plugin.features.knn import knn_accuracy


def _clusters(rows, classes, seed, dim=12, spread=1.2):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (rows,), generator=generator)
    return centers[labels] + spread * torch.randn(rows, dim, generator=generator), labels


def _plain(bank, bank_labels, queries, query_labels, k, temperature):
    """One query at a time, votes sorted stably, as the protocol's words say."""
    bank, queries = bank.double().numpy(), queries.double().numpy()
    classes = np.unique(bank_labels.numpy())
    top1 = top5 = 0
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = dict.fromkeys(classes.tolist(), 0.0)
        for i in np.argsort(-cosine)[:k]:
            votes[int(bank_labels[i])] += np.exp(cosine[i] / temperature)
        ranking = sorted(votes, key=lambda c: -votes[c])
        top1 += ranking[0] == label
        top5 += label in ranking[: min(5, k)]
    return 100 * top1 / len(queries), 100 * top5 / len(queries)


@pytest.mark.parametrize("classes", [3, 8, 30])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_every_k_equals_the_plain_formula(classes, temperature):
    bank, bank_labels = _clusters(300, classes, 0)
    queries, query_labels = _clusters(60, classes, 1)
    found = knn_accuracy(
        bank,
        bank_labels,
        queries,
        query_labels,
        ks=[20, 1, 5, 100],
        temperature=temperature,
        chunk=64,
        query_chunk=25,
    )
    assert list(found) == [1, 5, 20, 100]
    for k, scores in found.items():
        expected = _plain(bank, bank_labels, queries, query_labels, k, temperature)
        assert scores == pytest.approx(expected)
    # the sets are neither trivial nor hopeless, so that the comparison means something
    assert 20 < found[20][0] < 100


def test_equals_sklearn():
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_labels = _clusters(200, 6, 2)
    queries, query_labels = _clusters(50, 6, 3)
    reference = KNeighborsClassifier(
        15, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank.numpy(), bank_labels.numpy())
    expected = 100 * reference.score(queries.numpy(), query_labels.numpy())
    found = knn_accuracy(bank, bank_labels, queries, query_labels, ks=15, temperature=0.07)
    assert found[15][0] == pytest.approx(expected)


def test_labels_of_any_value_give_the_same():
    bank, bank_labels = _clusters(100, 4, 4)
    queries, query_labels = _clusters(30, 4, 5)
    names = torch.tensor([1000, -7, 3, 12])  # order of the classes is kept where it decides ties
    order = names.argsort()
    plain = knn_accuracy(bank, bank_labels, queries, query_labels, ks=[10], temperature=0.07)
    assert plain == knn_accuracy(
        bank,
        names[order][bank_labels],
        queries,
        names[order][query_labels],
        ks=[10],
        temperature=0.07,
    )


def test_a_class_without_training_image_is_missed_and_others_are_not():
    bank, bank_labels = _clusters(100, 4, 6, spread=0.1)
    keep = bank_labels != 2
    queries, query_labels = _clusters(40, 4, 7, spread=0.1)
    top1, top5 = knn_accuracy(
        bank[keep], bank_labels[keep], queries, query_labels, ks=[5], temperature=0.07
    )[5]
    expected = 100 * float((query_labels != 2).double().mean())
    assert top1 == top5 == pytest.approx(expected) != 100


def test_top5_with_fewer_than_five_classes_is_certain():
    bank, bank_labels = _clusters(60, 3, 8, spread=5.0)
    queries, query_labels = _clusters(40, 3, 9, spread=5.0)
    top1, top5 = knn_accuracy(bank, bank_labels, queries, query_labels, ks=[20], temperature=0.07)[
        20
    ]
    assert top1 < 100
    assert top5 == 100


def test_fewer_queries_than_a_hundred_and_one_query():
    bank, bank_labels = _clusters(50, 3, 10)
    assert set(
        knn_accuracy(bank, bank_labels, bank[:1], bank_labels[:1], ks=[1], temperature=0.07)
    ) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [10, 51]}, "51 neighbors, but the bank holds only 50"),
        ({"ks": []}, "at least one number of neighbors"),
        ({"ks": [0]}, "each at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        (
            {"bank_labels": torch.zeros(49, dtype=torch.int64)},
            "bank: 50 features need as many labels",
        ),
        ({"query_labels": torch.zeros(3)}, "query labels must be integers"),
        ({"query_features": torch.full((3, 12), float("nan"))}, "query features hold a NaN"),
        ({"query_features": torch.zeros(3, 5)}, "same number of dimensions"),
        (
            {
                "query_features": torch.zeros(0, 12),
                "query_labels": torch.zeros(0, dtype=torch.int64),
            },
            "query: there is no feature",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    bank, bank_labels = _clusters(50, 3, 11)
    inputs = {
        "bank_features": bank,
        "bank_labels": bank_labels,
        "query_features": bank[:3],
        "query_labels": bank_labels[:3],
        "ks": [5],
        "temperature": 0.07,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**(inputs | change))


def _accuracy_on_a_rank(rank):
    bank, bank_labels = _clusters(120, 5, 12)
    queries, query_labels = _clusters(41, 5, 13)  # an odd number: unequal shares
    return knn_accuracy(
        bank, bank_labels, queries, query_labels, ks=[3, 20], temperature=0.07, distributed=True
    )


def test_two_processes_give_the_same_as_one(ddp):
    bank, bank_labels = _clusters(120, 5, 12)
    queries, query_labels = _clusters(41, 5, 13)
    one = knn_accuracy(bank, bank_labels, queries, query_labels, ks=[3, 20], temperature=0.07)
    assert ddp(_accuracy_on_a_rank) == [one, one]


@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-6, 1e-30])
def test_small_temperatures_rank_classes_by_their_nearest_members(temperature):
    """exp(1 / 1e-3) overflows: all votes were infinite, and the class index decided."""
    bank, bank_labels = _clusters(300, 8, 0)
    queries, query_labels = _clusters(60, 8, 1)
    found = knn_accuracy(
        bank, bank_labels, queries, query_labels, ks=[1, 20, 300], temperature=temperature
    )
    unit = torch.nn.functional.normalize
    cosine = (unit(queries.double()) @ unit(bank.double()).T).numpy()
    for k, scores in found.items():
        top1 = top5 = 0
        for row, label in zip(cosine, query_labels.tolist(), strict=True):
            near = np.argsort(-row)[:k]
            votes = {
                c: np.logaddexp.reduce(row[near][bank_labels[near].numpy() == c] / temperature)
                for c in set(bank_labels[near].tolist())
            }
            ranking = sorted(votes, key=lambda c: -votes[c])
            top1 += ranking[0] == label
            top5 += label in ranking[: min(5, k)]
        assert scores == pytest.approx((100 * top1 / 60, 100 * top5 / 60))
    assert found[300][0] > 30
