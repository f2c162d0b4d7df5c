"""Pictures inside a self-contained page."""

from __future__ import annotations

import html
import io

from PIL import Image

from dinovmf_plugin.report.theme import data_uri

__all__ = ["embedded"]


def embedded(image: Image.Image, alt: str) -> str:
    """An ``img`` element that carries its picture (JPEG) and fits the page's width.

    Example:
        >>> embedded(Image.new("RGB", (4, 4)), "a < b")[:45]
        '<figure><img alt="a &lt; b" loading="lazy" st'
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=85)
    source = data_uri(buffer.getvalue(), "image/jpeg")
    return (
        f'<figure><img alt="{html.escape(alt)}" loading="lazy" '
        f'style="max-width:100%;height:auto" src="{source}"></figure>'
    )
