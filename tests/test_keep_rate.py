"""`set_keep_rate`: another rate with the same weights."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import load_checkpoint_in_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import build_images, build_vit, needs_adapter_methods
from trpts_peft import TRPTSConfig, apply_token_selection, calibrate, estimate_cost, set_keep_rate, set_token_selection
from trpts_peft.tuner_layer import TRPTSLayer
from trpts_peft.vit import adapter_selections, in_millionths, keep_rates_in_force, of_millionths


def adapted(keep_rate: float = 0.9, **options: Any) -> PeftModel:
    config = TRPTSConfig(**{"token_layers": [1, 2], "keep_rate": keep_rate, "init_weights": False, **options})
    torch.manual_seed(0)  # of the values
    return get_peft_model(build_vit(), config).eval()


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    return model(build_images()).logits


@pytest.mark.parametrize("merged", [False, True])
def test_outputs_are_those_of_an_adapter_with_that_rate(merged: bool) -> None:
    model, other = adapted(0.9), adapted(0.5)
    if merged:
        model.merge_adapter()
        other.merge_adapter()
    assert not torch.allclose(predict(model), predict(other))
    set_keep_rate(model, 0.5)
    assert torch.equal(predict(model), predict(other))
    assert keep_rates_in_force(model) == {1: 0.5, 2: 0.5}
    assert estimate_cost(model).tokens == estimate_cost(other).tokens


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_what_is_wrapped_around_the_model_follows(wrap: Any, tmp_path: Path) -> None:
    model, other = adapted(0.9), adapted(0.5)
    wrapped = wrap(model)
    before = predict(wrapped)
    with torch.inference_mode():
        set_keep_rate(wrapped, 0.5)
    assert not torch.allclose(predict(wrapped), before)
    torch.testing.assert_close(predict(wrapped), predict(other))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted()
    set_keep_rate(model, 0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path).eval()
    assert loaded.peft_config["default"].keep_rate == 0.5
    assert torch.equal(predict(loaded), predict(model))


def test_rate_one_keeps_all_tokens_and_may_be_lowered_again(tmp_path: Path) -> None:
    model = adapted()
    before = predict(model)
    set_keep_rate(model, 1)
    assert keep_rates_in_force(model) == {}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path).eval()
    set_keep_rate(loaded, 0.9)
    assert torch.equal(predict(loaded), before)


def test_it_is_of_the_named_adapter_alone() -> None:
    model = adapted()
    model.add_adapter("other", TRPTSConfig(token_layers=[2], keep_rate=0.5))
    before = predict(model)
    config = model.peft_config["other"]
    set_keep_rate(model, 0.25, "other")
    assert torch.equal(predict(model), before)
    model.set_adapter("other")
    assert keep_rates_in_force(model) == {2: 0.25}
    assert (config.keep_rate, model.peft_config["other"].keep_rate) == (0.5, 0.25)  # the caller's object stays


@pytest.mark.parametrize("rate", [0, 1.5, True, "half", float("nan")])
def test_a_rate_out_of_range_changes_nothing(rate: Any) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="`keep_rate` must be"):
        set_keep_rate(model, rate)
    assert keep_rates_in_force(model) == {1: 0.9, 2: 0.9}
    assert model.peft_config["default"].keep_rate == 0.9


def test_adapters_in_force_together_keep_one_rate() -> None:
    model = adapted()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="must select tokens alike"):
        set_keep_rate(model, 0.5, "other")
    assert keep_rates_in_force(model) == {1: 0.9, 2: 0.9}
    assert model.peft_config["other"].keep_rate == 0.9
    set_token_selection(model, False)
    set_keep_rate(model, 0.5, "other")  # with all tokens they go together, whatever their rates
    assert model.peft_config["other"].keep_rate == 0.5


def test_an_adapter_that_selects_nowhere_has_no_rate_to_set() -> None:
    with pytest.raises(ValueError, match=r"`adapter_name` must be of an adapter that selects tokens, got 'default'"):
        set_keep_rate(adapted(token_layers=0), 0.5)
    with pytest.raises(ValueError, match="`model` must hold a TR-PTS adapter"):
        set_keep_rate(build_vit(), 0.5)


def test_a_model_that_selects_at_fixed_rates_has_another_call_for_it() -> None:
    with pytest.raises(ValueError, match=r"call `apply_token_selection\(model, \{block: rate\}\)`"):
        set_keep_rate(adapted().merge_and_unload(), 0.5)
    vit = build_vit()
    apply_token_selection(vit, {1: 0.5})
    with pytest.raises(ValueError, match="`apply_token_selection"):
        set_keep_rate(vit, 0.5)
    with pytest.raises(ValueError, match="which keeps all of them"):
        set_keep_rate(get_peft_model(vit, TRPTSConfig(token_layers=0)), 0.5)


def load_state(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    model.load_state_dict(state)


def load_in_place(model: nn.Module, state: dict[str, Tensor], _folder: Path) -> None:
    """As `torch.distributed.checkpoint.load` does."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


def load_past_state_dict(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    load_checkpoint_in_model(model, folder, device_map={"": "cpu"})
    model.eval()


@pytest.mark.parametrize("load", [load_state, load_past_state_dict])
@pytest.mark.parametrize("copied", [False, True])
def test_a_rate_that_a_state_dict_brings_is_the_adapters_everywhere(load: Any, copied: bool, tmp_path: Path) -> None:
    model, other = adapted(0.9), adapted(1 / 3)  # which a record in millionths rounds down
    config = model.peft_config["default"]
    if copied:
        for _ in range(2):  # a copy's tensors count their writes from one, whatever these have counted
            model.load_state_dict(model.state_dict())
        model = copy.deepcopy(model)
    (tmp_path / "all").mkdir()
    load(model, other.state_dict(), tmp_path / "all")
    assert torch.equal(predict(model), predict(other))
    assert keep_rates_in_force(model) == {1: 1 / 3, 2: 1 / 3}
    assert model.peft_config["default"].keep_rate == 1 / 3
    assert config.keep_rate == 0.9  # the caller's
    assert estimate_cost(model).tokens == estimate_cost(other).tokens
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path).eval()), predict(other))
    set_keep_rate(model, 0.5)
    assert keep_rates_in_force(model.train()) == {1: 0.5, 2: 0.5}


