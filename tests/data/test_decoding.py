"""One picture from every reader, whatever the file: against levels written down here."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinovmf_plugin.data.decoding import UnreadableImageError, decodable, open_image, to_rgb
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.unreadable import find_unreadable

SIDE = 32
RAMP = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
UPPER = (RAMP // 256).astype(np.uint8)  # the levels that every deep file of the ramp stands for
RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def tiff(samples: bytes, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A gray TIFF of the ramp's size, little-endian, one strip."""
    entries = [
        (256, SIDE),
        (257, SIDE),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, SIDE),
        (279, len(samples)),
        (339, sample_format),
    ]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II" + struct.pack("<HI", 42, 8 + len(samples))
    return head + samples + struct.pack("<H", len(entries)) + fields + bytes(4)


def png(color_type: int, pixels: np.ndarray) -> bytes:
    """A 16-bit PNG of ``(side, side)`` or ``(side, side, channels)`` uint16."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def packed12() -> bytes:
    high, low = ((RAMP >> 4).reshape(-1, 2)[:, n].astype(int) for n in (0, 1))
    three = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1)
    return three.astype(np.uint8).tobytes()


def netpbm(magic: bytes, largest: int, pixels: np.ndarray) -> bytes:
    return b"%s %d %d %d\n" % (magic, SIDE, SIDE, largest) + pixels.astype(">u2").tobytes()


RGB16 = np.stack([RAMP, RAMP[::-1], 65535 - RAMP], axis=-1)

DEEP: dict[str, bytes] = {
    "16.pgm": netpbm(b"P5", 65535, RAMP),
    "16.png": png(0, RAMP),
    "alpha16.png": png(4, np.stack([RAMP, RAMP[::-1]], axis=-1)),
    "12.tif": tiff(packed12(), 12),
    "16.tif": tiff(RAMP.astype("<u2").tobytes(), 16),
    "white.tif": tiff((65535 - RAMP).astype("<u2").tobytes(), 16, photometric=0),
}
FOREIGN = {
    "gif.png": ("GIF", "P"),
    "avif.jpg": ("AVIF", "RGB"),
    "ico.png": ("ICO", "RGB"),
    "tga.bmp": ("TGA", "RGB"),
    "cmyk.jpg": ("JPEG", "CMYK"),
    "gray.jpg": ("JPEG", "L"),
    "ycc.tif": ("TIFF", "YCbCr"),
    "la.tif": ("TIFF", "LA"),
    "one.tif": ("TIFF", "1"),
    "palette.tif": ("TIFF", "P"),
    "jp2.png": ("JPEG2000", "LA"),
    "rgb.webp": ("WEBP", "RGB"),
    "rgba.png": ("PNG", "RGBA"),
    "palette.png": ("PNG", "P"),
    "palette.bmp": ("BMP", "P"),
}
LEVELLESS: dict[str, bytes] = {
    "int32.tif": tiff(RAMP.astype("<i4").tobytes(), 32, 2),
    "uint32.tif": tiff(RAMP.astype("<u4").tobytes(), 32, 1),
    "float.tif": tiff((RAMP / 65535).astype("<f4").tobytes(), 32, 3),
    "int16.tif": tiff(RAMP.astype("<i2").tobytes(), 16, 2),
    "int8.tif": tiff(UPPER.tobytes(), 8, 2),
    "float.pgm": b"Pf\n%d %d\n-1.0\n" % (SIDE, SIDE) + RAMP.astype("<f4").tobytes(),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with every file that has a right picture."""
    root = tmp_path_factory.mktemp("files")
    (root / "c").mkdir()
    for name, data in DEEP.items():
        (root / "c" / name).write_bytes(data)
    (root / "c" / "rgb16.png").write_bytes(png(2, RGB16))
    (root / "c" / "rgb16.ppm").write_bytes(netpbm(b"P6", 65535, RGB16))
    (root / "c" / "12.pgm").write_bytes(netpbm(b"P5", 4095, RAMP >> 4))
    (root / "c" / "100.pgm").write_bytes(
        b"P5 %d %d 100\n" % (SIDE, SIDE) + (RAMP // 656).astype(np.uint8).tobytes()
    )
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    picture = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for name, (kind, mode) in FOREIGN.items():
        image = picture.convert("L").convert("LA") if mode == "LA" else picture.convert(mode)
        image.save(root / "c" / name, kind)
    return root


@pytest.mark.parametrize("name", DEEP)
def test_deep_gray__upper_eight_bits(files: Path, name: str) -> None:
    levels = np.asarray(open_image(files / "c" / name))
    np.testing.assert_array_equal(levels, np.repeat(UPPER[..., None], 3, axis=-1))


def test_twelve_bit_pgm__within_a_level(files: Path) -> None:
    levels = np.asarray(open_image(files / "c" / "12.pgm")).astype(int)
    assert abs(levels - UPPER[..., None]).max() <= 1  # PIL scales by 65535 / 4095, not by 16


def test_deep_color__upper_eight_bits(files: Path) -> None:
    np.testing.assert_array_equal(np.asarray(open_image(files / "c/rgb16.png")), RGB16 // 256)
    rounded = np.asarray(open_image(files / "c/rgb16.ppm")).astype(int)  # by PIL, to the nearest
    assert abs(rounded - RGB16 / 257).max() <= 0.5


@pytest.mark.parametrize("check", ["fast", "full"])
def test_no_levels__named_before_training(tmp_path: Path, check: str) -> None:
    paths = []
    for name, data in LEVELLESS.items():
        (tmp_path / name).write_bytes(data)
        paths.append(str(tmp_path / name))
    found = find_unreadable(paths, check=check)
    assert len(found) == len(LEVELLESS)
    for problem in found.values():
        assert "which have no agreed black and white" in problem
    for path in paths:
        for read in (open_image, decodable):
            with pytest.raises(UnreadableImageError, match=f"cannot read the image '{path}': its"):
                read(path)


def test_twelve_bit_jpeg__named_before_training(files: Path, tmp_path: Path) -> None:
    data = bytearray((files / "c" / "gray.jpg").read_bytes())
    frame = data.index(b"\xff\xc0")
    assert data[frame + 4] == 8
    data[frame + 4] = 12  # bits per sample
    (tmp_path / "deep.jpg").write_bytes(bytes(data))
    assert list(find_unreadable([str(tmp_path / "deep.jpg")])) == [0]


def test_to_rgb__images_without_a_file() -> None:
    assert np.asarray(to_rgb(Image.fromarray(RAMP)))[..., 0].tolist() == UPPER.tolist()
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="no agreed black and white"):
            to_rgb(Image.fromarray(RAMP.astype(kind)))


def test_decodable__only_files_that_all_decode_alike_stay(files: Path) -> None:
    kept = []
    for path in sorted((files / "c").iterdir()):
        data, height, width = decodable(path)
        assert (height, width) == (SIDE, SIDE)
        if data == path.read_bytes():
            kept.append(path.name)
        else:
            again = Image.open(io.BytesIO(data))
            np.testing.assert_array_equal(np.asarray(again), np.asarray(open_image(path)))
    assert kept == ["gray.jpg", "palette.png", "rgba.png"]


def _check_dali(root: Path, device: str, tolerance: float) -> None:
    dali: Any = pytest.importorskip("dinovmf_plugin.data.dali.loaders")
    images = list_images(root)
    assert not find_unreadable([images.path(i) for i in range(len(images))])
    crop = CenterCrop(SIDE, SIDE, "bilinear", *RAW)
    (mine,) = evaluation_loader(images, transform=crop, batch_size=len(images), num_workers=0)
    loader = dali.DALIEvaluationLoader(
        images, transform=crop, batch_size=len(images), device=device
    )
    (theirs,) = loader
    for i in range(len(images)):
        difference = float((mine[0][i] - theirs[0][i].cpu()).abs().max()) * 255
        assert difference <= tolerance, images.path(i)
    assert torch.equal(mine[1], theirs[1].cpu())


def test_dali__the_picture_of_torchvisions_loader(files: Path) -> None:
    _check_dali(files, "cpu", 0.01)


@pytest.mark.gpu
def test_gpu__dali__the_picture_of_torchvisions_loader(files: Path) -> None:
    _check_dali(files, "gpu", 3.0)  # JPEG by another decoder


def test_dali__a_file_that_only_it_refuses_is_named(files: Path, tmp_path: Path) -> None:
    """A bad checksum within a PNG: PIL decodes the picture all the same."""
    dali: Any = pytest.importorskip("dinovmf_plugin.data.dali.loaders")
    root = tmp_path / "c"
    root.mkdir()
    data = bytearray((files / "c" / "rgba.png").read_bytes())
    (root / "good.png").write_bytes(bytes(data))
    end = data.index(b"IEND") - 4
    data[end - 1] ^= 0xFF  # the last byte of the checksum before it
    (root / "bad.png").write_bytes(bytes(data))
    images = list_images(tmp_path)
    assert open_image(root / "bad.png").size == (SIDE, SIDE)
    assert list(find_unreadable([images.path(i) for i in range(2)], check="full")) == [0]
    loader = dali.DALIEvaluationLoader(images, transform=CenterCrop(16, 16), device="cpu")
    with pytest.raises(UnreadableImageError, match=r"cannot read the image '.*bad\.png'"):
        list(loader)
