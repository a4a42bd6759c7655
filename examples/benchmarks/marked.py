"""What the scores mark: how many of a linear's inputs its neurons share, and how much these inputs vary.

    cd examples && python -m benchmarks.marked --suite local --source FOLDER --model MODEL --output FILE.json

An input that is nearly the same for all tokens of all images makes of its weight a second bias.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import mean
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.measured import add_measured_arguments, measured
from benchmarks.scores import constant_parts
from benchmarks.start import Start
from trpts_peft.functional import top_connections
from trpts_peft.run_folder import write_json

__all__ = ["SCORES", "marked"]

SCORES = ("fisher", "varying", "gradient", "magnitude", "random")


def marked(start: Start, connections: int = 2) -> dict[str, dict[str, Any]]:
    """What each score marks with so many connections per neuron, as means over blocks.

    Returns:
        {kind of linear: {"constant": mean constant part of its inputs, score: {"used": share of its inputs that some
        neuron marks, "constant": mean constant part of the inputs marked}}}; a random score is drawn with seed 0.
    """
    base, generator = start.base(), torch.Generator().manual_seed(0)
    scored = {score: start.scores(score, {}) for score in ("fisher", "gradient")}
    scored["varying"] = start.scores("fisher", {"varying": True})
    constant = constant_parts(base, scored["fisher"], DataLoader(start.pixels, 32))
    found = defaultdict[str, list[dict[str, Any]]](list)
    for name, part in constant.items():
        weight = base.get_submodule(name).weight.detach().cpu()
        scores = {score: values[name] for score, values in scored.items()}
        scores |= {"magnitude": weight.abs(), "random": torch.rand(weight.shape, generator=generator)}
        columns = {score: top_connections(scores[score], connections) for score in SCORES}
        shares = {
            score: {"used": len(marks.unique()) / weight.shape[1], "constant": float(part[marks].mean())}
            for score, marks in columns.items()
        }
        found[name.rpartition(".")[2]].append({"constant": float(part.mean()), **shares})
    return {kind: _means(rows) for kind, rows in found.items()}


def _means(rows: list[Any]) -> Any:
    """Of equal trees of numbers, the tree of means."""
    if isinstance(rows[0], dict):
        return {key: _means([row[key] for row in rows]) for key in rows[0]}
    return mean(rows)


def main() -> None:
    """Measure the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measured_arguments(parser)
    parser.add_argument("--connections", type=int, default=2, help="per neuron")
    arguments = parser.parse_args()
    found = measured(arguments, lambda start: marked(start, arguments.connections))
    mean_of_tasks = _means(list(found["tasks"].values()))
    write_json(arguments.output, {"connections": arguments.connections, **found, "mean": mean_of_tasks})


if __name__ == "__main__":
    main()
