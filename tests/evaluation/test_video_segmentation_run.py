"""Video segmentation from a DAVIS folder and a checkpoint to masks, scores and pictures."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageSequence
from timm.models import VisionTransformer

from dinovmf_plugin.evaluation import davis, video_run
from dinovmf_plugin.evaluation.synthetic_video import moving_objects, write_moving_objects
from dinovmf_plugin.evaluation.video_figures import overlay, save_animation
from dinovmf_plugin.evaluation.video_report import format_table
from dinovmf_plugin.evaluation.video_run import VideoSettings, evaluate_video_segmentation
from dinovmf_plugin.evaluation.video_segmentation import score_sequence, summarize_objects

SIZE = (64, 130)
FRAMES = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0
    )
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos") / "DAVIS"
    write_moving_objects(root, sequences=2, frames=FRAMES, size=SIZE, seed=1)
    return root


@pytest.fixture
def data(tmp_path, source):
    return shutil.copytree(source, tmp_path / "DAVIS")


def settings(data, weights, out, **changes):
    given = {"checkpoint": str(weights), "data_path": str(data), "output_dir": str(out)}
    given |= {"size": 64, "device": "cpu", "animation": None, "contact_sheet": False}
    return VideoSettings(**(given | changes))


def annotation(data, frame=0, name="moving-00"):
    return data / "Annotations" / "480p" / name / f"{frame:05d}.png"


def test_evaluate__masks_scores_tables_and_pictures(tmp_path, source, checkpoint):
    out = tmp_path / "out"
    given = settings(source, checkpoint, out, animation="webp", contact_sheet=True)
    results = evaluate_video_segmentation(given)
    written = json.loads((out / "results.json").read_text())
    assert written["scores"] == results["scores"]
    assert written["settings"]["size"] == 64
    assert written["versions"]["torch"] == torch.__version__
    assert all(seconds > 0 for seconds in written["seconds_per_frame"].values())
    objects, still = [], []
    for name in ("moving-00", "moving-01"):
        masks = []
        for frame in range(FRAMES):
            with Image.open(out / "masks" / name / f"{frame:05d}.png") as image:
                assert image.mode == "P"
                assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
                masks.append(np.asarray(image))
        truth = [np.asarray(Image.open(annotation(source, t, name))) for t in range(FRAMES)]
        assert masks[0].shape == SIZE
        assert (masks[0] == truth[0]).all()
        objects += score_sequence(masks, truth).values()
        still += score_sequence([truth[0]] * FRAMES, truth).values()
        with Image.open(out / "contact_sheets" / f"{name}.png") as sheet:
            assert sheet.width == 6 * 244 + 4
        with Image.open(out / "animations" / f"{name}.webp") as animation:
            assert sum(1 for _ in ImageSequence.Iterator(animation)) == FRAMES
            assert animation.width == 2 * 427 + 4
    assert results["scores"] == pytest.approx(summarize_objects(objects))
    assert results["copy_first_mask"] == pytest.approx(summarize_objects(still))
    with open(out / "per_sequence.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Sequence", "J-Mean", "F-Mean"]
    assert [row[0] for row in rows[1:]] == [
        "moving-00_1",
        "moving-00_2",
        "moving-01_1",
        "moving-01_2",
    ]
    assert float(rows[1][1]) == pytest.approx(objects[0]["J"]["mean"], abs=1e-6)
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "http" not in page  # self-contained
    assert f"<td>{100 * results['scores']['F-Recall']:.1f}</td>" in page
    table = format_table(results).splitlines()
    assert table[3].split()[:2] == ["all", "4"]
    assert float(table[3].split()[2]) == pytest.approx(100 * results["scores"]["J-Mean"], abs=0.06)


def test_evaluate__an_untrained_backbone_beats_copying_the_first_mask(tmp_path, checkpoint):
    """Even random patch features follow texture; a still mask loses whatever moves."""
    write_moving_objects(tmp_path / "DAVIS", sequences=2, frames=14, size=(128, 200), seed=1)
    given = settings(tmp_path / "DAVIS", checkpoint, tmp_path / "out", size=128)
    results = evaluate_video_segmentation(given)
    assert results["scores"]["J-Mean"] > results["copy_first_mask"]["J-Mean"] + 0.15
    assert results["scores"]["J&F-Mean"] > results["copy_first_mask"]["J&F-Mean"] + 0.15


def test_resume__finished_sequences_are_not_computed_again(
    tmp_path, source, checkpoint, monkeypatch
):
    out, done = tmp_path / "out", []
    real = video_run.segment_sequence

    def counting(vit, sequence, *rest):
        done.append(sequence.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(vit, sequence, *rest)

    monkeypatch.setattr(video_run, "segment_sequence", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_video_segmentation(settings(source, checkpoint, out))
    assert not (out / "results.json").exists()
    before = (out / "scores" / "moving-00.json").stat().st_mtime_ns
    results = evaluate_video_segmentation(settings(source, checkpoint, out))
    assert done == ["moving-00", "moving-01", "moving-01"]
    assert results["computed_sequences"] == ["moving-01"]
    assert (out / "scores" / "moving-00.json").stat().st_mtime_ns == before
    fresh = evaluate_video_segmentation(settings(source, checkpoint, tmp_path / "fresh"))
    assert fresh["scores"] == results["scores"]
    # a lost mask makes its sequence unfinished; pictures asked for later need no new masks
    (out / "masks" / "moving-00" / "00003.png").unlink()
    again = evaluate_video_segmentation(settings(source, checkpoint, out, contact_sheet=True))
    assert again["computed_sequences"] == ["moving-00"]
    assert again["scores"] == fresh["scores"]
    assert len(list((out / "contact_sheets").iterdir())) == 2
    one = evaluate_video_segmentation(settings(source, checkpoint, out, sequences=["moving-01"]))
    assert list(one["sequences"]) == ["moving-01"]
    assert one["computed_sequences"] == []


def test_resume__other_settings_or_weights_are_refused(tmp_path, source, checkpoint):
    out = tmp_path / "out"
    evaluate_video_segmentation(settings(source, checkpoint, out, sequences=["moving-00"]))
    with pytest.raises(ValueError, match="topk was 5, is now 3"):
        evaluate_video_segmentation(settings(source, checkpoint, out, topk=3))
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: value + 0.01 for name, value in state.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="network was .sha256"):
        evaluate_video_segmentation(settings(source, tmp_path / "other.pth", out))


def break_frame(data):
    path = data / "JPEGImages" / "480p" / "moving-00" / "00002.jpg"
    Image.open(path).resize((10, 10)).save(path)


def break_annotation(mode, value):
    def change(data):
        labels = np.full(SIZE, value, dtype={"L": np.uint8, "I;16": np.uint16}[mode])
        Image.fromarray(labels).save(annotation(data))

    return change


def many_objects(data):
    labels = np.zeros(SIZE, dtype=np.uint16)
    labels.ravel()[:300] = np.arange(1, 301)
    Image.fromarray(labels).save(annotation(data))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda d: annotation(d, 3).unlink(),
            FileNotFoundError,
            r"sequence moving-00: annotation .*00003.png is missing \(1 of 7 are\)",
        ),
        (break_frame, ValueError, "00002.jpg is 10 x 10 pixels, but the first frame is 130 x 64"),
        (
            lambda d: Image.new("L", (64, 130), 1).save(annotation(d, 2)),
            ValueError,
            "00002.png is 64 x 130 pixels, but the first frame is 130 x 64",
        ),
        (many_objects, ValueError, r"has 300 objects \(numbers up to 300\): more than 255 do not"),
        (break_annotation("L", 0), ValueError, "00000.png shows no object$"),
        (break_annotation("L", 255), ValueError, "shows no object .255 is void; a DAVIS-2016 mask"),
        (
            lambda d: Image.new("RGB", SIZE[::-1]).save(annotation(d)),
            ValueError,
            "is a RGB image: object numbers are needed",
        ),
        (
            lambda d: annotation(d).write_text("no image"),
            ValueError,
            "00000.png cannot be read as an image",
        ),
        (
            lambda d: shutil.rmtree(d / "JPEGImages" / "480p" / "moving-01"),
            FileNotFoundError,
            "sequence moving-01: there is no folder",
        ),
        (
            lambda d: [p.unlink() for p in sorted((d / "JPEGImages/480p/moving-01").iterdir())[2:]],
            ValueError,
            "has 2 .jpg frames, at least 3 are needed",
        ),
        (
            lambda d: (d / "ImageSets" / "2017" / "val.txt").unlink(),
            FileNotFoundError,
            "val.txt: data_path must be DAVIS's own folder",
        ),
        (
            lambda d: (d / "ImageSets" / "2017" / "val.txt").write_text("\n"),
            ValueError,
            "names no sequence",
        ),
        (
            lambda d: (d / "ImageSets" / "2017" / "val.txt").write_text("../elsewhere\n"),
            ValueError,
            "not a plain sequence name",
        ),
        (shutil.rmtree, FileNotFoundError, "data_path=.* is not a folder"),
    ],
)
def test_bad_data__one_sentence_before_any_work(tmp_path, data, checkpoint, change, error, message):
    change(data)
    with pytest.raises(error, match=message):
        evaluate_video_segmentation(settings(data, checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output_dir": None}, ValueError, "output_dir=None must be set to a path"),
        ({"checkpoint": "none.pth"}, FileNotFoundError, "no checkpoint file none.pth"),
        ({"which": "ema"}, ValueError, "which='ema' must be teacher or student"),
        ({"size": 32}, ValueError, "size=32 must be at least 64"),
        ({"topk": 0}, ValueError, "topk=0 must be at least 1"),
        ({"radius": -1}, ValueError, "radius=-1 must be at least 0"),
        ({"temperature": 0}, ValueError, "temperature=0 must be above 0"),
        ({"animation": "mp4"}, ValueError, "animation='mp4' must be webp, gif or null"),
        ({"sequences": ["cat"]}, ValueError, "sequence 'cat' is not in ImageSets/2017/val.txt"),
        ({"split": "test"}, FileNotFoundError, "there is no .*test.txt"),
    ],
)
def test_bad_settings__one_sentence(tmp_path, source, checkpoint, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate_video_segmentation(settings(source, checkpoint, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_pixels__are_no_patch_features(tmp_path, source):
    with pytest.raises(ValueError, match="checkpoint=pixels has no patch tokens"):
        evaluate_video_segmentation(settings(source, "pixels", tmp_path / "out"))


def test_script__from_any_folder_and_bad_input_ends_in_one_sentence(
    tmp_path, source, checkpoint, monkeypatch, capsys
):
    script = str(Path(__file__).resolve().parents[2] / "scripts" / "video_segmentation.py")
    given = [f"checkpoint={checkpoint}", f"data_path={source}", "size=64", "output_dir=out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *given, "sequences=[moving-01]", "animation=gif"])
    runpy.run_path(script, run_name="__main__")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert format_table(results) in capsys.readouterr().out
    assert (tmp_path / "out" / "animations" / "moving-01.gif").is_file()
    monkeypatch.setattr(sys, "argv", [script, *given, "sequences=[cat]"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    assert "error: sequence 'cat' is not in ImageSets/2017/val.txt\n" in capsys.readouterr().err


def test_config__names_every_setting_with_its_default():
    path = Path(__file__).resolve().parents[2] / "configs" / "video_segmentation.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    del config["defaults"], config["hydra"]
    assert config == asdict(VideoSettings(checkpoint=None, data_path=None, output_dir=None))


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation .*a.png is missing"):
        davis.read_annotation(tmp_path / "a.png")
    with pytest.raises(ValueError, match="labels reach from 0 to 256"):
        davis.write_annotation(tmp_path / "a.png", np.array([[0, 256]]))


def test_palette__is_pillows_reading_of_the_voc_formula(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    davis.write_annotation(tmp_path / "all.png", labels)
    assert (davis.read_annotation(tmp_path / "all.png") == labels).all()
    with Image.open(tmp_path / "all.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(256, 3)
    assert len(np.unique(colours, axis=0)) == 256
    for label in range(256):
        bits = [label >> place & 1 for place in range(8)]
        for channel in range(3):
            own = bits[channel::3]  # lowest first; the lowest is the strongest
            assert colours[label, channel] == sum(bit << (7 - i) for i, bit in enumerate(own))


def test_frame__size_and_normalisation(tmp_path):
    assert davis.frame_size(480, 854, 480, (8, 8)) == (480, 832)
    assert davis.frame_size(854, 480, 480, (16, 16)) == (832, 480)
    assert davis.frame_size(480, 480, 480, (16, 16)) == (480, 448)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    frame = davis.read_frame(tmp_path / "frame.png", (64, 128))
    levels = frame * torch.tensor([0.228, 0.224, 0.225])[:, None, None]
    levels = (levels + torch.tensor([0.485, 0.456, 0.406])[:, None, None]).permute(1, 2, 0) * 255
    # bilinear without antialiasing by hand: pixel centres, two neighbours, rounded
    where = (np.arange(128) + 0.5) * 130 / 128 - 0.5
    left = np.floor(where).astype(int).clip(0, 128)
    share = (where - left)[None, :, None]
    expected = (pixels[:, left] * (1 - share) + pixels[:, left + 1] * share).round()
    np.testing.assert_allclose(
        levels.numpy(), expected, atol=1.01e-0
    )  # halves may round either way
    assert np.mean(np.abs(levels.numpy() - expected) > 0.01) < 0.01
    assert levels.numpy() == pytest.approx(levels.numpy().round(), abs=1e-3)


def test_shrink_annotation__nearest_and_void_is_background():
    labels = np.zeros((8, 8), np.uint8)
    labels[:4, :4], labels[4:, 4:] = 3, 255
    assert davis.shrink_annotation(labels, (2, 2)).tolist() == [[3, 0], [0, 0]]


def test_overlay__tints_objects_only():
    frame = Image.new("RGB", (6, 4), (100, 100, 100))
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 3:] = 1
    labels[0, 0] = 255
    tinted = np.asarray(overlay(frame, labels))
    assert (tinted[:, :2] == 100).all()
    assert (tinted[:, 2] == 255).all()  # outline
    assert (tinted[:, 3:] == [114, 50, 50]).all()


def test_animation__gif_and_unknown(tmp_path, source):
    truth = [np.asarray(Image.open(annotation(source, t))) for t in range(3)]
    frames = [source / "JPEGImages" / "480p" / "moving-00" / f"{t:05d}.jpg" for t in range(3)]
    save_animation(tmp_path / "a.gif", frames, truth, truth, width=80)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 3
    with pytest.raises(ValueError, match="must end in .webp or .gif"):
        save_animation(tmp_path / "a.mp4", frames, truth, truth)


def test_moving_objects__seeded_and_moving(tmp_path):
    frames, masks = moving_objects(frames=5, size=(64, 100), objects=3, seed=2)
    again, _ = moving_objects(frames=5, size=(64, 100), objects=3, seed=2)
    assert all((a == b).all() for a, b in zip(frames, again, strict=True))
    assert {1, 2, 3} <= set(np.unique(masks[0]).tolist())
    assert (masks[0] != masks[4]).any()
    with pytest.raises(ValueError, match="objects=9 1 to 8"):
        moving_objects(objects=9)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_moving_objects(tmp_path)
