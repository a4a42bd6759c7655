"""The blocks that each placement of token selection picks on each task, and what it is predicted to save.

    cd examples && python -m benchmarks.placements --suite local --source FOLDER --model MODEL --output FILE.json

They are those of the cells: they follow from the scores, and where they are drawn from the seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.cells import settled
from benchmarks.measured import add_measured_arguments, measured
from benchmarks.start import Start
from benchmarks.variants import VARIANTS
from trpts_peft import TRPTSConfig, select
from trpts_peft.run_folder import write_json

__all__ = ["PLACEMENTS", "placements"]

PLACEMENTS = ("sparse-0.8", "dense-0.8", "random-0.8", "late-0.8", "dense-equal", "random-equal")


def placements(start: Start, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """What the cells of these variants and seeds select tokens in.

    Returns:
        {variant: [{"blocks": their numbers from 0, "keep_rate", "speedup": predicted for inference}]}, one for each
        seed if the variant draws, else one.
    """
    scores, base = start.scores("fisher", {}), start.base()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in variants:
        variant = VARIANTS[name]
        drawn = [settled(start, variant, seed) for seed in (seeds if variant.draws else seeds[:1])]
        selections = [select(scores, TRPTSConfig(**options), base) for options in drawn]
        found[name] = [
            {"blocks": list(each.token_layers), "keep_rate": each.keep_rate, "speedup": each.speedup}
            for each in selections
        ]
    return found


def main() -> None:
    """Look at the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measured_arguments(parser)
    parser.add_argument("--variants", nargs="+", default=PLACEMENTS, choices=PLACEMENTS, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    found = measured(arguments, lambda start: placements(start, arguments.variants, arguments.seeds))
    write_json(arguments.output, found)


if __name__ == "__main__":
    main()