def test_nothing_is_written_before_the_model_has_noticed_what_was_loaded(tmp_path: Path) -> None:
    model, other = adapted(0.9), adapted(0.5)
    for name, buffer in other.named_buffers():
        if "trpts_keep_ppm" in name:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._buffers[key] = buffer
    with pytest.raises(ValueError, match=r"`trpts_keep_ppm` must be .* 900000, got 500000: .* call `model\.eval\(\)`"):
        model.save_pretrained(tmp_path)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path).eval()), predict(other))


@pytest.mark.parametrize("record", [0, -1, 1_000_001])
def test_a_record_that_is_no_rate_is_not_followed(record: int, tmp_path: Path) -> None:
    model = adapted(0.9)
    before = predict(model)
    key = "base_model.model.vit.layers.1.token_selection.trpts_keep_ppm.default"
    model.load_state_dict({**model.state_dict(), key: torch.tensor(record)})
    assert torch.equal(predict(model), before)
    with pytest.raises(ValueError, match=rf"`trpts_keep_ppm` must be .* 900000, got {record}: .*set_keep_rate"):
        model.save_pretrained(tmp_path)
    set_keep_rate(model, 0.9)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("record", [1, 3, 500_000, 333_333, 666_667, 123_457, 999_999, 1_000_000])
def test_a_record_comes_back_as_it_was(record: int) -> None:
    assert in_millionths(of_millionths(record)) == record
    assert of_millionths(in_millionths(2 / 3)) == 2 / 3


def test_a_compiled_function_may_set_the_mode() -> None:
    model = adapted(0.5)

    def evaluated(images: Tensor) -> Tensor:
        return model.eval()(images).logits

    compiled = torch.compile(evaluated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(build_images()), predict(model))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Tensor]:
    """The folder of a calibrated adapter, and, at another rate since, its base model's state dict and predictions."""
    model = adapted(0.9, importance="magnitude")
    calibrate(model, None, probe_head=False, progress=False)
    model.save_pretrained(tmp_path)
    set_keep_rate(model, 0.5)
    return tmp_path, model.get_base_model().state_dict(), predict(model)


@needs_adapter_methods
@pytest.mark.parametrize(("passes", "load"), [(0, load_state), (1, load_state), (1, load_past_state_dict)])
def test_transformers_loader_may_be_followed_by_another(passes: int, load: Any, saved: Any) -> None:
    folder, state, expected = saved
    vit = build_vit()
    vit.load_adapter(str(folder))
    with torch.inference_mode():
        for _ in range(passes):  # the first one checks the file
            vit(build_images())
    (folder / "all").mkdir()
    load(vit, state, folder / "all")
    assert torch.equal(predict(vit.eval()), expected)
    assert vit.peft_config["default"].keep_rate == 0.5


@pytest.mark.parametrize("load", [load_state, load_past_state_dict, load_in_place])
def test_the_first_pass_of_an_injected_adapter_leaves_the_rate_that_came(load: Any, saved: Any) -> None:
    folder, state, expected = saved
    vit = inject_adapter_in_model(TRPTSConfig.from_pretrained(folder), build_vit())
    (folder / "all").mkdir()
    load(vit, state, folder / "all")
    for _ in range(2):
        assert torch.equal(predict(vit.eval()), expected)
    assert vit.peft_config["default"].keep_rate == 0.5


@needs_adapter_methods
def test_an_adapter_that_takes_the_place_of_a_deleted_one_is_followed(saved: Any) -> None:
    folder, state, expected = saved
    vit = build_vit()
    vit.load_adapter(str(folder))
    vit.delete_adapter("default")
    vit.load_adapter(str(folder))
    vit.load_state_dict(state)
    assert torch.equal(predict(vit.eval()), expected)
    assert vit.peft_config["default"].keep_rate == 0.5


@pytest.mark.filterwarnings("ignore:Adapter other was active which is now deleted")
def test_what_was_injected_to_receive_a_file_can_be_listed_and_deleted(saved: Any) -> None:
    folder, state, expected = saved
    vit = inject_adapter_in_model(TRPTSConfig.from_pretrained(folder), build_vit())
    assert get_peft_model_state_dict(vit).keys() == get_peft_model_state_dict(adapted().get_base_model()).keys()
    vit.load_state_dict(state)
    assert torch.equal(predict(vit.eval()), expected)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(TRPTSConfig.from_pretrained(folder), vit, "other")
    for module in vit.modules():
        if isinstance(module, TRPTSLayer):
            module.delete_adapter("other")
    vit.load_state_dict(state)


def test_a_record_without_an_entry_is_not_looked_into() -> None:
    model = adapted(0.5).to("meta").eval()
    assert keep_rates_in_force(model) == {1: 0.5, 2: 0.5}
    fake = adapted(0.5)
    with FakeTensorMode() as mode:
        for selection in adapter_selections(fake.get_base_model()).values():
            selection.trpts_keep_ppm["default"] = mode.from_tensor(selection.trpts_keep_ppm["default"])
            selection.eval()
    assert keep_rates_in_force(fake) == {1: 0.5, 2: 0.5}
