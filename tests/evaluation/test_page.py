"""Tables of the report: ours, and the paper's numbers in the right columns."""

import pytest

from dinovmf_plugin.evaluation.finetuning import FINETUNE
from dinovmf_plugin.evaluation.page import evaluation_page
from dinovmf_plugin.evaluation.protocols import PROTOCOLS
from dinovmf_plugin.report.paper import TABLE_5


def _html(evaluation, result, architecture="vit_base/16"):
    protocol = {**PROTOCOLS, FINETUNE.name: FINETUNE}[evaluation]
    page = evaluation_page([protocol], {"ours": {evaluation: result}}, architecture, "Title", {})
    return page.html()


def _row(html, start):
    """Cells of the only table row that begins with ``start``."""
    found = [r for r in html.split("<tr>") if r.startswith(f"<td>{start}</td>")]
    assert len(found) == 1
    return found[0].split("</tr>")[0].removeprefix("<td>").removesuffix("</td>").split("</td><td>")


def _finetuned(dataset):
    best = {"top1": 91.0, "mean_per_class": 89.5, "lr": 0.0008, "epoch": 7}
    runs = [{"lr": 0.0008, "epochs": [best | {"epoch": 6, "top1": 80.0}, best]}]
    return {"best": best, "settings": {"dataset": dataset}, "runs": runs}


@pytest.mark.parametrize(
    ("dataset", "cells"),
    [
        (None, ["paper (ImageNet)", "84.10", "–"]),
        ("cifar10", ["paper (cifar10)", "99.20", "–"]),
        ("aircraft", ["paper (aircraft)", "–", "85.80"]),
    ],
)
def test_fine_tuning_beside_the_papers_number_of_the_same_data(dataset, cells):
    html = _html("finetune", _finetuned(dataset))
    assert _row(html, "ours") == ["ours", "91.00", "89.50", "0.0008", "7"]
    name = f"iBOT-vMF ViT-Base/16, {cells[0]}"
    assert _row(html, name) == [name, *cells[1:], "–", "–"]
    assert "ViT-Small" not in html


def test_fine_tuning_on_other_data_has_no_row_of_the_paper():
    assert "ViT-Base/16" not in _html("finetune", _finetuned("birds"))


def _transfer(*names):
    one = {"top1": 80.0, "mean_per_class": 70.0, "weight_decay": 10.0, "unfinished_fits": 3}
    one |= {"classes": 5, "train_images": 1500, "test_images": 20}
    one |= {"cv": {"weight_decay": [1.0, 10.0], "top1": [50.0, 60.0]}}
    average = {"top1": 80.0, "mean_per_class": 70.0}
    return {"datasets": dict.fromkeys(names, one), "average": average}


def test_transfer_table():
    html = _html("transfer", _transfer("pets", "birds"))
    assert _row(html, "ours, top-1") == ["ours, top-1", "80.00", "80.00", "80.00"]
    assert _row(html, "ours, mean per class")[1:] == ["70.00"] * 3
    # the average of nine sets says nothing about these two
    name = "iBOT-vMF ViT-Base/16, paper (Table 5)"
    assert _row(html, name) == [name, "93.90", "–", "–"]
    assert "ours</td><td>pets</td><td>5</td><td>1,500</td><td>20</td><td>10</td><td>60.00" in html
    all_nine = _html("transfer", _transfer(*TABLE_5))
    assert _row(all_nine, name)[-1] == "84.10"
    assert "Table 5)" not in _html("transfer", _transfer("birds"))


def _linear(**more):
    entry = {"top1": 40.0, "top5": 50.0, "lr": 0.01, "epoch": 3}
    report = {"best": entry, "last": [entry | {"top1": 30.0}, entry | {"top1": 35.0}], "dim": 8}
    return {"features": {"cls": report | more, "dino": report}}


def test_linear_tables():
    html = _html("linear", _linear(protocol_lr={"last": {"top1": 30.0}}))
    assert _row(html, "iBOT-vMF ViT-Base/16, paper (ImageNet)")[1:] == ["80.20", "80.27"]
    assert "[C] cls, 8</td><td>40.00</td><td>0.01</td><td>3</td><td>30.00</td><td>35.00" in html
    assert "held-out</th>" not in html
    assert "held-out</th>" in _html("linear", _linear(chosen={"top1": 33.0}))
    text = PROTOCOLS["linear"].text({"ours": _linear()})
    assert "[D] dino" in text
    assert "its epoch" in text


def test_few_shot_has_the_papers_settings_only():
    entry = {"mean": 40.0, "std": 1.5}
    html = _html("few_shot", {"top1": {"5 per class": entry, "10 %": entry}})
    assert _row(html, "ours") == ["ours", "40.00\u00a0±\u00a01.50", "40.00\u00a0±\u00a01.50"]
    assert _row(html, "DINO ViT-Base/16, paper (ImageNet)")[1:] == ["61.40\u00a0±\u00a00.20", "–"]
    assert "ViT-Base/16" not in _html("few_shot", {"top1": {"10 %": entry}})


def test_knn_puts_the_papers_number_at_its_k():
    scores = {"top1": 50.0, "top5": 75.0}
    html = _html("knn", {"k5": scores, "k10": scores, "skipped_ks": []})
    assert _row(html, "DINO-vMF ViT-Base/16, paper (ImageNet)")[1:] == ["–", "77.40"]
