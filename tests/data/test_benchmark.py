import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")

from dinovmf_plugin.benchmarks import data as benchmark
from dinovmf_plugin.benchmarks.photos import write_photos


def test_generated_photos_weigh_what_photos_weigh(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    assert sizes == [(500, 375), (500, 375), (375, 500)]
    assert all(80_000 < path.stat().st_size < 150_000 for path in tmp_path.iterdir())


def test_main__ratio_of_one_run(tmp_path: Path, folder: Path, capsys: Any) -> None:
    output = tmp_path / "data.json"
    arguments = [
        f"folder={folder}",
        "batch=4",
        "workers=1",
        "rounds=2",
        "recipe=demo",
        f"output={output}",
    ]
    benchmark.main(arguments)
    report = json.loads(output.read_text())
    result = report["results"]
    ratios = [
        d / t for t, d in zip(*(result["rounds"][n] for n in ("torchvision", "dali")), strict=True)
    ]
    assert result["ratio"] == pytest.approx(sum(ratios) / 2)
    assert report["settings"]["batch"] == 4
    assert "dali / torchvision" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="remove it or choose another name"):
        benchmark.main(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("speed=2", "speed is no known key: known keys are output, images"),
        ("batch=x", "batch=x must be a whole number"),
        ("rounds=0", "rounds=0 must be a whole number of at least 1"),
        ("recipe=dinox", "the recipe 'dinox' does not exist"),
    ],
)
def test_main__bad_arguments(argument: str, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.main([f"folder={folder}", argument])
