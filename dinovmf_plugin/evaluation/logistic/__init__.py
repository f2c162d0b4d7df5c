"""Softmax regression on frozen features: few labels (MSN) and small data sets (Ericsson et al.)."""

from __future__ import annotations

from dinovmf_plugin.evaluation.logistic.page import (
    few_shot_chart,
    few_shot_rows,
    transfer_chart,
    transfer_details,
    transfer_rows,
)
from dinovmf_plugin.evaluation.logistic.settings import FewShotSettings, TransferSettings
from dinovmf_plugin.evaluation.logistic.task import prepare_few_shot, prepare_transfer
from dinovmf_plugin.evaluation.protocol import Chart, Details, Protocol

__all__ = ["FEW_SHOT", "TRANSFER"]

FEW_SHOT = Protocol(
    name="few_shot",
    title="Few-shot classification",
    note="Mean and standard deviation over the splits of softmax regression on a few labeled images.",
    settings=FewShotSettings,
    prepare=prepare_few_shot,
    rows=few_shot_rows,
    chart=Chart("Mean and standard deviation over the splits", few_shot_chart),
)
TRANSFER = Protocol(
    name="transfer",
    title="Linear transfer to small data sets",
    note="Softmax regression on raw features; the l2 strength was chosen by cross-validation on "
    "the training set alone. The paper's table says accuracy; both metrics are shown. Fits are cut short "
    "after transfer.max_iter iterations, as the original code does.",
    settings=TransferSettings,
    prepare=prepare_transfer,
    rows=transfer_rows,
    details=Details("What cross-validation chose:", transfer_details),
    chart=Chart("What cross-validation saw, for the network itself", transfer_chart),
)
