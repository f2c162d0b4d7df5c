"""What is watched during training: online classifier and kNN, features for scripts."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F


def test_labels__reach_the_classifier_and_nothing_else(tiny_cfg, make_crops, build, fit):
    gradients = []
    for labeled in (True, False):
        module = build(tiny_cfg(max_epochs=1))
        batch = make_crops(labeled=labeled)
        seen: dict[str, torch.Tensor] = {}
        keep = Callback()
        keep.on_before_optimizer_step = lambda trainer, m, optimizer, seen=seen: seen.update(
            {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
        )
        trainer = fit(module, [batch], callbacks=[keep])
        assert bool(torch.isfinite(trainer.callback_metrics["train_loss"]))
        gradients.append(seen)
    with_labels, without = gradients
    # also without labels every parameter has a gradient: DDP waits for each of them
    assert set(with_labels) == set(without)
    assert with_labels["classifier.weight"].abs().sum() > 0
    assert torch.equal(without["classifier.weight"], torch.zeros(4, 128))
    for name in without:
        if not name.startswith("classifier"):
            assert torch.equal(with_labels[name], without[name]), name


def test_labels__some_unknown__ignored(tiny_cfg, make_crops, build, fit):
    indexes, crops, targets = make_crops()
    targets = torch.tensor([1, -1, 2, -1])
    module = build(tiny_cfg(max_epochs=1, **{"knn_eval.enabled": True}))
    trainer = fit(module, [[indexes, crops, targets]])
    assert bool(torch.isfinite(trainer.callback_metrics["train_class_loss"]))
    # the bank of the online kNN: both views; unknown labels are left out when it is asked
    assert torch.cat(module.knn.train_targets).tolist() == [1, -1, 2, -1] * 2
    # a classifier that always says 1: the accuracy is that of the labeled images
    with torch.no_grad():
        module.classifier.weight.zero_()
        module.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    trainer = fit(module, [[indexes, crops, targets]])
    assert float(trainer.callback_metrics["train_acc1_epoch"]) == 50


def test_online_knn__looks_at_the_teacher(tiny_cfg, make_crops, build, fit):
    module = build(tiny_cfg(max_epochs=1, **{"knn_eval.enabled": True, "knn_eval.k": 1}))
    with torch.no_grad():  # a teacher that is not the student
        for parameter in module.momentum_backbone.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = make_crops()
    with torch.no_grad():
        features = [module.momentum_forward(x)["feats"] for x in batch[1][:2]]
    fit(module, [batch])
    torch.testing.assert_close(torch.cat(module.knn.train_features), torch.cat(features))


def test_validation__student_classifier_and_teacher_knn(tiny_cfg, make_crops, build, fit):
    """Validation images are the training images: 1-nearest-neighbor must be perfect."""
    module = build(
        tiny_cfg(
            max_epochs=1,
            **{"knn_eval.enabled": True, "knn_eval.k": 1, "momentum.base_tau": 1.0},
        )
    )
    batch = make_crops(batch=6)
    val = [(batch[1][0][:4], batch[2][:4]), (batch[1][0][4:], batch[2][4:])]
    trainer = fit(module, [batch], val)
    metrics = trainer.callback_metrics
    assert metrics["val_knn_acc1"].item() == 100
    module.eval()
    with torch.no_grad():
        logits = [module.classifier(module.student_features(x)) for x, _ in val]
    expected = F.cross_entropy(torch.cat(logits), batch[2])
    assert metrics["val_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    accuracy = (torch.cat(logits).argmax(1) == batch[2]).float().mean() * 100
    assert metrics["val_acc1"].item() == pytest.approx(accuracy.item(), abs=1e-3)


def test_forward__keys_for_the_hosts_knn_and_umap_scripts(tiny_cfg, make_crops, build):
    module = build(tiny_cfg()).eval()
    image = make_crops()[1][0]
    out = module(image)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "logits": (4, 4),
        "feats": (4, 128),
        "z": (4, 8),
    }
    torch.testing.assert_close(out["feats"], module.backbone(image))
    torch.testing.assert_close(out["z"].norm(dim=-1), torch.ones(4))
    teacher = module.momentum_forward(image)
    assert set(teacher) == {"feats", "z"}
    assert not teacher["feats"].requires_grad


def test_last_step__holds_what_the_monitors_need(tiny_cfg, make_crops, build):
    module = build(tiny_cfg())
    out = module.distillation_loss(make_crops()[1])
    record = module.last_step
    assert record.loss.item() == out.loss.item()
    assert record.targets.shape == (8, 32)
    torch.testing.assert_close(record.targets.sum(-1), torch.ones(8))
    assert record.student_embeddings.shape == (4, 4, 8)
    assert record.teacher_embeddings.shape == (8, 8)
    assert (record.student_temperature, record.teacher_temperature) == (0.1, 0.07)
    tensors = (record.loss, record.targets, record.student_embeddings, record.teacher_embeddings)
    assert not any(t.requires_grad for t in tensors)
