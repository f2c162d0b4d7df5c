"""What a script of solo-learn needs before it runs with the plugin's methods."""

from __future__ import annotations

import torch

__all__ = ["prepare_for_host_script"]


def prepare_for_host_script() -> None:
    """Register the methods; without a GPU, let the host's literal ``.cuda()`` calls stay on the CPU.

    ``main_knn.py`` and ``main_umap.py`` use neither hydra nor a device option: without this they know none
    of the plugin's methods, and stop at the first batch on a machine without CUDA.
    """
    from dinovmf_plugin.registry import register

    register()
    if not torch.cuda.is_available():
        torch.Tensor.cuda = _stay  # type: ignore[method-assign, assignment]
        torch.nn.Module.cuda = _stay  # type: ignore[method-assign, assignment]


def _stay(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    return self
