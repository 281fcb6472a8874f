"""What `density.csv` says of the attention of each block, and a picture of it for several models."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from cb_vit.analysis.report_files import read_table
from cb_vit.analysis.report_pictures import draw_lines

COLUMNS = ("block", "head", "queries", "keys", "measure", "mean", "std", "q05", "q25", "q50", "q75", "q95")
MEASURES = ("entropy_normalised", "effective_tokens", "distance_from_uniform", "attention_distance")
Row = Mapping[str, str]


def read_density(text: str) -> list[Row]:
    """The rows of a `density.csv`.

    Raises:
        ValueError: it is none.
    """
    return read_table(text, COLUMNS)


def draw_density(runs: Mapping[str, Sequence[Row]]) -> bytes:
    """Measures of the attention by block, over all heads and tokens, of several models, as a PNG.

    Args:
        runs: rows of each model, by its name.
    """
    panels = {measure: {name: by_block(rows, measure) for name, rows in runs.items()} for measure in MEASURES}
    return draw_lines({name: lines for name, lines in panels.items() if any(lines.values())}, "block")


def by_block(rows: Sequence[Row], measure: str) -> dict[float, float]:
    """The mean of a measure over all heads, queries and keys, by block."""
    return {float(row["block"]): float(row["mean"]) for row in rows if row["measure"] == measure and (
        row["head"], row["queries"], row["keys"]) == ("all", "all", "all") and row["mean"]}
