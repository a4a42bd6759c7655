"""The paper's figure 4 for the methods measured here, and what it leaves out: training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

PANELS = (
    ("training step\nrelative to frozen", "training", lambda row: row["step_to_frozen"]),
    ("peak training memory\nGB", "training", lambda row: row["peak_bytes"] / 1e9),
    ("prediction, not merged\nrelative to full", "forward", lambda row: row["to_full"]),
    ("prediction\nGMACs per image", "forward", lambda row: row["gmacs"]),
)


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel a quantity, one bar a method; TR-PTS in color."""
    names = [row["method"] for row in results["training"] if "U/in" not in row["method"] and row["method"] != "frozen"]
    colors = ["tab:blue" if name.startswith("TR-PTS") else "silver" for name in names]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (title, section, value) in zip(axes, PANELS, strict=True):
        by_method = {row["method"]: value(row) for row in results[section]}
        bars = axis.barh(names, [by_method[name] for name in names], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.margins(x=0.18)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
