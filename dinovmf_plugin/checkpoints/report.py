"""What happened to every tensor of a weight file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["LoadReport"]


def _some(names: tuple[str, ...], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, and {len(names) - limit} more" if len(names) > limit else shown or "none"


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a file's weights into a network; ``print(report)`` explains it.

    Attributes:
        path: the file.
        source: layout that was recognized: ``dinovmf_plugin``, ``solo``, ``dino``, ``ibot``, ``msn``,
            ``dinov2`` or ``timm`` (a bare ViT state dict, which official backbone-only files are).
        which: network that was read: ``teacher``, ``student``, or ``unnamed`` when the file holds
            one nameless network, in which case the request is ignored.
        model_name: architecture in words.
        matched: backbone tensors that were loaded.
        missing: tensors of the network that the file lacks; they keep their initial values.
        unexpected: backbone tensors of the file that the network has no place for.
        mismatched: tensors of the same name and another shape, with both shapes.
        head_matched: projection-head tensors that were loaded (``initialize_from``).
        head_skipped: projection-head tensors that were not, with the reason.
        resized: ``(rows, columns)`` of the position embeddings before and after resampling.
        mask_token: what became of the file's mask token (``initialize_from``); empty if it has none.
    """

    path: Path
    source: str
    which: str
    model_name: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    head_matched: tuple[str, ...] = ()
    head_skipped: tuple[str, ...] = ()
    resized: tuple[tuple[int, int], tuple[int, int]] | None = None
    mask_token: str = ""

    @property
    def coverage(self) -> float:
        """Share of matched tensors among those that the network or the file's backbone has."""
        wanted = len(self.matched) + len(self.missing) + len(self.mismatched)
        extra = sum(not name.startswith(HARMLESS) for name in self.unexpected)
        return len(self.matched) / max(1, wanted + extra)

    def misfits(self) -> str:
        """In words, the tensors on the path to the features that do not fit; empty if all do."""
        extra = tuple(name for name in self.unexpected if not name.startswith(HARMLESS))
        groups = (
            ("it lacks", self.missing),
            ("the network has no place for its", extra),
            ("it has another shape of", self.mismatched),
        )
        return "; ".join(f"{what} {_some(names)}" for what, names in groups if names)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.which} of a {self.source} file as {self.model_name}",
            *_NAMELESS[: self.which == "unnamed"],
            f"  matched     {len(self.matched)} tensors ({self.coverage:.1%})",
            f"  missing     {len(self.missing)}: {_some(self.missing)}",
            f"  unexpected  {len(self.unexpected)}: {_some(self.unexpected)}",
        ]
        if self.mismatched:
            lines.append(f"  mismatched  {len(self.mismatched)}: {_some(self.mismatched)}")
        if self.head_matched or self.head_skipped:
            lines.append(f"  head        {len(self.head_matched)} tensors matched")
        if self.head_skipped:
            lines.append(f"  head left   {len(self.head_skipped)}: {_some(self.head_skipped)}")
        if self.mask_token:
            lines.append(f"  mask token  {self.mask_token}")
        if self.resized is not None:
            (rows, cols), (new_rows, new_cols) = self.resized
            lines.append(
                f"  position embeddings resampled from {rows}x{cols} to {new_rows}x{new_cols}"
            )
        return "\n".join(lines)


_NAMELESS = ("  the file holds one nameless network: the choice of teacher or student is ignored",)

HARMLESS = ("masked_embed", "mask_token", "head.", "fc.", "pred.", "classifier.", "decoder")
"""Names a file may hold beside its backbone without changing the features: mask tokens, classifiers."""
