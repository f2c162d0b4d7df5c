"""How numbers are written for people."""

from __future__ import annotations

__all__ = ["percent", "shown", "spread"]


def shown(value: object) -> str:
    """A value as people read it: thousands separated, three significant digits, a dash for nothing.

    Example:
        >>> [shown(v) for v in (65536, 0.12345, 117.25, None, "x")]
        ['65,536', '0.123', '117', '–', 'x']
    """
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace(" ± ", "\u00a0±\u00a0")  # never broken over two lines


def percent(value: float | None, digits: int = 2) -> str | None:
    """A score in percent with its usual digits; None stays None.

    Example:
        >>> percent(76.114), percent(None)
        ('76.11', None)
    """
    return None if value is None else f"{value:.{digits}f}"


def spread(mean: float | None, std: float | None) -> str | None:
    """Mean and standard deviation, which is left out where it is zero or unknown.

    Example:
        >>> spread(41.8, 0.3), spread(67.2, None)
        ('41.80 ± 0.30', '67.20')
    """
    if mean is None:
        return None
    return f"{mean:.2f}" if not std else f"{mean:.2f} ± {std:.2f}"
