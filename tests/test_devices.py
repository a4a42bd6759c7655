"""A model on an accelerator: nothing of the adapter stays behind on the CPU, and no step of training waits for it.

The accelerator is pretended (pretend_accelerator.py): there need not be a GPU to see which tensors lie where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy, sys
import torch
import pretend_accelerator as accelerator
from peft import get_peft_model
from conftest import LabelledImages, build_vit
from trpts_peft import TRPTSConfig, calibrate, fisher, plot_tokens
from trpts_peft.tuner_layer import TRPTSLayer

torch._C._set_multithreading_enabled(False)
if sys.argv[1] == "without float64":
    accelerator.refuse_float64 = True
    fisher._sums_device = lambda device: torch.device("cpu")  # as for Apple's
DATA = LabelledImages(12)


def on(device, tensor):
    return accelerator.wrapped(tensor) if device == "pretend" else tensor


def here(tensor):
    return tensor.detach().inner if isinstance(tensor, accelerator.Pretended) else tensor.detach()


def everything(device):
    config = TRPTSConfig(keep_rate=0.5, token_layers=2, modules_to_save=["classifier"])
    model = get_peft_model(build_vit(), config).to(device)
    columns = calibrate(model, DATA, progress=False, batch_size=5).columns
    away = [n for n, t in model.state_dict().items() if t.device.type != device and "keep_ppm" not in n]
    assert not away, away
    for module in model.modules():  # as a loader leaves it that has read the file to the CPU
        if isinstance(module, TRPTSLayer):
            for name, part in module.named_buffers():
                if name.endswith(".default") and part.device.type == device and "base_layer" not in name:
                    getattr(module, name.split(".")[0])["default"] = here(part)
            module._move_adapter_to_device_of_base_layer("default")
    away = [n for n, t in model.named_buffers() if t.device.type != device]
    assert not away, away
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batch = {name: on(device, tensor) for name, tensor in DATA.batch().items()}
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.waits.clear()
        loss = model(**batch).loss
        loss.backward()
        assert not accelerator.waits, accelerator.waits
        optimizer.step()
    half = copy.deepcopy(model).to(torch.bfloat16)
    accelerator.waits.clear()
    half(batch["pixel_values"].to(torch.bfloat16)).logits.float().sum().backward()
    assert not accelerator.waits, accelerator.waits
    model.eval()
    with torch.no_grad():
        logits = [model(batch["pixel_values"]).logits]
        with model.disable_adapter():
            logits.append(model(batch["pixel_values"]).logits)
        model.merge_adapter(safe_merge=True)
        logits.append(model(batch["pixel_values"]).logits)
        model.unmerge_adapter()
        logits.append(copy.deepcopy(model).merge_and_unload()(batch["pixel_values"]).logits)
    plot_tokens(model, batch["pixel_values"][:1])
    values = {name: here(p) for name, p in model.named_parameters() if p.requires_grad}
    return columns, [here(loss), *map(here, logits)], values


(columns, outputs, values), (expected_columns, expected, expected_values) = everything("pretend"), everything("cpu")
assert columns.keys() == expected_columns.keys()
assert all(torch.equal(columns[name], expected_columns[name]) for name in columns)
torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(values, expected_values, rtol=1e-3, atol=1e-5)
assert any(bool(v.any()) for name, v in values.items() if "trpts_values" in name)
"""


@pytest.mark.parametrize("kind", ["with float64", "without float64"])
def test_on_an_accelerator_all_is_as_on_the_cpu(kind: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-X", "faulthandler", "-c", SCRIPT, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
