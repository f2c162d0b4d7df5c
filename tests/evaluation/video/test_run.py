"""Video segmentation from a DAVIS folder and a checkpoint to masks, scores and pictures."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from timm.models import VisionTransformer

from dinovmf_plugin.evaluation.video import davis
from dinovmf_plugin.evaluation.video import run as video_run
from dinovmf_plugin.evaluation.video.figures import save_animation
from dinovmf_plugin.evaluation.video.page import format_table
from dinovmf_plugin.evaluation.video.run import evaluate_video_segmentation
from dinovmf_plugin.evaluation.video.scores import score_sequence, summarize_objects
from dinovmf_plugin.evaluation.video.settings import VideoSettings
from dinovmf_plugin.runs.settings import read
from tests.evaluation.video.synthetic_video import write_moving_objects

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
    return read(VideoSettings, given | changes)


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
        ({"size": 32}, ValueError, "size=32 must be a whole number of at least 64"),
        ({"topk": 0}, ValueError, "topk=0 must be a whole number of at least 1"),
        ({"radius": -1}, ValueError, "radius=-1 must be a whole number of at least 0"),
        ({"temperature": 0}, ValueError, "temperature=0 must be a number above 0"),
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
    with pytest.raises(ValueError, match="checkpoint=pixels 32x32 has no patch tokens"):
        evaluate_video_segmentation(settings(source, "pixels", tmp_path / "out"))


def test_script__from_any_folder_and_bad_input_ends_in_one_sentence(
    tmp_path, source, checkpoint, monkeypatch, capsys
):
    script = str(Path(__file__).resolve().parents[3] / "scripts" / "video_segmentation.py")
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


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation .*a.png is missing"):
        davis.read_annotation(tmp_path / "a.png")
    with pytest.raises(ValueError, match="labels reach from 0 to 256"):
        davis.write_annotation(tmp_path / "a.png", np.array([[0, 256]]))


def test_animation__gif_and_unknown(tmp_path, source):
    truth = [np.asarray(Image.open(annotation(source, t))) for t in range(3)]
    frames = [source / "JPEGImages" / "480p" / "moving-00" / f"{t:05d}.jpg" for t in range(3)]
    save_animation(tmp_path / "a.gif", frames, truth, truth, width=80)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 3
    with pytest.raises(ValueError, match="must end in .webp or .gif"):
        save_animation(tmp_path / "a.mp4", frames, truth, truth)


def test_another_frame_under_the_same_name__is_computed_again(tmp_path, data, checkpoint):
    given = settings(data, checkpoint, tmp_path / "out", contact_sheet=True)
    first = evaluate_video_segmentation(given)
    sheets = tmp_path / "out" / "contact_sheets"
    before = {path.name: path.read_bytes() for path in sheets.iterdir()}
    assert evaluate_video_segmentation(given)["computed_sequences"] == []
    for frame in (data / "JPEGImages" / "480p" / "moving-01").iterdir():
        with Image.open(frame) as image:
            Image.fromarray(np.random.default_rng(0).permutation(np.asarray(image))).save(frame)
    again = evaluate_video_segmentation(given)
    assert again["computed_sequences"] == ["moving-01"]
    fresh = evaluate_video_segmentation(settings(data, checkpoint, tmp_path / "fresh"))
    assert again["scores"] == pytest.approx(fresh["scores"])
    assert again["scores"] != first["scores"]
    changed = {path.name for path in sheets.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"moving-01.png"}
    os.utime(annotation(data), ns=(0, 0))
    assert evaluate_video_segmentation(given)["computed_sequences"] == ["moving-00"]


def test_frames_with_capital_suffixes__are_frames(tmp_path, data, checkpoint):
    plain = evaluate_video_segmentation(settings(data, checkpoint, tmp_path / "a"))
    for path in sorted(data.rglob("*.jpg")) + sorted(data.rglob("*.png")):
        path.rename(path.with_suffix(path.suffix.upper()))
    capital = evaluate_video_segmentation(settings(data, checkpoint, tmp_path / "b"))
    assert capital["scores"] == plain["scores"]
    frame = data / "JPEGImages" / "480p" / "moving-00" / "00000.JPG"
    shutil.copy(frame, frame.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"00000\.JPG is there twice, under two suffixes"):
        evaluate_video_segmentation(settings(data, checkpoint, tmp_path / "c"))
