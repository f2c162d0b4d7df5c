from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinovmf_plugin.data.decoding import open_image
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.unreadable import (
    UnreadableImageError,
    find_unreadable,
    refuse_or_drop,
)


@pytest.fixture
def mixed(tmp_path: Path, picture: Any) -> Path:
    """Good files of every format and the ways in which files are bad."""
    root = tmp_path / "c"
    root.mkdir()
    whole = picture(0, 40, 60)
    for ending in ("jpg", "png", "webp", "bmp", "tiff", "ppm"):
        whole.save(root / f"good.{ending}")
    whole.convert("L").save(root / "gray.jpg")
    whole.convert("RGBA").save(root / "alpha.png")
    whole.convert("CMYK").save(root / "cmyk.jpg")
    jpeg, png = (root / "good.jpg").read_bytes(), (root / "good.png").read_bytes()
    (root / "trailing.jpg").write_bytes(jpeg + b"\0" * 3000)
    (root / "png-named.jpg").write_bytes(png)
    (root / "bad-empty.jpg").write_bytes(b"")
    (root / "bad-text.jpg").write_text("<html>404</html>")
    (root / "bad-truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "bad-header.jpg").write_bytes(jpeg[:100])
    (root / "bad-truncated.png").write_bytes(png[: len(png) // 2])
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    (root / "bad-bits.png").write_bytes(bytes(flipped))
    (root / "bad-truncated.webp").write_bytes((root / "good.webp").read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize("check", ["fast", "full"])
def test_finds_exactly_the_bad_ones(mixed: Path, check: str) -> None:
    paths = [str(path) for path in sorted((mixed / "c").iterdir())]
    found = {Path(paths[index]).name for index in find_unreadable(paths, check=check)}
    assert found == {Path(path).name for path in paths if "bad-" in path}


def test_one_error_names_all(mixed: Path) -> None:
    images = list_images(mixed)
    bad = find_unreadable([images.path(i) for i in range(len(images))])
    with pytest.raises(UnreadableImageError) as error:
        refuse_or_drop(images, bad)
    message = str(error.value)
    assert message.startswith("data.train_path: 7 of 18 images cannot be read: ")
    for index in bad:
        assert images.path(index) in message
    assert "data.skip_unreadable=True" in message


def test_skipped_with_what_is_left(mixed: Path) -> None:
    images = list_images(mixed)
    bad = find_unreadable([images.path(i) for i in range(len(images))])
    kept = refuse_or_drop(images, bad, skip=True)
    assert len(kept) == 11
    assert not any("bad-" in kept.path(i) for i in range(len(kept)))
    everything = dict.fromkeys(range(len(images)), "broken")
    with pytest.raises(UnreadableImageError, match="none of the 18 images in .* can be read"):
        refuse_or_drop(images, everything, skip=True)


def test_many_are_counted(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for index in range(13):
        (tmp_path / "c" / f"{index:02d}.jpg").write_bytes(b"no image")
    images = list_images(tmp_path)
    bad = find_unreadable([images.path(i) for i in range(13)])
    with pytest.raises(
        RuntimeError, match=r"13 of 13 images cannot be read: .*09\.jpg .* and 3 more\."
    ):
        refuse_or_drop(images, bad)


def test_check_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.check_images must be one of .*, got 'quick'"):
        find_unreadable([], check="quick")


def test_open_image__names_the_file(mixed: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"cannot read the image '.*bad-truncated\.jpg'"):
        open_image(mixed / "c" / "bad-truncated.jpg")
    picture = open_image(mixed / "c" / "alpha.png")
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (60, 40))


def test_open_image__sixteen_bits_are_scaled(tmp_path: Path, picture: Any) -> None:
    gray = np.asarray(picture(0, 20, 30).convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "deep.png"))[..., 0], gray)
