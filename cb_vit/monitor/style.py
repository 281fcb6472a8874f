"""How the project's pictures look: their colours, and a figure as the bytes of a PNG."""
from __future__ import annotations

from io import BytesIO
from typing import Any

INK, FAINT, GRID = "#2b2f36", "#8a9099", "#e8eaed"
PALETTE = ("#1f6fb4", "#d1603d", "#2a9d6f", "#8e5ea2", "#b8892b", "#3aa6b9", "#c0497b", "#6b7280")


def to_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG."""
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
