"""Repair of the host's DALI data module (solo-learn main), so that the host's own main_pretrain.py works.

Upstream passes ``device_id=local_rank`` to a CPU pipeline (DALI wants None where there is no GPU), hands
Lightning None where there are no validation images, seeds every run alike, and restarts its random streams on
resume. The plugin's methods are given the plugin's
loader, which reads the same ``augmentations`` and ``data`` nodes; the host's own methods keep the host's
pipeline, with only the device and the missing validation repaired.
"""

from __future__ import annotations

from typing import Any

from dinovmf_plugin.host import GENERATION

__all__ = ["patch_data"]


def _is_ours(module: Any) -> bool:
    return type(module).__module__.startswith("dinovmf_plugin.")


def patch_data() -> None:
    """Repair ``PretrainDALIDataModule`` in place; idempotent, and without effect where DALI is absent."""
    if GENERATION != "main":
        return  # 1.0.2's DALI code lives in its method classes, which the plugin's loader replaces
    try:
        from solo.data import dali_dataloader
    except ImportError:
        return
    cls = dali_dataloader.PretrainDALIDataModule
    if getattr(cls, "_dinovmf_repaired", False):
        return
    host_setup, host_builder = cls.setup, dali_dataloader.PretrainPipelineBuilder

    class PretrainPipelineBuilder(host_builder):  # type: ignore[misc, valid-type]
        """The host's builder with ``device_id=None`` for a CPU pipeline."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.device == "cpu":
                self.device_id = None

    def setup(self: Any, stage: str | None = None) -> None:
        if self.val_dataloader() is None:  # without data.val_path; Lightning wants an empty list
            self.val_dataloader = lambda: []
        module = self.trainer.lightning_module
        if not _is_ours(module):
            host_setup(self, stage)
            return
        from dinovmf_plugin.data.module import pretrain_loader

        self.train_loader = pretrain_loader(
            module.cfg,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            device_id=self.trainer.local_rank,
        )

    cls.setup = setup
    dali_dataloader.PretrainPipelineBuilder = PretrainPipelineBuilder
    cls._dinovmf_repaired = True
