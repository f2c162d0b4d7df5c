"""Monitors against scipy; alarms; the callback in a real Trainer and on two real ranks."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.training.alarms import CollapseWarning
from dinovmf_plugin.training.monitor import MixtureMonitor
from dinovmf_plugin.training.records import StepRecord

K, DIM, BATCH, VIEWS = 64, 8, 6, 4


class FakeMethod(LightningModule):
    """Makes records from a list; trains one scalar, so that the Trainer has something to do."""

    def __init__(self, make_record, normalization="vmf"):
        super().__init__()
        self.head = torch.nn.Module()
        self.head.last_layer = Prototypes(DIM, K, normalization)
        self.momentum_head = torch.nn.Module()
        self.momentum_head.last_layer = Prototypes(DIM, K, normalization)
        self.centering = make_centering("probability", K)
        self.scalar = torch.nn.Parameter(torch.zeros(()))
        self.make_record = make_record
        self.records = []

    def training_step(self, batch, index):
        self.last_step = self.make_record(self)
        self.records.append(self.last_step)
        return self.scalar.square()

    def configure_optimizers(self):
        return torch.optim.SGD([self.scalar], lr=0.1)


def random_record(module, temperature=0.05, loss=3.0):
    teacher = F.normalize(torch.randn(2 * BATCH, DIM), dim=-1)
    return StepRecord(
        loss=torch.tensor(loss),
        targets=module.momentum_head.last_layer(teacher, temperature).softmax(-1).detach(),
        student_embeddings=F.normalize(torch.randn(VIEWS, BATCH, DIM), dim=-1),
        teacher_embeddings=teacher,
        teacher_temperature=temperature,
        student_temperature=0.1,
    )


def uniform_record(module):
    return StepRecord(
        loss=torch.tensor(math.log(K)),
        targets=torch.full((2 * BATCH, K), 1 / K),
        student_embeddings=torch.zeros(VIEWS, BATCH, DIM),
        teacher_embeddings=F.normalize(torch.ones(2 * BATCH, DIM), dim=-1),
        teacher_temperature=0.05,
        student_temperature=0.1,
    )


def fit(module, callback, steps=6, epochs=1, **kwargs):
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **kwargs,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(torch.zeros(steps, 1)))
    return trainer, [str(w.message) for w in caught if w.category is CollapseWarning]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_callback__logs_the_values_of_its_records(tmp_path):
    torch.manual_seed(0)
    module = FakeMethod(random_record)
    path = tmp_path / "new" / "history.jsonl"
    trainer, alarms = fit(module, MixtureMonitor(2, history_path=path), steps=6, epochs=2)
    lines = read(path)
    assert alarms == []
    assert [x["kind"] for x in lines] == ["start"] + 2 * ["step", "step", "step", "epoch"]
    assert [x["step"] for x in lines if x["kind"] == "step"] == [2, 4, 6, 8, 10, 12]

    # the second record of the first epoch is that of the fourth step: teacher view 0, student view 1
    step, record = module.records[3], lines[2]
    targets = step.targets[:BATCH].double().numpy()
    logits = module.head.last_layer(step.student_embeddings[1], 0.1).detach()
    student = logits.softmax(-1).double().numpy()
    wins = np.bincount(step.targets.argmax(-1), minlength=K)
    expected = {
        "loss_over_log_k": 3.0 / math.log(K),
        "teacher_entropy": stats.entropy(targets, axis=1).mean(),
        "student_entropy": stats.entropy(student, axis=1).mean(),
        "kl": stats.entropy(targets, student, axis=1).mean(),
        "top1_agreement": (targets.argmax(1) == student.argmax(1)).mean(),
        "batch_perplexity": np.exp(stats.entropy(targets.mean(0))),
        "batch_largest_win_share": wins.max() / wins.sum(),
        "center_min": 0.0,
        "center_max": 0.0,
    }
    # information is of both steps since the record before, both views
    both = torch.cat([r.targets for r in module.records[2:4]]).double().numpy()
    of_mean = stats.entropy(both.mean(0))
    expected |= {
        "information_rows": 2 * 2 * BATCH,
        "target_information": of_mean - stats.entropy(both, axis=1).mean(),
        "student_information": of_mean - 3.0,
        "student_information_share": (of_mean - 3.0) / math.log(K),
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, abs=1e-5), name
    assert trainer.callback_metrics["monitor/kl"] == pytest.approx(lines[7]["kl"], abs=1e-6)

    # usage counts the second epoch only, all of its steps
    epoch = lines[-1]
    winners = torch.cat([r.targets.argmax(-1) for r in module.records[6:]]).numpy()
    assert epoch["usage_rows"] == 6 * 2 * BATCH
    assert epoch["win_share"] == pytest.approx(len(set(winners)) / K)
    counts = np.bincount(winners, minlength=K)
    assert epoch["usage_perplexity"] == pytest.approx(np.exp(stats.entropy(counts)), rel=1e-5)
    assert epoch["kappa_median"] == pytest.approx(20, rel=1e-5)
    assert trainer.callback_metrics["monitor/win_share"] == pytest.approx(epoch["win_share"])


@pytest.mark.parametrize("stop", [False, True])
def test_uniform_collapse__warns_once_and_stops_if_asked(tmp_path, stop):
    path = tmp_path / "history.jsonl"
    module = FakeMethod(uniform_record)
    monitor = MixtureMonitor(1, history_path=path, stop_on_collapse=stop, patience=3)
    trainer, alarms = fit(module, monitor, steps=5, epochs=3)
    assert trainer.global_step == (3 if stop else 15)
    uniform = [text for text in alarms if "uniform collapse" in text]
    assert len(uniform) == 1
    assert uniform[0].startswith("step 3: ")
    assert "momentum.base_tau" in uniform[0]
    assert ("stops" in uniform[0]) is stop
    assert [x["name"] for x in read(path) if x["kind"] == "alarm"][0] == "uniform_collapse"


def one_component_record(module):
    record = random_record(module)
    record.targets.copy_(torch.eye(K)[7].expand(2 * BATCH, K))
    return record


def test_one_component__is_told_from_uniform():
    module = FakeMethod(one_component_record)
    trainer, alarms = fit(module, MixtureMonitor(1, stop_on_collapse=True, patience=2), steps=5)
    assert trainer.global_step == 2
    assert len(alarms) == 1
    assert "one prototype is the target of 100%" in alarms[0]
    assert "vmf" in alarms[0]


def void_record(module):
    record = random_record(module)
    mean = torch.eye(DIM)[0]
    teacher = F.normalize(mean + 0.1 * torch.randn(2 * BATCH, DIM), dim=-1)
    with torch.no_grad():
        module.momentum_head.last_layer.weight_v[10:] = -mean + 1e-3 * torch.randn(K - 10, DIM)
    record.teacher_embeddings.copy_(teacher)
    return record


@pytest.mark.parametrize("stop", [False, True])
def test_void_set__warns_once_and_stops_if_asked(stop):
    monitor = MixtureMonitor(3, stop_on_collapse=True, stop_on_void_set=stop)
    trainer, alarms = fit(FakeMethod(void_record), monitor, steps=3, epochs=2)
    assert len(alarms) == 1
    assert "84% of the prototypes" in alarms[0]
    assert "normalization=vmf" in alarms[0]
    assert trainer.global_step == (3 if stop else 6)


def test_streaks__survive_a_checkpoint(tmp_path):
    first = MixtureMonitor(1, patience=5)
    module = FakeMethod(uniform_record)
    trainer, alarms = fit(module, first, steps=3)
    assert alarms == []
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]
    second = MixtureMonitor(1, patience=5)
    second.load_state_dict(next(v for k, v in state.items() if "MixtureMonitor" in k))
    _, alarms = fit(FakeMethod(uniform_record), second, steps=3)
    assert [text[:6] for text in alarms] == ["step 2"]


def test_information__goes_on_exactly_after_a_checkpoint_between_two_records(tmp_path):
    def records(path):
        found = [x for x in read(path) if x["kind"] == "step"]
        return [{k: v for k, v in x.items() if k != "epoch"} for x in found]

    def hooks(monitor, module, steps):
        trainer = SimpleNamespace(global_step=0, current_epoch=0, is_global_zero=True)
        monitor.on_fit_start(trainer, module)
        for trainer.global_step, record in steps:
            module.last_step = record
            monitor.on_train_batch_end(trainer, module, None, None, 0)
        return monitor

    torch.manual_seed(0)
    module = FakeMethod(random_record)
    module.log_dict = lambda *_, **__: None
    steps = [(i, random_record(module)) for i in range(1, 9)]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    end = hooks(MixtureMonitor(4, history_path=whole), module, steps).state_dict()
    first = hooks(MixtureMonitor(4, history_path=parts), module, steps[:6])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = MixtureMonitor(4, history_path=parts)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert hooks(second, module, steps[6:]).state_dict() == end
    assert records(parts) == records(whole)
    assert records(whole)[1]["information_rows"] == 4 * 2 * BATCH
    assert end["watch"]["peak"] > 0


def test_warm_up__little_information_before_its_end_is_no_collapse():
    module = FakeMethod(uniform_record)
    monitor = MixtureMonitor(1, patience=2, warmup_epochs=1.5)
    _, alarms = fit(module, monitor, steps=4, epochs=3)
    assert [text[:6] for text in alarms] == ["step 8"]


def test_training__is_not_changed():
    def run(callback):
        torch.manual_seed(1)
        fit(FakeMethod(random_record), callback, steps=4)
        return torch.random.get_rng_state()

    from lightning.pytorch import Callback

    assert torch.equal(run(MixtureMonitor(1)), run(Callback()))


def test_accumulation__makes_one_record_per_optimizer_step(tmp_path):
    path = tmp_path / "h.jsonl"
    fit(
        FakeMethod(random_record),
        MixtureMonitor(1, history_path=path),
        steps=6,
        accumulate_grad_batches=3,
    )
    lines = read(path)
    assert [x["step"] for x in lines if x["kind"] == "step"] == [0, 1, 2]
    assert lines[-1]["usage_rows"] == 6 * 2 * BATCH


def test_shared_prototypes__and_a_single_target_view_work(tmp_path):
    def record(module):
        full = random_record(module)
        return StepRecord(
            full.loss,
            full.targets[:BATCH],
            full.student_embeddings,
            full.teacher_embeddings[:BATCH],
            0.025,
            0.1,
        )

    module = FakeMethod(record, "l2")
    module.prototypes = module.momentum_head.last_layer
    module.centering = None
    del module.head
    path = tmp_path / "h.jsonl"
    fit(module, MixtureMonitor(1, history_path=path), steps=1)
    line = read(path)[1]
    logits = module.prototypes(module.records[0].student_embeddings[0], 0.1).detach()
    entropy = stats.entropy(logits.softmax(-1).double(), axis=1).mean()
    assert line["student_entropy"] == pytest.approx(entropy, abs=1e-5)
    assert "center_min" not in line


def test_bad_input__is_named():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        MixtureMonitor(0)
    with pytest.raises(ValueError, match="patience=0"):
        MixtureMonitor(patience=0)
    with pytest.raises(TypeError, match="momentum_head"):
        MixtureMonitor().on_fit_start(SimpleNamespace(is_global_zero=True), SimpleNamespace())


RANKS = """
import json, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from dinovmf_plugin.training.monitor import MixtureMonitor
from dinovmf_plugin.training.records import StepRecord
from dinovmf_plugin.core.prototypes import Prototypes


