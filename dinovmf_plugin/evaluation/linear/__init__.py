"""Linear probes on frozen features (DINO's protocol)."""

from __future__ import annotations

from dinovmf_plugin.evaluation.linear.page import linear_chart, linear_details, linear_rows
from dinovmf_plugin.evaluation.linear.settings import LinearSettings
from dinovmf_plugin.evaluation.linear.task import prepare_linear
from dinovmf_plugin.evaluation.protocol import Chart, Details, Protocol

__all__ = ["LINEAR"]

LINEAR = Protocol(
    name="linear",
    title="Linear probes",
    note="Best on val is the number of the official code: epoch and learning rate chosen on the "
    "validation set itself, so it is optimistic. The last epoch at the official learning rate was chosen "
    "by nobody; held-out training images, where there are some, choose without looking at the test.",
    settings=LinearSettings,
    prepare=prepare_linear,
    rows=linear_rows,
    details=Details("What was chosen, and what the last epoch gives:", linear_details),
    chart=Chart("Last epoch of every learning rate of the grid", linear_chart),
)
