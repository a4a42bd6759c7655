"""Parts of what a finished run leaves that need no run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from conftest import LabelledImages, build_images, build_vit
from trpts_peft import TRPTSConfig, calibrate, record_tokens
from trpts_peft.report import license_of, measured_speedup


def test_measuring_speed_leaves_the_model_as_it_was() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(keep_rate=0.25, token_layers=[0]))
    calibrate(model, LabelledImages(6), probe_head=False, progress=False)
    for name, parameter in model.named_parameters():
        if "trpts_values" in name:
            parameter.data.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert measured_speedup(model, build_images(2)) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with record_tokens(model) as record, torch.no_grad():
        model(build_images(1))
    assert len(record[0].kept[0]) == 16


def test_it_compares_all_tokens_with_the_selected_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a token moves by one: 65 of 65 enter the four blocks; 18 leave the first, with selection."""
    model = get_peft_model(build_vit(), TRPTSConfig(keep_rate=0.25, token_layers=[0])).eval()
    now = [0.0]
    for layer in model.get_base_model().vit.layers:
        layer.register_forward_hook(lambda module, args, output: now.append(now[-1] + args[0].shape[1]))
    monkeypatch.setattr("trpts_peft.report.time.perf_counter", lambda: now[-1])
    assert measured_speedup(model, build_images(1)) == 4 * 65 / (65 + 3 * 18)


@pytest.mark.parametrize(
    "card, expected",
    [
        (None, None),
        ("no front matter", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\na: [\n---\n", None),
    ],
)
def test_the_license_is_that_of_the_bases_card(tmp_path: Path, card: str | None, expected: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == expected


def test_a_base_that_cannot_be_asked_has_no_known_license() -> None:
    assert license_of("no/such") is None
