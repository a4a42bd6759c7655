"""The tables of the cost benchmark, and the bars that this project has set itself."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.switching import REFERENCE
from measure import ratio_interval
from tables import markdown_table

Results = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One figure and the limit that it must keep.

    Attributes:
        what: is measured.
        measured: the figure.
        sign: how the two are compared.
        limit: that it must keep.
        interval: what the rounds of a timing leave open (`ratio_interval`), where those of both sides were recorded.
    """

    what: str
    measured: float
    sign: str
    limit: float
    interval: tuple[float, float] | None = None

    @property
    def holds(self) -> str:
        """Whether it does: yes, no, or open where the rounds do not tell."""
        low, high = self.interval or (self.measured, self.measured)
        keeps = {"≤": operator.le, "<": operator.lt, "≥": operator.ge}[self.sign]
        kept = [keeps(end, self.limit) for end in (low, high)]
        return "yes" if all(kept) else "open" if any(kept) else "NO"


def bars_of(results: Results) -> list[Bar]:
    """All bars that the measurements say something about."""
    training = {row["method"]: row for row in results.get("training", [])}
    bars = _training_bars(training) if training else []
    for fisher in results.get("fisher", []):
        limit = 1.20 if results["settings"]["device"] == "cuda" else 1.35
        beyond = fisher["peak_bytes"] - fisher["score_bytes"]
        allowed = fisher["workspace_bytes"] + fisher["activation_bytes"]
        interval = ratio_interval(fisher["seconds"]["fisher"], fisher["seconds"]["plain"])
        bars.append(Bar("Fisher to plain forward and backward", fisher["fisher_to_plain"], "≤", limit, interval))
        what = "Fisher memory beyond model and scores, to workspace + activations"
        bars.append(Bar(what, beyond / allowed, "≤", 1.0))
    for row in results.get("inference", []):
        if row["model"].endswith("0.8"):
            how = "compiled" if row["compiled"] else "eager"
            what = f"prediction, keep rate 0.8, batch {row['batch']}, {how}, to ideal"
            # Runs of before have not recorded the plain model's seconds.
            speedups = ratio_interval(row["plain_seconds"], row["seconds"]) if "plain_seconds" in row else None
            interval = (speedups[0] / row["ideal"], speedups[1] / row["ideal"]) if speedups else None
            bars.append(Bar(what, row["of_ideal"], "≥", 0.95 if row["batch"] > 1 else 0.90, interval))
    for row in results.get("switching", [])[:1]:
        reference = next(row for row in results["switching"] if row["what"] == REFERENCE)
        what = "adapter switch, to LoRA's unmerge and merge"
        bars.append(Bar(what, row["to_lora"], "≤", 0.05, _interval(row, reference)))
    for row, limit in zip(results["disk"], (6, 4), strict=True) if "disk" in results else ():
        bars.append(Bar(f"bytes per trainable weight, {row['dtype']}", row["bytes_per_weight"], "≤", limit))
    return bars


def _training_bars(training: dict[str, Any]) -> list[Bar]:
    ours, tokens = training["TR-PTS"], training["TR-PTS, keep rate 0.8"]
    frozen, lora = training["frozen"], training["LoRA r=8"]
    bars = [
        Bar("training step, keep rate 1, to frozen", ours["step_to_frozen"], "≤", 1.10, _interval(ours, frozen)),
        Bar("training step, keep rate 1, to LoRA r=8", ours["step_to_lora"], "<", 1.00, _interval(ours, lora)),
        Bar("training step, keep rate 0.8, to frozen", tokens["step_to_frozen"], "≤", 0.87, _interval(tokens, frozen)),
    ]
    for kind, what in (("peak_bytes", "peak"), ("kept_bytes", "kept")):
        for other, limit in (("LoRA r=8", 0.78), ("full", 0.45)):
            ratio = ours[kind] / training[other][kind]
            bars.append(Bar(f"training memory, {what}, to {other}", ratio, "≤", limit))
    return bars


def _interval(row: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float] | None:
    return ratio_interval(row["seconds"], reference["seconds"])


