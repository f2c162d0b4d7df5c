import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from dinovmf_plugin.features.extraction import (
    FeatureSpec,
    PixelFeatures,
    backbone_features,
    extract_features,
    resolve_feature,
)


def _vit(dim=48, depth=5, seed=0, **kwargs):
    torch.manual_seed(seed)
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=dim, depth=depth, num_heads=2, num_classes=0, **kwargs
    )
    torch.nn.init.normal_(vit.norm.weight)  # so that a norm too many or too few shows
    torch.nn.init.normal_(vit.norm.bias)
    return vit.eval()


def _images(rows, seed=1):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def _loader(rows=7, batch_size=3):
    return DataLoader(TensorDataset(_images(rows), torch.arange(rows)), batch_size=batch_size)


@torch.no_grad()
def test_features_equal_timms_own_intermediate_layers():
    vit, images = _vit(), _images(3)
    normed = vit.get_intermediate_layers(images, n=4, norm=True, return_prefix_tokens=True)
    raw = vit.get_intermediate_layers(images, n=1, norm=False, return_prefix_tokens=True)
    expected = {
        "cls": vit(images),
        "cls_pre_norm": raw[0][1][:, 0],
        "dino": torch.cat([prefix[:, 0] for _, prefix in normed], dim=1),
    }
    specs = [resolve_feature(name, vit) for name in expected]
    for found, wanted in zip(backbone_features(vit, images, specs), expected.values(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    # the same in a pass of its own
    for name, wanted in expected.items():
        alone = backbone_features(vit, images, [resolve_feature(name, vit)])[0]
        torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_wide_models_take_cls_and_the_mean_patch():
    vit, images = _vit(dim=768, depth=1), _images(2)
    tokens = vit.forward_features(images)
    wanted = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    found = backbone_features(vit, images, [resolve_feature("dino", vit)])[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_registers_are_no_patches():
    vit, images = _vit(depth=1, reg_tokens=2), _images(2)
    tokens = vit.forward_features(images)
    wanted = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1)
    found = backbone_features(vit, images, [FeatureSpec(avgpool=True)])[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_named_features():
    deep = _vit()
    assert resolve_feature("dino", deep) == FeatureSpec(n_last_blocks=4)
    assert resolve_feature("dino", _vit(depth=2)) == FeatureSpec(n_last_blocks=2)
    assert resolve_feature({"n_last_blocks": 2, "avgpool": True}, deep) == FeatureSpec(2, True)
    assert resolve_feature("cls", PixelFeatures()) is None
    for wrong in ("clss", {"blocks": 4}):
        with pytest.raises(ValueError, match="is unknown: choose one of"):
            resolve_feature(wrong, deep)
    with pytest.raises(ValueError, match="needs 6 blocks, but the backbone has 5"):
        resolve_feature(FeatureSpec(6), deep)


def test_extraction_keeps_the_order_and_needs_no_training_mode():
    vit = _vit(drop_path_rate=0.5, proj_drop_rate=0.5)
    vit.train()
    features, labels = extract_features(vit, _loader(), progress=False)
    assert labels.tolist() == list(range(7))
    assert not features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(features, vit.eval()(_images(7)), atol=1e-5, rtol=1e-4)


def test_extracted_features_can_train_a_probe():
    features, labels = extract_features(_vit(), _loader(), progress=False)
    linear = torch.nn.Linear(features.shape[1], 7)
    torch.nn.functional.cross_entropy(linear(features), labels).backward()
    assert linear.weight.grad.abs().sum() > 0


def test_autocast_gives_float32_features_close_to_exact():
    exact, _ = extract_features(_vit(), _loader(), progress=False)
    rounded, _ = extract_features(_vit(), _loader(), precision=torch.bfloat16, progress=False)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.2


def test_pixels_average_what_they_shrink():
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    features = PixelFeatures(1)(image)
    assert features.tolist() == [pytest.approx([7.5] * 3)]


def test_a_broken_backbone_is_named():
    vit = _vit()
    torch.nn.init.constant_(vit.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="feature 'feature' of image 0 of train holds a NaN"):
        extract_features(vit, _loader(), progress=False, name="train")
    with pytest.raises(ValueError, match="there is no image"):
        extract_features(_vit(), [], progress=False)


def _extract_on_a_rank(rank):
    rows = list(range(rank, 7, 2))
    share = [(_images(7)[rows], torch.tensor(rows))]
    return extract_features(_vit(), share, "dino", distributed=True, progress=False)


def test_two_processes_give_the_same_as_one(ddp):
    features, labels = extract_features(_vit(), _loader(), "dino", progress=False)
    for found, found_labels in ddp(_extract_on_a_rank):
        assert found_labels.tolist() == labels.tolist()
        torch.testing.assert_close(found, features, atol=1e-5, rtol=1e-4)
