"""Two processes decide what one process decides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from conftest import LabelledImages, build_vit
from trpts_peft import TRPTSConfig, calibrate

SCRIPT = """
import sys
from accelerate import Accelerator
import torch
from test_processes import calibrated

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
for count in sys.argv[2:]:
    torch.save(calibrated(int(count)), f"{sys.argv[1]}/{accelerator.process_index}-{count}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def calibrated(count: int) -> dict[str, Any]:
    """Selection, probed head and columns of a fresh adapter, calibrated on `count` samples in batches of four."""
    torch.manual_seed(0)
    config = TRPTSConfig(modules_to_save=["classifier"], keep_rate=0.5, top_percent=5)
    model = get_peft_model(build_vit(), config)
    selection = calibrate(model, LabelledImages(count), batch_size=4, progress=False)
    return {
        "importance": selection.importance,
        "connections": selection.connections,
        "token_layers": selection.token_layers,
        "columns": selection.columns,
        "head": model.base_model.model.classifier.modules_to_save["default"].state_dict(),
        "installed": {n: t for n, t in model.state_dict().items() if "trpts_columns" in n},
    }


COUNTS = (13, 3)  # batches of 4, 4, 4, 1; with 3 samples the second process has none at all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, started as `accelerate launch` and `torchrun` start them, have left their results."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(folder), *map(str, COUNTS)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("count", COUNTS)
def test_two_processes_decide_what_one_decides(folder: Path, count: int, rank: int) -> None:
    alone, other = calibrated(count), torch.load(folder / f"{rank}-{count}.pt")
    for key in ("importance", "connections", "token_layers"):
        assert other[key] == alone[key]
    for key in ("columns", "head", "installed"):
        assert other[key].keys() == alone[key].keys()
        assert [name for name, tensor in alone[key].items() if not torch.equal(other[key][name], tensor)] == []
