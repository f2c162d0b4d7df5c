"""The Triton kernels' code for an H100, made without one: tensor cores, and registers that suffice."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from dinovmf_plugin.core.target_kernels import columns_kernel, rows_kernel  # noqa: E402
from dinovmf_plugin.core.vmf_kernel import normalizer_kernel  # noqa: E402
from dinovmf_plugin.losses import kernels  # noqa: E402
from dinovmf_plugin.losses.fused import Tiles  # noqa: E402

TILES = Tiles()
COUNTS = {"R", "K", "P", "T", "tiles"}
NUMBERS = {"temperature", "nu"}
SWITCHES = {"HAS_BIAS": True, "PRECISION": "ieee", "BP": 256}
CASES = {
    "normalize": (
        kernels.normalize_kernel,
        {**SWITCHES, "MEAN": True, "BR": TILES.rows, "BK": TILES.prototypes},
        TILES.stages[0],
    ),
    "gradients": (
        kernels.gradients_kernel,
        {
            **SWITCHES,
            "HAS_SCALE": True,
            "NORMED": True,
            "BR": TILES.gradient_rows,
            "BK": TILES.gradient_prototypes,
            "BT": TILES.teachers,
        },
        TILES.stages[1],
    ),
    "log-normalizer": (normalizer_kernel, {"BLOCK": 1024}, 1),
    "targets, rows": (rows_kernel, {"PLAIN": True, "BK": 1024}, 1),
    "targets, columns": (
        columns_kernel,
        {"SUM": False, "LOG_PROBABILITY": True, "BR": 16, "BK": 128},
        1,
    ),
}


def compiled(function: Any, constants: dict[str, Any], stages: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in COUNTS:
            return "i32"
        if name in NUMBERS:
            return "fp32"
        return "*bf16" if name in ("y", "w", "mixed", "products") else "*fp32"

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: kind(name) for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kind(n)[0] in "*i"},
    )
    options = {"num_warps": TILES.warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("case", CASES)
def test_code_for_an_h100(case, tmp_path):
    try:
        ptxas = triton.knobs.nvidia.ptxas.path
    except (AttributeError, RuntimeError):
        pytest.skip("this Triton brings no assembler for NVIDIA's GPUs")
    code = compiled(*CASES[case])
    assert code.metadata.shared <= 135_168  # what ``serves`` asks for
    path = tmp_path / "kernel.ptx"
    path.write_text(code.asm["ptx"])
    told = subprocess.run(
        [ptxas, "-v", "--gpu-name=sm_90a", str(path), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert re.findall(r"(\d+) bytes spill stores", told) == ["0"], told
    if case in ("normalize", "gradients"):
        assert "wgmma.mma" in code.asm["ptx"]
