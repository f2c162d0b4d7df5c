"""What the monitors measure, against scipy and numpy; when an alarm speaks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.mixture import statistics as monitors
from dinovmf_plugin.training.alarms import CollapseWatch, void_set_alarm
from dinovmf_plugin.training.monitor import MixtureMonitor
from dinovmf_plugin.training.records import StepRecord

K, DIM = 64, 8


def test_distillation_statistics__equal_scipy():
    rng = np.random.default_rng(0)
    targets = rng.dirichlet(np.full(10, 0.3), size=20)
    targets[0] = np.eye(10)[3]  # exact zeros
    logits = rng.normal(size=(20, 10)) * 3
    student = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = monitors.distillation_statistics(torch.tensor(targets), torch.tensor(logits))
    expected = {
        "teacher_entropy": stats.entropy(targets, axis=1).mean(),
        "student_entropy": stats.entropy(student, axis=1).mean(),
        "kl": stats.entropy(targets, student, axis=1).mean(),
        "top1_agreement": (targets.argmax(1) == student.argmax(1)).mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-5), name


def test_information__is_the_mutual_information_of_image_and_component():
    rng = np.random.default_rng(0)
    targets = rng.dirichlet(np.full(12, 0.2), size=30)
    targets[:3] = np.eye(12)[[3, 3, 5]]  # exact zeros
    student = rng.dirichlet(np.full(12, 0.5), size=30)
    # the joint distribution of a uniformly drawn image and its component
    joint = targets / 30
    mutual = stats.entropy(joint.ravel(), np.outer(joint.sum(1), joint.sum(0)).ravel())
    kl = stats.entropy(targets, student, axis=1).mean()
    cross_entropy = -(targets * np.log(student)).sum(1)
    # three steps of different size, each with its own mean loss
    parts = np.split(np.arange(30), [7, 9])
    sums = sum(
        monitors.information_sums(
            torch.tensor(targets[part]), torch.tensor(cross_entropy[part].mean())
        )
        for part in parts
    )
    found = {k: float(v) for k, v in monitors.information_statistics(sums).items()}
    assert found["information_rows"] == 30
    assert found["target_information"] == pytest.approx(mutual, abs=1e-5)
    assert found["target_information_share"] == pytest.approx(mutual / math.log(12), abs=1e-5)
    assert found["student_information"] == pytest.approx(mutual - kl, abs=1e-5)
    share = (mutual - kl) / math.log(12)
    assert found["student_information_share"] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("k", [512, 500])
def test_winners__are_the_arg_max_the_first_of_equal_ones(k):
    torch.manual_seed(0)
    targets = torch.rand(40, k)
    targets[1] = 0.25
    targets[2, [7, 300, 499]] = 2.0
    found = monitors.winners(targets)
    assert found.tolist() == np.asarray(targets).argmax(1).tolist()
    assert found[1:3].tolist() == [0, 7]
    assert monitors.winners(targets[:0]).shape == (0,)


@pytest.mark.parametrize("targets", [torch.full((9, 8), 1 / 8), torch.eye(8)[[2] * 9]])
def test_information__is_zero_where_all_targets_are_the_same(targets):
    sums = monitors.information_sums(targets, torch.tensor(1.0))
    assert float(monitors.information_statistics(sums)["target_information"]) == 0


def test_usage_statistics__equal_scipy():
    counts = np.array([5, 0, 1, 0, 10, 4])
    found = monitors.usage_statistics(torch.tensor(counts))
    assert float(found["win_share"]) == pytest.approx(4 / 6)
    assert float(found["usage_perplexity"]) == pytest.approx(np.exp(stats.entropy(counts)))
    assert float(found["largest_win_share"]) == pytest.approx(0.5)


def test_prototype_statistics__equal_numpy():
    layer = Prototypes(DIM, 101, "vmf")
    with torch.no_grad():
        layer.weight_g.copy_(torch.linspace(-1, 4, 101)[:, None])
    g = np.abs(np.linspace(-1, 4, 101))
    found = {k: float(v) for k, v in monitors.prototype_statistics(layer, 0.05).items()}
    assert found["negative_g"] == 20
    for name, q in (("min", 0), ("p05", 5), ("median", 50), ("p95", 95), ("max", 100)):
        assert found[f"magnitude_{name}"] == pytest.approx(np.percentile(g, q), abs=1e-5)
        assert found[f"kappa_{name}"] == pytest.approx(np.percentile(g, q) / 0.05, abs=1e-3)
    bias = layer.log_normalizer(0.05)
    assert (found["log_normalizer_min"], found["log_normalizer_max"]) == (bias.min(), bias.max())
    assert "log_normalizer_min" not in monitors.prototype_statistics(Prototypes(DIM, 4), 0.1)


def test_duplicate_statistics__of_a_sample_estimate_the_whole():
    generator = torch.Generator().manual_seed(0)
    mean = F.normalize(torch.randn(16, generator=generator), dim=0)
    directions = torch.randn(3000, 16, generator=generator)
    directions[1000:] = -mean + 1e-4 * torch.randn(2000, 16, generator=generator)
    directions = directions[torch.randperm(3000, generator=generator)]
    whole = monitors.duplicate_statistics(directions, mean)
    part = monitors.duplicate_statistics(directions, mean, sample=500)
    assert whole["examined_prototypes"] == 3000
    assert part["examined_prototypes"] == 500
    assert whole["largest_duplicate_share"] == pytest.approx(2 / 3, abs=0.01)
    assert part["largest_duplicate_share"] == pytest.approx(2 / 3, abs=0.08)
    assert part["largest_duplicate_cosine"] == pytest.approx(-1, abs=1e-4)
    assert monitors.duplicate_statistics(directions, mean, sample=500) == part
    assert void_set_alarm(part).name == "void_set"


def test_drift_statistics__equal_numpy():
    generator = np.random.default_rng(0)
    w = generator.normal(size=(301, 16))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    mean = generator.normal(size=16)
    cosine = w @ mean / np.linalg.norm(mean)
    found = monitors.drift_statistics(torch.tensor(w).float(), torch.tensor(mean).float())
    for name, q in (("p05", 5), ("median", 50), ("p95", 95)):
        assert found[f"data_cosine_{name}"] == pytest.approx(np.percentile(cosine, q), abs=1e-5)
    assert found["resultant_length"] == pytest.approx(np.linalg.norm(w.mean(0)), abs=1e-6)


def test_watch__needs_patience_and_speaks_once_per_collapse():
    watch = CollapseWatch(K, patience=3)
    bad, healthy = {"target_information_share": 0.02}, {"target_information_share": 0.04}
    names = [
        [alarm.name for alarm in watch.update(record)]
        for record in [bad, bad, healthy, bad, bad, bad, bad, healthy, bad, bad, bad]
    ]
    assert [i for i, found in enumerate(names) if found] == [5, 10]
    assert names[5] == ["uniform_collapse"]
    one = CollapseWatch(K, patience=1).update({"batch_largest_win_share": 1.0})
    assert [alarm.name for alarm in one] == ["one_component_collapse"]
    nan = {"target_information_share": math.nan, "loss_over_log_k": math.nan}
    assert CollapseWatch(K, patience=1).update(nan) == []


def test_watch__tells_uniform_from_one_component_by_the_targets_entropy():
    same = {"target_information_share": 0.0, "batch_largest_win_share": 1.0}
    for share, name in ((0.97, "uniform_collapse"), (0.03, "one_component_collapse")):
        record = same | {"teacher_entropy": share * math.log(K)}
        assert [a.name for a in CollapseWatch(K, patience=1).update(record)] == [name]


def test_watch__waits_for_the_warm_up_but_remembers_its_peak():
    watch = CollapseWatch(K, patience=2)
    shares = [0.01, 0.01, 0.01, 0.4, 0.11, 0.09, 0.09, 0.09, 0.02, 0.02]
    names = {
        i: [a.name for a in watch.update({"target_information_share": share}, warm=i > 3)]
        for i, share in enumerate(shares)
    }
    assert {i: found for i, found in names.items() if found} == {
        6: ["information_lost"],
        9: ["uniform_collapse"],
    }


def test_watch__a_student_that_stays_at_log_k_is_a_collapse_whatever_the_targets_say():
    record = {"target_information_share": 0.5, "loss_over_log_k": 0.98}
    (alarm,) = CollapseWatch(K, patience=1).update(record)
    assert alarm.name == "uniform_collapse"
    assert "98.0% of log K" in alarm.message
    assert CollapseWatch(K, patience=1).update(record | {"loss_over_log_k": 0.96}) == []


@pytest.mark.slow
def test_cost__is_below_one_percent_of_head_and_loss_alone():
    """K 65536, p 256, 64 images, 12 views; CPU time, so that other processes do not count."""
    import statistics
    import time

    from dinovmf_plugin.losses.dino import dino_loss

    big, images, views = 65536, 64, 12
    student, teacher = Prototypes(256, big, "vmf"), Prototypes(256, big, "vmf")
    centering = make_centering("probability", big)
    y = F.normalize(torch.randn(views, images, 256), dim=-1).requires_grad_()
    y_teacher = F.normalize(torch.randn(2 * images, 256), dim=-1)

    def train_step():
        with torch.no_grad():
            scores, bias = teacher.scores(y_teacher), teacher.log_normalizer(0.04)
            targets = centering(scores, 0.04, bias)
            centering.update(scores, 0.04, bias)
        loss = dino_loss(y, student, targets.unflatten(0, (2, -1)), 0.1)
        loss.backward()
        y.grad = None
        student.zero_grad()
        return StepRecord(loss.detach(), targets, y.detach(), y_teacher, 0.04, 0.1)

    module = SimpleNamespace(
        head=SimpleNamespace(last_layer=student),
        momentum_head=SimpleNamespace(last_layer=teacher),
        centering=centering,
        log_dict=lambda *_, **__: None,
    )
    trainer = SimpleNamespace(global_step=1, current_epoch=0, is_global_zero=True)
    monitor = MixtureMonitor(50)
    monitor.on_fit_start(trainer, module)
    times = {"train": [], "counted": [], "recorded": []}
    for i in range(5):
        marks = [time.process_time()]
        module.last_step = train_step()
        marks.append(time.process_time())
        for step in (50 * i + 1, 50 * i + 50):
            trainer.global_step = step
            monitor.on_train_batch_end(trainer, module, None, None, 0)
            marks.append(time.process_time())
        for name, start, end in zip(times, marks[:-1], marks[1:], strict=True):
            times[name].append(end - start)
    train, counted, recorded = (statistics.median(values) for values in times.values())
    assert counted + recorded / 50 < 0.01 * train
