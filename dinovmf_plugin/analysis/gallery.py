"""Images as the mixture sorts them: components, outliers, and a table of every image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from dinovmf_plugin.analysis.measurements import Scored, component_labels
from dinovmf_plugin.mixture.model import VMFMixture
from dinovmf_plugin.report.page import Sheet, Thumbnail

__all__ = ["component_sheets", "component_table", "image_table", "ranked_sheet", "thumbnail"]


def thumbnail(image: Image.Image, size: int, *, caption: str = "", title: str = "") -> Thumbnail:
    """A square thumbnail, center-cropped, at twice the CSS size for dense screens.

    Args:
        image: the picture, RGB.
        size: side in CSS pixels.
        caption: shown below.
        title: shown on hovering.
    """
    square = ImageOps.fit(image, (2 * size, 2 * size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    square.save(buffer, format="JPEG", quality=80)
    return Thumbnail(buffer.getvalue(), size, caption, title)


def image_table(scored: Sequence[Scored]) -> dict[str, list[Any]]:
    """One row per image of every set: where it is, its component, and how typical it is.

    Returns:
        Columns ``set, path, class, component, responsibility, entropy, cosine, kappa,
        log_likelihood, typicality, outlier_rank`` (1 is the least likely image of all sets).
    """
    columns: dict[str, list[Any]] = {"set": [], "path": [], "class": []}
    for part in scored:
        columns["set"] += [part.images.name] * len(part.images)
        columns["path"] += [part.images.path(i) for i in range(len(part.images))]
        columns["class"] += [part.images.class_of(i) for i in range(len(part.images))]
    fields = {
        "component": "component",
        "responsibility": "responsibility",
        "entropy": "entropy",
        "cosine": "cosine",
        "kappa": "concentration",
        "log_likelihood": "log_likelihood",
    }
    for column, field in fields.items():
        columns[column] = torch.cat([getattr(part.scores, field) for part in scored]).tolist()
    columns["typicality"] = torch.cat([part.typicality for part in scored]).tolist()
    likelihood = torch.cat([part.scores.log_likelihood for part in scored])
    rank = torch.empty(len(likelihood), dtype=torch.int64)
    rank[likelihood.argsort(stable=True)] = torch.arange(1, len(likelihood) + 1)
    columns["outlier_rank"] = rank.tolist()
    return columns


def component_table(mixture: VMFMixture, groups: Tensor, scored: Scored) -> dict[str, list[Any]]:
    """One row per component: concentration, duplicate set, usage by the images of one set.

    Args:
        mixture: the model.
        groups: duplicate set of every component ``(K,)``.
        scored: images that are counted (the training set).

    Returns:
        Columns ``component, kappa, log_weight, duplicate_set, images, share``, with labels also
        ``majority_class, purity`` (empty without images).
    """
    num = len(groups)
    counts = torch.bincount(scored.scores.component, minlength=num)
    columns: dict[str, list[Any]] = {
        "component": list(range(num)),
        "kappa": mixture.concentrations.cpu().tolist(),
        "log_weight": mixture.log_weights.double().log_softmax(0).cpu().tolist(),
        "duplicate_set": groups.tolist(),
        "images": counts.tolist(),
        "share": (counts.double() / len(scored.images)).tolist(),
    }
    if scored.images.classes:
        columns["majority_class"] = [""] * num
        columns["purity"] = [None] * num
        for k, labels in component_labels(scored.scores.component, scored.images).items():
            columns["majority_class"][k] = scored.images.classes[int(labels.argmax())]
            columns["purity"][k] = float(labels.max() / labels.sum())
    return columns


def component_sheets(
    scored: Scored,
    groups: Tensor,
    *,
    components: int,
    images: int,
    size: int = 96,
    order: str = "use",
    least: int = 1,
    progress: bool = False,
) -> list[Sheet]:
    """Components, each with the images closest to its mean direction.

    Copies of one component share its images by chance, so they are shown as one.

    Args:
        scored: the images.
        groups: duplicate set of every component ``(K,)``; ``torch.arange(K)`` keeps all apart.
        components: how many sets of components.
        images: how many images of each.
        size: side of a thumbnail in CSS pixels.
        order: the most used first (``use``), or the most or least concentrated ones (``precise``,
            ``vague``).
        least: images that a component must win to be shown.
        progress: whether to show a progress bar.
    """
    owner = groups[scored.scores.component]
    counts, copies = torch.bincount(owner), torch.bincount(groups)
    rank = counts.double()
    if order != "use":
        total = torch.zeros(len(counts), dtype=torch.float64)
        total.index_add_(0, owner.cpu(), scored.scores.concentration.double().cpu())
        rank = total / counts.clamp_min(1).cpu() * (1 if order == "precise" else -1)
    first = rank.argsort(descending=True, stable=True).to(counts.device)
    used = first[counts[first] >= max(least, 1)][:components].tolist()
    labels = component_labels(owner, scored.images) if scored.images.classes else {}
    sheets = []
    for group in tqdm(used, desc="component sheets", unit="sheet", disable=not progress):
        members = (owner == group).nonzero().squeeze(1)
        closest = scored.scores.cosine[members].argsort(descending=True, stable=True)
        chosen = members[closest[:images]].tolist()
        kappa = float(scored.scores.concentration[members].mean())
        note = f"{len(members):,} images · κ {kappa:.1f}"
        if group in labels:
            purity = float(labels[group].max() / labels[group].sum())
            note += f" · {purity:.0%} {scored.images.classes[int(labels[group].argmax())]}"
        pictures = []
        for i in chosen:
            path = scored.images.path(i)
            cosine, k = float(scored.scores.cosine[i]), int(scored.scores.component[i])
            share = float(scored.scores.responsibility[i])
            title = f"{path}\ncomponent {k}, cosine {cosine:.3f}, responsibility {share:.2f}"
            pictures.append(thumbnail(scored.images.source.image(i), size, title=title))
        name = f"Component {int((groups == group).nonzero()[0])}"
        if copies[group] > 1:
            name += f" and {int(copies[group]) - 1:,} copies"
        sheets.append(Sheet(name, note, pictures))
    return sheets


def ranked_sheet(
    scored: Sequence[Scored], title: str, count: int, *, least: bool, size: int = 96
) -> Sheet:
    """The images of lowest (or highest) log-likelihood over all sets.

    Args:
        scored: the sets.
        title: heading.
        count: number of images.
        least: lowest first (outliers), else highest first.
        size: side of a thumbnail in CSS pixels.
    """
    likelihood = torch.cat([part.scores.log_likelihood for part in scored])
    owner = [(part, i) for part in scored for i in range(len(part.images))]
    order = likelihood.argsort(descending=not least, stable=True)[:count].tolist()
    pictures = []
    for index in order:
        part, i = owner[index]
        path = part.images.path(i)
        typical = float(part.typicality[i])
        title_text = f"{path}\nlog p(y) {float(likelihood[index]):.2f}, typicality {typical:.3f}"
        caption = part.images.class_of(i) or part.images.name
        image = part.images.source.image(i)
        pictures.append(thumbnail(image, size, caption=caption, title=title_text))
    return Sheet(title, f"of {len(likelihood):,} images", pictures)