def watch(rank, world, resume):
    torch.manual_seed(0)
    layer = Prototypes(8, 32, "vmf")
    images = 8
    y = torch.nn.functional.normalize(torch.randn(4, 2, images, 8), dim=-1)  # steps, views, images
    part = slice(rank * images // world, (rank + 1) * images // world)
    logged = {}
    module = SimpleNamespace(
        prototypes=layer, centering=None, log_dict=lambda values, **_: logged.update(values)
    )
    trainer = SimpleNamespace(global_step=0, current_epoch=0, is_global_zero=rank == 0)
    monitor = MixtureMonitor(4)
    monitor.on_fit_start(trainer, module)
    monitor.on_train_epoch_start(trainer, module)
    for views in y:
        trainer.global_step += 1
        mine = views[:, part]
        flat = mine.flatten(0, 1)
        targets = layer(flat, 0.05).softmax(-1).detach()
        module.last_step = StepRecord(mine.mean(), targets, mine, flat, 0.05, 0.1)
        monitor.on_train_batch_end(trainer, module, None, None, 0)
        if resume and trainer.global_step == 2:
            # what the first rank writes is what all of them load
            states = [monitor.state_dict()] * world
            if world > 1:
                dist.broadcast_object_list(states)
            wins, embeddings = monitor._wins, monitor._embedding_sum
            monitor = MixtureMonitor(4)
            monitor.load_state_dict(states[0])
            monitor.on_fit_start(trainer, module)
            monitor._wins, monitor._embedding_sum = wins, embeddings
    monitor.on_train_epoch_end(trainer, module)
    return {k: float(v) for k, v in logged.items()}


if __name__ == "__main__":
    rank, folder, resume = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(watch(rank, 2, resume), file)
"""


@pytest.mark.parametrize("resume", [False, True])
def test_two_ranks__log_what_one_process_logs_on_the_joined_batch(tmp_path, resume):
    script = tmp_path / "rank.py"
    script.write_text(RANKS)
    running = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path), str(resume)])
        for rank in (0, 1)
    ]
    one = runpy.run_path(str(script))["watch"](0, 1, False)
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    # a mean over ranks cannot give these two of the joined batch; they describe a rank's batch
    per_rank = {"monitor/batch_perplexity", "monitor/batch_largest_win_share"}
    assert len(one) > 20
    for name in one.keys() - per_rank:
        assert first[name] == pytest.approx(one[name], abs=1e-5), name
