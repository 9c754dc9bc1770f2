"""Matplotlib without its global state: figures are made, drawn and saved without pyplot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, FAINT, STRIPE = "#1c2430", "#667085", "#d5dae1", "#f5f6f8"
DPI = 160
WIDTH_INCHES = 10.0


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches. ImportError: the extra `report` is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ImportError("drawing needs matplotlib: pip install 'counterpoint[report]'") from error
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as the path's suffix says (.png or .svg); the same figure gives the same bytes."""
    path = check_path(path)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, format=path.suffix[1:], metadata=metadata)
    return path


def check_path(path: str | Path) -> Path:
    """ValueError: a picture is neither .png nor .svg."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture is written as .png or .svg, not {path.name!r}: change the suffix")
    return path


def tint(colour: str, strength: float) -> str:
    """A hex colour mixed with white; strength 1 leaves it as it is."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - p) * strength):02x}" for p in parts)


def text_on(colour: str) -> str:
    """Ink or white, whichever reads better on a background of this hex colour."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.56 else "white"
