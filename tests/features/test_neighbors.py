import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from dinovmf_plugin.benchmarks.harness import peak_growth
from dinovmf_plugin.features.neighbors import nearest_neighbors


def _plain(bank, queries, k):
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    return similarity.sort(dim=1, descending=True).values[:, :k], similarity


def _random(rows, seed, dim=16):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("chunk", [4, 16, 37, 64, 1000])
@pytest.mark.parametrize("query_chunk", [5, 64])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_equals_a_full_sort(chunk, query_chunk, k):
    bank, queries = _random(331, 0), _random(23, 1)
    values, ids = nearest_neighbors(bank, queries, k, chunk=chunk, query_chunk=query_chunk)
    expected, similarity = _plain(bank, queries, k)
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(similarity.gather(1, ids), expected)
    assert all(len(set(row.tolist())) == k for row in ids)


def test_equals_sklearn():
    bank, queries = _random(200, 2), _random(11, 3)
    values, ids = nearest_neighbors(bank, queries, 9, chunk=32)
    reference = NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(
        bank.numpy()
    )
    distances, expected = reference.kneighbors(queries.numpy())
    assert ids.tolist() == expected.tolist()
    torch.testing.assert_close(values, 1 - torch.from_numpy(distances), atol=1e-5, rtol=0)


def test_a_bank_that_gets_better_row_by_row():
    # every chunk replaces all that was kept: the worst case for the thresholds
    angle = torch.linspace(3.0, 0.0, 640)
    bank = torch.stack([angle.cos(), angle.sin()], dim=1)
    queries = torch.tensor([[1.0, 0.0]]).expand(6, 2) * torch.arange(1, 7)[:, None]
    values, ids = nearest_neighbors(bank, queries, 50, chunk=64)
    assert ids.tolist() == [list(range(639, 589, -1))] * 6
    torch.testing.assert_close(values[0], angle.flip(0)[:50].cos(), atol=1e-6, rtol=0)


def test_duplicates_and_zero_rows_are_harmless():
    bank = torch.cat([torch.zeros(3, 4), torch.ones(40, 4), -torch.ones(40, 4)])
    values, ids = nearest_neighbors(bank, torch.ones(2, 4), 45, chunk=16)
    assert values[0].tolist() == pytest.approx([1.0] * 40 + [0.0] * 3 + [-1.0] * 2)
    assert set(ids[0, :40].tolist()) == set(range(3, 43))
    assert set(ids[0, 40:43].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["spread out", "collapsed"])
def test_memory_depends_on_the_chunks_only(kind):
    """All similarities at once would be 1 GB; a collapsed network's are all equal."""
    bank, queries = _random(65536, 7), _random(4096, 8)
    if kind == "collapsed":
        bank, queries = torch.ones_like(bank), torch.ones_like(queries)
    found = []
    peak = peak_growth(
        lambda: found.append(nearest_neighbors(bank, queries, 10, chunk=1024, query_chunk=256))
    )
    assert peak < 50e6
    values, ids = found[0]
    assert values.shape == ids.shape == (4096, 10)
    assert values.max() <= 1 + 1e-6
    assert all(len(set(row.tolist())) == 10 for row in ids[::512])


def test_half_precision_bank_and_whole_bank():
    bank, queries = _random(50, 4), _random(3, 5)
    values, ids = nearest_neighbors(bank.half(), queries.half(), 50, chunk=8)
    expected, _ = _plain(bank.half(), queries.half(), 50)
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=0)
    assert sorted(ids[0].tolist()) == list(range(50))


def test_no_queries():
    values, ids = nearest_neighbors(_random(5, 6), torch.empty(0, 16), 2)
    assert values.shape == ids.shape == (0, 2)


@pytest.mark.parametrize("k", [0, 6])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k={k} .* 5 rows"):
        nearest_neighbors(_random(5, 6), _random(2, 7), k)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="same number of dimensions"):
        nearest_neighbors(_random(5, 6), _random(2, 7, dim=8), 1)
