"""Few-shot and transfer regressions from images to numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dinovmf_plugin.evaluation.logistic.datasets import MEAN_PER_CLASS, load_transfer_dataset
from dinovmf_plugin.evaluation.logistic.few_shot import few_shot_over_splits
from dinovmf_plugin.evaluation.logistic.settings import FewShotSettings, TransferSettings
from dinovmf_plugin.evaluation.logistic.splits import draw_splits, match_listed, msn_split_files
from dinovmf_plugin.evaluation.logistic.transfer import check_folds, cross_validated_accuracy
from dinovmf_plugin.evaluation.settings import EvaluationSettings
from dinovmf_plugin.evaluation.workbench import Images, Run, Workbench, solve_alone
from dinovmf_plugin.features.images import ImageSet, describe
from dinovmf_plugin.report.paper import TABLE_5

__all__ = ["prepare_few_shot", "prepare_transfer", "transfer_averages"]


def _reader(
    bench: Workbench, settings: FewShotSettings | TransferSettings, run: EvaluationSettings
) -> tuple[Callable[[ImageSet], tuple[Tensor, Tensor]], dict[str, Any]]:
    """What gives the features and labels of a set, and how the features are made, for the results."""
    crop = bench.transform(settings)

    def read(images: ImageSet) -> tuple[Tensor, Tensor]:
        features, labels = bench.features(images, {"feature": settings.feature}, crop)
        return features["feature"], labels

    return read, {
        "feature": bench.describe_feature(settings.feature),
        "transform": describe(crop, run.data.format),
    }


def _few_shot_splits(
    settings: FewShotSettings, train: ImageSet, seed: int
) -> dict[str, list[np.ndarray[Any, Any]]]:
    if settings.split_dir is not None:
        files = msn_split_files(
            settings.split_dir, settings.counts, settings.fraction, settings.num_splits
        )
        return match_listed(files, [train.path(i) for i in range(len(train))])
    smallest = int(train.labels.bincount().min())
    counts = [n for n in settings.counts if n <= smallest]
    if not counts and settings.fraction is None:
        raise ValueError(
            f"few_shot.counts={list(settings.counts)}: the smallest class of data.train_path has only "
            f"{smallest} images"
        )
    return draw_splits(train.labels.numpy(), counts, settings.fraction, settings.num_splits, seed)


def prepare_few_shot(settings: FewShotSettings, images: Images, run: EvaluationSettings) -> Run:
    """Draw or read the splits; counts that the smallest class cannot serve are recorded as skipped."""
    train = images.train
    splits = _few_shot_splits(settings, train, run.seed)
    rows = np.unique(np.concatenate([row for group in splits.values() for row in group]))
    within = {
        name: [np.searchsorted(rows, split).tolist() for split in group]
        for name, group in splits.items()
    }
    skipped = [n for n in settings.counts if f"{n} per class" not in splits]
    if skipped:
        warnings.warn(
            f"few_shot.counts: {skipped} are skipped, the smallest class has fewer images",
            stacklevel=2,
        )

    def few_shot(bench: Workbench) -> dict[str, Any]:
        read, told = _reader(bench, settings, run)
        # only the images that a split names go through the network
        features, labels = read(train.subset(rows.tolist(), "few-shot"))
        val, val_labels = read(images.val)
        found = solve_alone(
            bench,
            lambda: few_shot_over_splits(
                features,
                labels,
                within,
                val,
                val_labels,
                lambd=settings.lambd,
                preprocess=settings.preprocess,
                tol=settings.tol,
                max_iter=settings.max_iter,
                progress=bench.progress,
            ),
        )
        return {
            "top1": found,
            "skipped_counts": skipped,
            "splits": settings.split_dir or f"drawn, seed {run.seed}",
            **told,
            "val_images": len(val_labels),
        }

    return few_shot


@dataclass(frozen=True)
class _Pair:
    name: str
    train: ImageSet
    test: ImageSet


def _pairs(settings: TransferSettings, images: Images) -> list[_Pair]:
    if settings.root is None:
        return [_Pair("data", images.train, images.val)]
    names: Sequence[str] = TABLE_5 if settings.datasets is None else settings.datasets
    return [_Pair(name, *load_transfer_dataset(name, settings.root)) for name in names]


def transfer_averages(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Plain means over the data sets: of each metric, and of the one Ericsson et al. use per set.

    Example:
        >>> one = {"top1": 80.0, "mean_per_class": 70.0}
        >>> transfer_averages({"pets": one, "cifar10": one})["protocol_metric"]
        75.0
    """
    own = [
        result["mean_per_class" if name in MEAN_PER_CLASS else "top1"]
        for name, result in results.items()
    ]
    return {
        "top1": float(np.mean([result["top1"] for result in results.values()])),
        "mean_per_class": float(np.mean([r["mean_per_class"] for r in results.values()])),
        "protocol_metric": float(np.mean(own)),
    }


def prepare_transfer(settings: TransferSettings, images: Images, run: EvaluationSettings) -> Run:
    """List every data set and check the folds of each."""
    pairs = _pairs(settings, images)
    for pair in pairs:
        check_folds(pair.train.labels, settings.folds, f"transfer {pair.name}")

    def transfer(bench: Workbench) -> dict[str, Any]:
        read, told = _reader(bench, settings, run)
        results: dict[str, Any] = {}
        for pair in pairs:
            train, labels = read(pair.train)
            test, test_labels = read(pair.test)
            results[pair.name] = solve_alone(
                bench,
                lambda train=train, labels=labels, test=test, test_labels=test_labels, pair=pair: (  # type: ignore[misc]
                    cross_validated_accuracy(
                        train,
                        labels,
                        test,
                        test_labels,
                        weight_decays=settings.weight_decays,
                        folds=settings.folds,
                        select=settings.select,
                        seed=run.seed,
                        tol=settings.tol,
                        max_iter=settings.max_iter,
                        n_jobs=settings.n_jobs,
                        progress=bench.progress,
                        name=pair.name,
                    )
                ),
            )
        return {"datasets": results, "average": transfer_averages(results), **told}

    return transfer
