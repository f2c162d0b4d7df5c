from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from dinovmf_plugin.data.recipe import parse_recipe, shipped_augmentations

# Published values: crop sizes, scales, blur and solarisation of each crop.
PUBLISHED = {
    "dino_multicrop": [
        (224, 0.25, 1.0, 1.0, 0.0),
        (224, 0.25, 1.0, 0.1, 0.2),
        *[(96, 0.05, 0.25, 0.5, 0.0)] * 10,
    ],
    "dino_two_crops": [(224, 0.14, 1.0, 1.0, 0.0), (224, 0.14, 1.0, 0.1, 0.2)],
    "ibot_multicrop_vitb": [
        (224, 0.32, 1.0, 1.0, 0.0),
        (224, 0.32, 1.0, 0.1, 0.2),
        *[(96, 0.05, 0.32, 0.5, 0.0)] * 10,
    ],
    "msn": [(224, 0.3, 1.0, 0.5, 0.0)] * 2 + [(96, 0.05, 0.3, 0.5, 0.0)] * 10,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_recipe__published_values(name: str) -> None:
    recipe = parse_recipe(shipped_augmentations(name))
    found = [(c.size, *c.scale, c.blur_prob, c.solarize_prob) for c in recipe]
    assert found == PUBLISHED[name]
    msn = name == "msn"
    for crop in recipe:
        saturation = 0.4 if msn else 0.2
        assert (crop.brightness, crop.contrast, crop.saturation, crop.hue) == (
            0.4,
            0.4,
            saturation,
            0.1,
        )
        assert (crop.jitter_prob, crop.gray_prob, crop.flip_prob, crop.equalize_prob) == (
            0.8,
            0.2,
            0.5,
            0.0,
        )
        assert crop.interpolation == ("bilinear" if msn else "bicubic")


def test_demo_recipe__two_global_crops_and_smaller_local_ones() -> None:
    recipe = parse_recipe(shipped_augmentations("demo"))
    sizes = [crop.size for crop in recipe]
    assert sizes[0] == sizes[1] > max(sizes[2:])


@pytest.mark.parametrize("name", [*PUBLISHED, "demo"])
def test_shipped_recipe__hydra_group_as_in_solo_learn(name: str) -> None:
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        cfg = compose(overrides=[f"+augmentations={name}"])
    assert OmegaConf.to_container(cfg.augmentations) == shipped_augmentations(name)
    for pipeline in cfg.augmentations:  # solo-learn reads all of these without a default
        for node in ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization"):
            assert pipeline[node].prob >= 0
        assert pipeline.rrc.enabled
        assert 0 <= pipeline.horizontal_flip.prob <= 1


def test_shipped_recipe__unknown() -> None:
    with pytest.raises(
        ValueError, match="'dino_multicrops' does not exist, use one of .*dino_multicrop"
    ):
        shipped_augmentations("dino_multicrops")


def test_parse_recipe__omegaconf_and_plain_are_equal(multicrop: list[dict[str, Any]]) -> None:
    assert parse_recipe(OmegaConf.create(multicrop)) == parse_recipe(multicrop)


def test_parse_recipe__statistics_of_the_dataset(make_pipeline: Any) -> None:
    own = {**make_pipeline(), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert parse_recipe([own])[0].mean == (0.1, 0.2, 0.3)
    assert parse_recipe([own], dataset="cifar10")[0].mean == (0.4914, 0.4822, 0.4465)
    assert parse_recipe([make_pipeline()], dataset="custom")[0].std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gausian_blur": {"prob": 0.5}}, r"augmentations\[0\]\.gausian_blur is not a key"),
        (
            {"grayscale": {"p": 0.5}},
            r"augmentations\[0\]\.grayscale\.p is not a key, use \['prob'\]",
        ),
        ({"grayscale": {"prob": 1.5}}, r"grayscale\.prob must be a number from 0 to 1, got 1\.5"),
        ({"grayscale": {"prob": "a"}}, r"grayscale\.prob must be a number from 0 to 1, got 'a'"),
        ({"grayscale": 0.2}, r"grayscale must be a group of keys"),
        (
            {"color_jitter": {"prob": 0.8, "hue": 0.7}},
            r"color_jitter\.hue must be a number from 0 to 0\.5",
        ),
        ({"crop_size": 0}, r"crop_size must be a positive whole number, got 0"),
        ({"crop_size": None}, r"crop_size is missing"),
        ({"num_crops": 1.5}, r"num_crops must be a positive whole number, got 1\.5"),
        ({"rrc": None}, r"rrc is missing"),
        ({"rrc": {"enabled": True, "crop_min_scale": 0.5}}, r"rrc\.crop_max_scale is missing"),
        (
            {"rrc": {"crop_min_scale": 0.5, "crop_max_scale": 0.2}},
            r"crop_min_scale must be above 0 and at most",
        ),
        (
            {"rrc": {"crop_min_scale": 0.1, "crop_max_scale": 1.0, "interpolation": "nearest"}},
            r"rrc\.interpolation must be one of",
        ),
        ({"mean": [0.5]}, r"mean must be three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, r"std must be positive"),
    ],
)
def test_parse_recipe__names_what_is_wrong(
    make_pipeline: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe([{**make_pipeline(), **change}])


@pytest.mark.parametrize("sizes", [(224, 96, 224), (96, 224), (96, 96, 224)])
def test_parse_recipe__large_crops_not_first(make_pipeline: Any, sizes: tuple[int, ...]) -> None:
    pipelines = [{**make_pipeline(), "crop_size": size, "num_crops": 1} for size in sizes]
    with pytest.raises(
        ValueError, match="augmentations give crops of .*224.* pixels: list the large"
    ):
        parse_recipe(pipelines)


def test_parse_recipe__three_sizes(make_pipeline: Any) -> None:
    pipelines = [{**make_pipeline(), "crop_size": s, "num_crops": 1} for s in (64, 64, 32, 16, 32)]
    assert [crop.size for crop in parse_recipe(pipelines)] == [64, 64, 32, 16, 32]


@pytest.mark.parametrize("empty", [[], {}, "dino"])
def test_parse_recipe__not_a_list(empty: Any) -> None:
    with pytest.raises(ValueError, match="augmentations must be a list of at least one pipeline"):
        parse_recipe(empty)
