"""The figures of docs/results.md: what accuracy each method reaches with how much, and what each change does."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.recorded import Results
from benchmarks.variants import ABLATIONS, METHODS, VARIANTS

__all__ = ["draw_ablations", "draw_methods"]

_PLACES = {"gps": (-27, 2), "trpts-all-tokens": (6, 4), "trpts": (-31, -7), "lora": (7, -6)}  # of close points


def draw_methods(results: Results, path: Path) -> None:
    """Mean accuracy against the share of the model that trains, of the methods that have every task; if any."""
    tasks = results.tasks
    names = [name for name in METHODS if name in results.cells and all(results.of(name, task) for task in tasks)]
    if not names:
        return
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in names:
        share = results.average(name, lambda cell: cell["parameters"]["trainable_percent"])
        accuracy = statistics.mean(results.mean(name, task) for task in tasks)
        color = "tab:blue" if name.startswith("trpts") else "gray"
        axis.plot(share, accuracy, "o", color=color)
        place = _PLACES.get(name, (5, 3))
        axis.annotate(name, (share, accuracy), xytext=place, textcoords="offset points", fontsize=9, color=color)
    axis.set_xscale("log")
    axis.margins(x=0.15, y=0.1)
    axis.set_xlabel("trained, % of the model (head included)")
    axis.set_ylabel(f"accuracy, %, mean of {len(tasks)} tasks")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_ablations(results: Results, path: Path) -> None:
    """Accuracy minus that of `trpts`, a row per variant, a dot per task and seed, for tasks that have all; if any."""
    compared = {variant.name for variants in ABLATIONS.values() for variant in variants}
    own = [name for name in VARIANTS if name in compared - set(METHODS)]
    tasks = [task for task in results.tasks if all(results.of(name, task) for name in [*own, "trpts"])]
    if not tasks:
        return
    figure, axis = plt.subplots(figsize=(7, 0.26 * len(own) + 1.2), layout="constrained")
    for number, task in enumerate(tasks):
        default = results.mean("trpts", task)
        points = [(value - default, row) for row, name in enumerate(own) for value in results.of(name, task)]
        offset = 0.2 * (number - (len(tasks) - 1) / 2)
        axis.plot([x for x, _ in points], [row + offset for _, row in points], "o", ms=4, label=task)
        spread = [value - default for value in results.of("trpts", task)]
        axis.axvspan(min(spread), max(spread), color=f"C{number}", alpha=0.15)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(own)), own, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy minus the mean of trpts, points; shaded: the seeds of trpts")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
