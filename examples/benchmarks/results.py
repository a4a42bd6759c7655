"""Every table and figure of docs/results.md, from the cells in docs/results (`make results`).

    cd examples && python -m benchmarks.results

A table stands on the page between `<!-- table: suite/name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.marked import SCORES
from benchmarks.placements import PLACEMENTS
from benchmarks.recorded import Results
from benchmarks.results_figures import draw_ablations, draw_methods
from benchmarks.variants import ABLATIONS, METHODS, VARIANTS
from tables import markdown_table

__all__ = [
    "ablation_table",
    "comparison_table",
    "filled",
    "marked_table",
    "method_table",
    "placement_table",
    "rate_table",
]

_DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- table: (\S+)/(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def method_table(results: Results) -> str:
    """In the form of the paper's tables 2 and 3: a row per method, mean ± deviation over seeds, in percent."""
    header = ["method", *results.tasks, "mean", "Params. %", "file, kB", "step / full", "prediction / full"]
    return markdown_table(header, [_method_row(results, name) for name in METHODS if name in results.cells])


def _method_row(results: Results, name: str) -> list[str]:
    accuracies = [results.of(name, task) for task in results.tasks]
    times = results.times.get(name, {})
    return [
        name,
        *map(_spread, accuracies),
        f"{statistics.mean(map(statistics.mean, accuracies)):.1f}" if all(accuracies) else "",
        f"{results.average(name, lambda cell: cell['parameters']['trainable_percent']):.2f}",
        f"{results.average(name, lambda cell: cell['bytes'] / 1000):,.0f}",
        *(f"{times[key]:.2f}" if times else "" for key in ("training", "prediction")),
    ]


def comparison_table(results: Results, ours: str = "trpts", others: Sequence[str] = ()) -> str:
    """`ours` minus others, task by task: the mean difference with its standard error, and who wins.

    The others are, unless they are named, the methods, and of the ablations those that have every task.
    """
    header = ["against", "tasks", "won", "mean difference", "lowest", "highest"]
    others = others or [name for name in VARIANTS if name in METHODS or all(results.of(name, t) for t in results.tasks)]
    return markdown_table(header, list(_comparisons(results, ours, others)))


def _comparisons(results: Results, ours: str, others: Sequence[str]) -> Iterator[list[str]]:
    for other in others:
        tasks = [task for task in results.tasks if results.of(ours, task) and results.of(other, task)]
        differences = [results.mean(ours, task) - results.mean(other, task) for task in tasks]
        if other != ours and len(differences) > 1:
            error = statistics.stdev(differences) / len(differences) ** 0.5
            mean = f"{statistics.mean(differences):+.1f} ± {error:.1f}"
            won = sum(difference > 0 for difference in differences)
            yield [other, str(len(tasks)), str(won), mean, f"{min(differences):+.1f}", f"{max(differences):+.1f}"]


def rate_table(results: Results) -> str:
    """The learning rates that were tried, and what each gave on validation images; what the cells used in bold."""
    rows = []
    for name in VARIANTS:
        used = {cell["learning_rate"] for cells in results.cells.get(name, {}).values() for cell in cells}
        tried = [(rate, f"{rate:g}: {accuracy:.1f}") for rate, accuracy in results.validation(name).items()]
        if tried:
            rows.append([name, ", ".join(f"**{shown}**" if rate in used else shown for rate, shown in tried)])
    return markdown_table(["method", "learning rate: accuracy on validation images, %"], rows)


def ablation_table(results: Results, question: str) -> str:
    """The variants of one question on the tasks that have them all; trained weights without the head."""
    compared = [variant.name for variant in ABLATIONS[question]]
    tasks = [task for task in results.tasks if all(results.of(name, task) for name in compared)]
    rows = []
    for name in compared if tasks else ():
        trained = results.average(name, lambda cell: cell["parameters"]["trainable_percent_without_head"], tasks)
        mean = statistics.mean(results.mean(name, task) for task in tasks)
        rows.append([name, *(_spread(results.of(name, task)) for task in tasks), f"{mean:.1f}", f"{trained:.2f}"])
    return markdown_table(["variant", *tasks, "mean", "trained % of the backbone"], rows)


def marked_table(results: Results) -> str:
    """Per kind of linear and score: the share of inputs that some neuron marks, and the constant part of the marked."""
    header = [
        "linear",
        *(f"used: {score}" for score in SCORES),
        "constant: all",
        *(f"constant: {score}" for score in SCORES[:-1]),
    ]
    rows = [
        [
            kind,
            *(f"{100 * shares[score]['used']:.0f}" for score in SCORES),
            f"{100 * shares['constant']:.0f}",
            *(f"{100 * shares[score]['constant']:.0f}" for score in SCORES[:-1]),
        ]
        for kind, shares in results.marked.items()
    ]
    return markdown_table(header, rows)


def placement_table(results: Results) -> str:
    """Per placement: the blocks it picks on each task, seed by seed; its keep rates; the mean predicted speed-up."""
    rows = []
    for name in PLACEMENTS if results.placements else ():
        by_task = [task[name] for task in results.placements.values()]
        blocks = ["; ".join(" ".join(map(str, one["blocks"])) for one in found) for found in by_task]
        rates = sorted({one["keep_rate"] for found in by_task for one in found})
        speedup = statistics.mean(statistics.mean(one["speedup"] for one in found) for found in by_task)
        shown = f"{rates[0]}" if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
        rows.append([name, *blocks, shown, f"{speedup:.3f}"])
    return markdown_table(["variant", *results.placements, "keep rate", "predicted speed-up"], rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{values[0]:.1f}" if len(values) == 1 else f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def filled(page: str, suites: Mapping[str, Results]) -> str:
    """The page with every table made anew."""
    tables: dict[str, Callable[[Results], str]] = {
        "methods": method_table,
        "comparison": comparison_table,
        "placements": placement_table,
        "placements-compared": partial(comparison_table, ours=PLACEMENTS[0], others=PLACEMENTS[1:]),
        "rates": rate_table,
        "marked": marked_table,
    }
    for question in ABLATIONS:
        tables[question.replace(" ", "-")] = lambda results, question=question: ablation_table(results, question)

    def table(match: re.Match[str]) -> str:
        begin, suite, name, end = match.groups()
        return f"{begin}{tables[name](suites[suite])}\n{end}"

    return _BLOCK.sub(table, page)


def main() -> None:
    """Make the page's tables and figures anew."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    suites = {path.name: Results.read(path) for path in sorted((_DOCS / "results").iterdir()) if path.is_dir()}
    page = _DOCS / "results.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), suites), encoding="utf-8")
    for name, results in suites.items():
        draw_methods(results, _DOCS / "images" / f"results-{name}-methods.png")
        draw_ablations(results, _DOCS / "images" / f"results-{name}-ablations.png")


if __name__ == "__main__":
    main()
