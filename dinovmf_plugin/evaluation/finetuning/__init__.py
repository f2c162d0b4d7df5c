"""Fine-tuning of the whole network with labels (BEiT's recipe as iBOT uses it, and DeiT's)."""

from __future__ import annotations

from dinovmf_plugin.evaluation.finetuning.page import finetune_chart, finetune_rows
from dinovmf_plugin.evaluation.finetuning.settings import FinetuneSettings
from dinovmf_plugin.evaluation.protocol import Chart, Protocol

__all__ = ["FINETUNE"]

FINETUNE = Protocol(
    name="finetune",
    title="Fine-tuning",
    note="The whole network trained with labels. The best validation epoch is optimistic.",
    settings=FinetuneSettings,
    prepare=None,
    rows=finetune_rows,
    chart=Chart("Validation accuracy of every learning rate", finetune_chart),
)
