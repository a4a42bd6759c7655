"""The paper's figure 4 for the methods measured here: time, memory and multiplications side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

PANELS = (
    ("training step, relative to frozen", lambda row: row["step_to_frozen"]),
    ("peak training memory, GB", lambda row: row["peak_bytes"] / 1e9),
    ("GMACs per image, forward", lambda row: row["gmacs"]),
)


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel a quantity, one bar a method; TR-PTS in color."""
    rows = [row for row in results["training"] if "U/in" not in row["method"]]
    names = [row["method"] for row in rows]
    colors = ["tab:blue" if name.startswith("TR-PTS") else "silver" for name in names]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (title, value) in zip(axes, PANELS, strict=True):
        bars = axis.barh(names, [value(row) for row in rows], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
