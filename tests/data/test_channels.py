"""Channel statistics of a stored config are those that training used."""

import pytest

from dinovmf_plugin.data.channels import IMAGENET, channel_statistics
from dinovmf_plugin.data.recipe import parse_recipe

PIPELINE = {
    "crop_size": 32,
    "num_crops": 2,
    "rrc": {"crop_min_scale": 0.2, "crop_max_scale": 1.0},
}
OWN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize("own", [{}, OWN, {"mean": OWN["mean"]}])
@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "imagenet", "custom"])
def test_as_training_reads_them(dataset, own):
    pipelines = [PIPELINE | own]
    crop = parse_recipe(pipelines, dataset=dataset)[0]
    nested = channel_statistics({"data": {"dataset": dataset}, "augmentations": pipelines})
    assert nested == (crop.mean, crop.std)
    assert channel_statistics({"dataset": dataset, "augmentations": pipelines}) == nested


def test_of_other_projects():
    timm = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 224, 224]}
    assert channel_statistics({"pretrained_cfg": timm}) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for config in ({}, {"arch": "vit_small"}, {"augmentations": "none"}, {"augmentations": [1]}):
        assert channel_statistics(config) == IMAGENET


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5]}, r"mean=\[0.5\] of the stored config must be three numbers"),
        ({"std": "abc"}, "std='abc' of the stored config must be three numbers"),
        ({"std": [1, 0, 1]}, "std=.* must be positive"),
    ],
)
def test_nonsense_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        channel_statistics({"augmentations": [change]})
