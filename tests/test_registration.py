"""What importing the package does to PEFT."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file

import trpts_peft
from conftest import build_images, build_vit
from trpts_peft import TRPTSConfig, TRPTSModel

MEMBER = PeftType["TRPTS"]
PATH = os.pathsep.join([str(Path(__file__).parent), *sys.path])


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH})


def test_member_is_a_real_one() -> None:
    assert isinstance(MEMBER, PeftType)
    assert MEMBER is PeftType.TRPTS is PeftType("TRPTS") is trpts_peft.peft_type.TRPTS
    assert MEMBER.value == MEMBER == "TRPTS"
    assert MEMBER in list(PeftType)
    assert {MEMBER: 1}[PeftType("TRPTS")] == 1


def test_peft_finds_the_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is TRPTSConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] is TRPTSModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MEMBER] == TRPTSModel.prefix == "trpts_"


def test_registering_again_changes_nothing() -> None:
    before = len(PeftType), list(PEFT_TYPE_TO_CONFIG_MAPPING)
    trpts_peft.registration.register()
    importlib.import_module("trpts_peft")
    assert before == (len(PeftType), list(PEFT_TYPE_TO_CONFIG_MAPPING))


def test_reloading() -> None:
    script = (
        "import importlib, sys, trpts_peft, trpts_peft.peft_type as t, trpts_peft.registration as r\n"
        "from peft import PeftType; member = PeftType.TRPTS\n"
        "for module in (trpts_peft, t, r, trpts_peft): importlib.reload(module)\n"
        "for name in [n for n in sys.modules if n.startswith('trpts_peft')]: del sys.modules[name]\n"
        "import trpts_peft\n"
        "from peft import get_peft_model, mapping; from conftest import build_vit\n"
        "assert PeftType.TRPTS is member\n"
        "assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is trpts_peft.TRPTSConfig\n"
        "model = get_peft_model(build_vit(), trpts_peft.TRPTSConfig())\n"
        "assert type(model.base_model) is trpts_peft.TRPTSModel\n"
        "import tempfile, pytest; from peft import PeftModel; base, folder = build_vit(), tempfile.mkdtemp()\n"
        "model.save_pretrained(folder); open(f'{folder}/adapter_model.safetensors', 'w').close()\n"
        "with pytest.raises(Exception): PeftModel.from_pretrained(base, folder)\n"
        "assert base.state_dict().keys() == build_vit().state_dict().keys()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH}
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_and_copying(protocol: int) -> None:
    config = TRPTSConfig(keep_rate=0.5)
    for thing in (MEMBER, config):
        assert pickle.loads(pickle.dumps(thing, protocol)) == thing
        assert copy.deepcopy(thing) == thing
    assert pickle.loads(pickle.dumps(MEMBER, protocol)) is copy.deepcopy(MEMBER) is copy.copy(MEMBER) is MEMBER


def test_builtin_members_pickle_as_before() -> None:
    assert pickle.loads(pickle.dumps(PeftType.LORA)) is PeftType.LORA
    assert b"trpts" not in pickle.dumps(PeftType.LORA)


def test_a_new_process_unpickles_config_and_member() -> None:
    """The pickle alone has to bring the package in, as in a spawned worker."""
    script = (
        "import pickle, sys; member, config = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "from peft import PeftType; assert member is PeftType.TRPTS and config.keep_rate == 0.5"
    )
    result = run(script, pickle.dumps((MEMBER, TRPTSConfig(keep_rate=0.5))).hex())
    assert result.returncode == 0, result.stderr


def test_config_travels_through_json(tmp_path: Path) -> None:
    config = TRPTSConfig(keep_rate=0.7, token_layers=[1, 2], connections={"a.b": 2}, selected_token_layers=[1])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is TRPTSConfig
    assert loaded.to_dict() == config.to_dict()


def test_a_process_that_never_imports_the_package(tmp_path: Path) -> None:
    """PEFT has no discovery of plugins: the message is PEFT's own, and the README says which line is missing."""
    get_peft_model(build_vit(), TRPTSConfig()).save_pretrained(tmp_path)
    result = run("import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])", str(tmp_path))
    assert result.returncode != 0
    assert "TRPTS" in result.stderr.splitlines()[-1]


def test_lora_is_not_touched(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path)
    assert torch.equal(loaded(build_images()).logits, model(build_images()).logits)


def test_lora_is_loaded_into_compiled_blocks_as_before(tmp_path: Path) -> None:
    def model(seed: int) -> PeftModel:
        base = build_vit()
        for index, block in enumerate(base.vit.layers):
            base.vit.layers[index] = torch.compile(block, backend="eager")
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(base, config).eval()

    images, first, second = build_images(), model(0), model(1)
    first.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = first(images).logits
        assert not torch.equal(second(images).logits, expected)
        second.load_adapter(tmp_path, "default")
        assert torch.equal(second(images).logits, expected)
        base = second.unload()
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(images).logits, expected)


def test_the_state_dict_of_a_compiled_lora_is_saved_as_before(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, state_dict=torch.compile(model, backend="eager").state_dict())
    assert all(name.startswith("_orig_mod.") for name in load_file(tmp_path / "adapter_model.safetensors"))
