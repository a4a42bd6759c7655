"""How much faster ONNX Runtime predicts where tokens are dropped: python -m benchmarks.onnx_runtime.

Run in examples/; needs onnxscript and onnxruntime. One thread, ViT-B/16 at 224 pixels, merged, random weights.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from benchmarks.cost import drawn_batch
from benchmarks.methods import full, trpts
from measure import interleaved_seconds, median_ratio
from tables import markdown_table
from trpts_peft import estimate_cost

KEEP_RATE = 0.8
BATCHES = (8, 1)
ROUNDS = 9


def session(model: nn.Module, path: Path) -> Any:
    """The model in ONNX Runtime, for any number of images, on one thread."""
    images = drawn_batch(2, "cpu")["pixel_values"]
    shapes = {"pixel_values": {0: "batch"}}
    torch.onnx.export(model.eval(), (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def rows() -> list[list[str]]:
    """One row a batch size: batch, speed-up over the plain ViT, what the multiplications promise, and their ratio."""
    reduced, plain = trpts(KEEP_RATE).merge_and_unload(), full()
    ideal, table = estimate_cost(reduced).speedup, []
    with tempfile.TemporaryDirectory() as folder:
        sessions = [session(model, Path(folder) / f"{i}.onnx") for i, model in enumerate((reduced, plain))]
        for batch in BATCHES:
            images = {"pixel_values": drawn_batch(batch, "cpu")["pixel_values"].numpy()}
            actions = {
                name: partial(s.run, None, images) for name, s in zip(("reduced", "plain"), sessions, strict=True)
            }
            seconds = interleaved_seconds(actions, ROUNDS)
            speedup = 1 / median_ratio(seconds["reduced"], seconds["plain"])
            table.append([str(batch), f"{speedup:.3f}", f"{ideal:.3f}", f"{speedup / ideal:.3f}"])
    return table


def main() -> None:
    """Measure and print."""
    # peft 0.21 asks for the old name of a property of transformers 5; torch 2.13's exporter for a class of its own.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(markdown_table(["batch", "speed-up", "ideal", "of ideal"], rows()))


if __name__ == "__main__":
    main()
