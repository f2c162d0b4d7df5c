"""Checks that every evaluation makes of its features."""

import pytest
import torch

from dinovmf_plugin.features import checks
from dinovmf_plugin.features.checks import check_features, first_non_finite_row


@pytest.mark.parametrize("rows", [2, 100])
def test_the_first_bad_row_in_any_block(monkeypatch, rows):
    monkeypatch.setattr(checks, "_ROWS", rows)
    features = torch.ones(9, 3)
    assert first_non_finite_row(features) is None
    features[7, 0] = float("nan")
    assert first_non_finite_row(features) == 7
    features[4, 1] = -torch.inf
    assert first_non_finite_row(features) == 4


def test_infinities_of_both_signs_do_not_cancel():
    assert first_non_finite_row(torch.tensor([[1.0, 2.0], [torch.inf, -torch.inf]])) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_finite_features_pass_though_their_sum_overflows(dtype):
    largest = torch.full((4, 5), torch.finfo(dtype).max, dtype=dtype)
    check_features(largest, torch.arange(4), "bank")


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(3), torch.arange(3), "bank features must be .rows, dimensions., got shape"),
        (torch.ones(3, 2), torch.arange(4), "bank: 3 features need as many labels"),
        (torch.ones(3, 2), torch.ones(3, 1).long(), "in one dimension"),
        (torch.ones(3, 2), torch.ones(3), "bank labels must be integers"),
        (torch.ones(3, 2), torch.ones(3).bool(), "bank labels must be integers"),
        (torch.ones(0, 2), torch.arange(0), "bank: there is no feature at all"),
        (torch.full((3, 2), torch.nan), torch.arange(3), "NaN or infinity .first in row 0."),
    ],
)
def test_what_does_not_fit_is_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        check_features(features, labels, "bank")
