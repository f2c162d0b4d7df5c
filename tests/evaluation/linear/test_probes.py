import pytest
import torch
from torch import nn

from dinovmf_plugin.evaluation.linear.probes import ProbeBank, train_probes
from dinovmf_plugin.evaluation.linear.scores import (
    holdout_rows,
    linear_accuracy,
    scaled_lrs,
    summarize_probes,
)

LRS = [0.01, 0.3, 5.0]
EPOCHS = 4


def _data(rows=60, classes=6, dim=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(5))
    return centers[labels] + torch.randn(rows, dim, generator=generator), labels


def _batches(epoch, rows=60, size=16):
    x, y = _data(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
    for part in order.split(size):
        yield {"cls": x[part], "dino": 2 * x[part]}, y[part]


def _one_probe(lr, scale, momentum, weight_decay):
    """The protocol with torch's own module, one learning rate at a time."""
    model = nn.Linear(10, 6)
    start = torch.randn(6, 10, generator=torch.Generator().manual_seed(7)) * 0.01
    model.weight.data.copy_(start)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=0)
    x_val, y_val = _data(40, seed=1)
    history = []
    for epoch in range(EPOCHS):
        for features, labels in _batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(scale * features["cls"]), labels).backward()
            optimizer.step()
        scheduler.step()
        order = model(scale * x_val).argsort(1, descending=True)
        hit = order == y_val[:, None]
        history.append([100 * hit[:, :n].any(1).double().mean().item() for n in (1, 5)])
    return model, history


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.0), (0.5, 0.01)])
def test_a_grid_at_once_equals_one_training_per_learning_rate(momentum, weight_decay):
    x_val, y_val = _data(40, seed=1)
    history = train_probes(
        _batches,
        {"val": ({"cls": x_val, "dino": 2 * x_val}, y_val)},
        6,
        lrs=LRS,
        epochs=EPOCHS,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=7,
    )["val"]
    for scale, name in ((1, "cls"), (2, "dino")):
        expected = [_one_probe(lr, scale, momentum, weight_decay)[1] for lr in LRS]
        torch.testing.assert_close(
            history[name].transpose(0, 1), torch.tensor(expected, dtype=torch.float64)
        )
    assert history["cls"].shape == (EPOCHS, len(LRS), 2)


def test_weights_after_training_equal_torchs():
    bank = ProbeBank(10, 6, lrs=LRS, epochs=EPOCHS, seed=7)
    for epoch in range(EPOCHS):
        for features, labels in _batches(epoch):
            losses = bank.step(features["cls"], labels)
            assert losses.shape == (3,)
        bank.scheduler.step()
    for p, lr in enumerate(LRS):
        model, _ = _one_probe(lr, 1, 0.9, 0.0)
        torch.testing.assert_close(bank.weight[p], model.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bank.bias[p], model.bias, atol=1e-5, rtol=1e-4)
    assert all(group["lr"] == pytest.approx(0, abs=1e-12) for group in bank.optimizer.param_groups)


def _train_on_a_rank(rank):
    bank = ProbeBank(10, 6, lrs=LRS, epochs=1, seed=7)
    for features, labels in _batches(0, rows=64):
        bank.step(features["cls"][rank::2], labels[rank::2], distributed=True)
    return bank.weight.detach()


def test_two_processes_with_half_batches_equal_one(ddp):
    bank = ProbeBank(10, 6, lrs=LRS, epochs=1, seed=7)
    for features, labels in _batches(0, rows=64):
        bank.step(features["cls"], labels)
    for weight in ddp(_train_on_a_rank):
        torch.testing.assert_close(weight, bank.weight.detach(), atol=1e-5, rtol=1e-4)


def test_the_report_says_who_chose():
    val = torch.tensor([[10.0, 20.0], [60.0, 30.0], [50.0, 40.0]])  # (epoch, lr)
    holdout = torch.tensor([[1.0, 2.0], [1.0, 9.0], [1.0, 3.0]])

    def with_top5(scores):
        return {"cls": torch.stack([scores, scores + 1], dim=-1)}

    report = summarize_probes(
        {"val": with_top5(val), "holdout": with_top5(holdout)}, [1e-3, 1e-2], 1e-2
    )["cls"]
    assert report["best"]["top1"] == 60
    assert report["best"]["epoch"] == 2
    assert "optimistic" in report["best"]["selected_on"]
    assert [entry["top1"] for entry in report["last"]] == [50, 40]
    assert report["protocol_lr"]["best"]["top1"] == 40
    assert report["protocol_lr"]["last"]["epoch"] == 3
    assert report["chosen"]["top1"] == 30  # what the held-out images chose, not the maximum
    assert report["chosen"]["top5"] == 31
    assert report["curves"]["top1"] == [[10, 60, 50], [20, 30, 40]]
    without = summarize_probes({"val": with_top5(val)}, [1e-2, 1e-1], 1e-3)["cls"]
    assert not {"chosen", "protocol_lr"} & set(without)


def test_held_out_rows():
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    fit, held = holdout_rows(labels, 0.2, seed=3)
    assert sorted(fit + held) == list(range(16))
    assert labels[held].bincount().tolist() == [2, 1, 1]
    assert holdout_rows(labels, 0.2, seed=3) == (fit, held)
    assert holdout_rows(labels, 0.2, seed=4) != (fit, held)
    assert holdout_rows(labels, 0.0, seed=3) == (list(range(16)), [])
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        holdout_rows(labels, 1.0, seed=3)
    with pytest.raises(ValueError, match="class 3 has a single image"):
        holdout_rows(torch.tensor([0, 0, 3]), 0.2, seed=3)


def test_cached_features_learn_and_held_out_images_are_not_trained_on():
    x, y = _data(120)
    x_val, y_val = _data(60, seed=1)
    report = linear_accuracy(
        {"cls": x}, y, {"cls": x_val}, y_val, lrs=[0.1], epochs=20, batch_size=64, holdout=0.25
    )["cls"]
    assert report["best"]["top1"] > 60
    assert report["chosen"]["selected_on"] == "held-out training images"
    # two classes of identical features: held-out labels could only be guessed if trained on
    same = {"cls": torch.ones(40, 3)}
    labels = torch.arange(40) % 2
    flat = linear_accuracy(same, labels, same, labels, lrs=[1.0], epochs=5, batch_size=8)["cls"]
    assert flat["best"]["top1"] == 50


def test_scaling_with_the_batch():
    assert scaled_lrs([0.001, 1.0], 512) == [0.002, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": []}, "must all be positive"),
        ({"lrs": [-1.0]}, "must all be positive"),
        ({"epochs": 0}, "epochs=0 at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"train_labels": torch.full((60,), -100)}, "labels must be 0 .. C - 1, got a negative"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, "linear training cls: 60 features"),
        (
            {"val_features": {"cls": torch.full((60, 10), torch.inf)}},
            "linear validation cls .* NaN",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    x, y = _data()
    inputs = {
        "train_features": {"cls": x},
        "train_labels": y,
        "val_features": {"cls": x},
        "val_labels": y,
        "lrs": [0.1],
        "epochs": 1,
    }
    with pytest.raises(ValueError, match=message):
        linear_accuracy(**(inputs | change))


def test_an_epoch_without_images_is_refused():
    x, y = _data()
    with pytest.raises(ValueError, match="without a single training image"):
        train_probes(lambda epoch: [], {"val": ({"cls": x}, y)}, 6, lrs=[0.1], epochs=1)