def print_report(results: Results, bars: list[Bar]) -> None:
    """Every table, as Markdown; those of sections that were not measured are left out."""
    settings = results["settings"]
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    sizes = f"batch {settings['train_batch']}; memory: batch {settings['memory_batch']}"
    for section, title, table in (
        ("training", f"Training step ({sizes})", training_table),
        ("mixed", "Training step in mixed precision", mixed_table),
        ("compiled", f"Compiled training step (batch {settings['train_batch']})", compiled_table),
        ("fisher", "Fisher information", fisher_table),
        ("inference", "Prediction of merged models", inference_table),
        ("forward", "Prediction with adapters that are not merged", forward_table),
        ("mixed_batches", "Prediction of 8 images by several adapters", mixed_batch_table),
        ("switching", "Switching between merged adapters", switching_table),
        ("switching_bfloat16", "Switching between merged adapters in bfloat16", switching_table),
        ("disk", "On disk", disk_table),
    ):
        if section in results:
            print(f"\n{title}\n\n{table(results[section])}")
    print(f"\nBars\n\n{bar_table({'measured': bars})}")


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step / frozen": lambda row: f"{row['step_to_frozen']:.2f}",
    "step / LoRA": lambda row: f"{row['step_to_lora']:.2f}",
    "kept, MB": lambda row: f"{row['kept_bytes'] / 1e6:,.0f}",
    "peak, MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "GMACs": lambda row: f"{row['gmacs']:.2f}",
    "trainable %": lambda row: f"{row['trainable_percent']:.2f}",
}


def training_table(rows: list[dict[str, Any]]) -> str:
    """Time, memory, multiplications and size of the methods."""
    return _method_table(rows, *_COLUMNS)


def mixed_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of the methods in bfloat16."""
    return _method_table(rows, "step / frozen", "step / LoRA", "kept, MB", "peak, MB")


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of compiled steps."""
    return _method_table(rows, "step / frozen", "step / LoRA", "peak, MB")


def _method_table(rows: list[dict[str, Any]], *columns: str) -> str:
    cells = [[row["method"], *(_COLUMNS[column](row) for column in columns)] for row in rows]
    return markdown_table(["method", *columns], cells)


def fisher_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of a measurement."""
    parts = ["peak_bytes", "sum_bytes", "workspace_bytes", "activation_bytes"]
    headings = ["images", "time / plain", "peak, MB", "sums, MB", "workspace, MB", "activations of a batch, MB"]
    cells = [
        [str(r["images"]), f"{r['fisher_to_plain']:.2f}", *(f"{r[part] / 1e6:,.0f}" for part in parts)] for r in rows
    ]
    return markdown_table(headings, cells)


def inference_table(rows: list[dict[str, Any]]) -> str:
    """Speed-ups, measured and promised."""
    headings = ["model", "batch", "compiled", "speed-up", "ideal", "of ideal"]
    cells = [
        [
            row["model"],
            str(row["batch"]),
            "yes" if row["compiled"] else "no",
            f"{row['speedup']:.3f}",
            f"{row['ideal']:.3f}",
            f"{row['of_ideal']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(headings, cells)


def forward_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of one pass of every method."""
    headings = ["method", "batch", "mean, ms", "/ full", "peak beyond the model, MB", "GMACs"]
    cells = [
        [
            row["method"],
            str(row["batch"]),
            f"{1e3 * row['mean_seconds']:,.1f}",
            f"{row['to_full']:.2f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['gmacs']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(headings, cells)


def mixed_batch_table(rows: list[dict[str, Any]]) -> str:
    """Time of predictions by several adapters, relative to the plain model's."""
    counts = sorted({row["adapters"] for row in rows})
    ratios = {(row["method"], row["adapters"]): f"{row['to_plain']:.2f}" for row in rows}
    names = dict.fromkeys(row["method"] for row in rows)
    headings = ["method, time / plain", *(f"{count} adapter{'s' * (count > 1)}" for count in counts)]
    return markdown_table(headings, [[name, *(ratios[name, count] for count in counts)] for name in names])


def switching_table(rows: list[dict[str, Any]]) -> str:
    """Time of a switch."""
    cells = [
        [row["what"], f"{1e3 * sorted(row['seconds'])[len(row['seconds']) // 2]:.1f}", f"{row['to_lora']:.3f}"]
        for row in rows
    ]
    return markdown_table(["what", "ms", "/ LoRA's unmerge and merge"], cells)


def disk_table(rows: list[dict[str, Any]]) -> str:
    """Bytes of a file."""
    cells = [
        [row["dtype"], f"{row['weights']:,}", f"{row['bytes_per_weight']:.2f}", f"{row['file_bytes']:,}"]
        for row in rows
    ]
    return markdown_table(["dtype", "trainable weights", "bytes per weight", "file, bytes"], cells)


def bar_table(runs: dict[str, list[Bar]]) -> str:
    """What is held to: {heading: the bars of a run}, a column each; a bar holds if it does in every run, and does not
    if it does not in one."""
    cells = []
    for bars in zip(*runs.values(), strict=True):
        measured = [f"{bar.measured:.3f}" + _range(bar.interval) for bar in bars]
        holds = next(word for word in ("NO", "open", "yes") if word in [bar.holds for bar in bars])
        cells.append([bars[0].what, *measured, f"{bars[0].sign} {bars[0].limit:g}", holds])
    return markdown_table(["what", *runs, "bar", "holds"], cells)


def _range(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
