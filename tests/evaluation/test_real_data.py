"""Real handwritten digits (they come with scikit-learn), from files to numbers, beside scikit-learn."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F
from torchvision.transforms.functional import normalize, to_tensor

from dinovmf_plugin.evaluation.runner import evaluate

TRAIN, VAL = 30, 15  # per class


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folders of 32-pixel digits, and pixel features and labels of both computed by hand."""
    images, labels = load_digits(return_X_y=True)
    root = tmp_path_factory.mktemp("digits")
    found = {}
    for name, first, last in (("train", 0, TRAIN), ("val", TRAIN, TRAIN + VAL)):
        features = []
        for digit in range(10):
            (root / name / str(digit)).mkdir(parents=True)
            for i, row in enumerate(np.flatnonzero(labels == digit)[first:last]):
                gray = Image.fromarray((images[row].reshape(8, 8) * 15.9).astype(np.uint8))
                picture = gray.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
                picture.save(root / name / str(digit) / f"{i:02}.png")
                tensor = normalize(to_tensor(picture), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
                features.append(F.interpolate(tensor[None], (32, 32), mode="bilinear").flatten())
        found[name] = torch.stack(features).numpy(), np.repeat(np.arange(10), last - first)
    return root, found


def test_all_evaluations_of_real_digits(digits, compose, tmp_path):
    root, by_hand = digits
    sections = ("knn", "linear", "few_shot", "transfer")
    overrides = [f"{name}.{key}=32" for name in sections for key in ("resize", "crop_size")]
    overrides += ["checkpoint=pixels", f"output_dir={tmp_path}", "data.num_workers=0"]
    overrides += [f"data.train_path={root / 'train'}", f"data.val_path={root / 'val'}"]
    overrides += [
        "knn.ks=[10]",
        "transfer.num_values=3",
        "transfer.log10_min=1",
        "progress=false",
        "device=cpu",
    ]
    overrides += [
        "linear.augment=false",
        "linear.batch_size=50",
        "linear.epochs=10",
        "linear.lrs=[0.001,0.003]",
    ]
    results = evaluate(compose("evaluate", *overrides))
    (x, y), (x_val, y_val) = by_hand["train"], by_hand["val"]

    neighbors = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(x, y)
    expected = 100 * neighbors.score(x_val, y_val)
    assert results["knn"]["k10"]["top1"] == pytest.approx(expected)
    assert expected > 80

    transfer = results["transfer"]["datasets"]["data"]
    reference = LogisticRegression(C=1 / transfer["weight_decay"], tol=1e-6, max_iter=10_000)
    expected = 100 * reference.fit(x, y).score(x_val, y_val)
    assert transfer["top1"] == pytest.approx(expected, abs=100 / len(y_val))  # one image
    assert transfer["top1"] == pytest.approx(transfer["mean_per_class"])  # equal classes
    assert expected > 80

    few = results["few_shot"]["top1"]
    assert 30 < few["1 per class"]["mean"] < few["5 per class"]["mean"] < 100
    assert results["linear"]["features"]["output"]["best"]["top1"] > 80
