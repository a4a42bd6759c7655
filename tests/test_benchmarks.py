"""The cost benchmark on a tiny ViT: every table is filled, and what is counted can be counted by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig

from benchmarks import cost, figure, methods, onnx_runtime, report
from benchmarks.used_columns import used_shares
from measure import (
    interleaved_seconds,
    median_ratio,
    peak_bytes,
    ratio_interval,
    resident_bytes,
    saved_activation_bytes,
    training_step,
)
from tables import markdown_table

WIDTH, BLOCKS = 40, 12
DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 80, "num_attention_heads": 2, "patch_size": 56}
    monkeypatch.setattr(methods, "ViTConfig", partial(ViTConfig, num_hidden_layers=BLOCKS, **sizes))


@pytest.fixture
def results(tiny):
    settings = cost.Settings(rounds=1, bar_rounds=2, inference_rounds=1, fisher_images=2, shares=(0.1,), compiled=False)
    return cost.measure_all(settings)


def test_a_run_that_ends_early_has_its_sections_and_their_bars(tiny, capsys):
    written = []
    results = cost.measure_all(cost.Settings(), "disk", lambda results: written.append(list(results)))
    assert written == [["settings", "machine", "disk"]]
    bars = report.bars_of(results)
    assert [bar.limit for bar in bars] == [6, 4]
    report.print_report(results, bars)
    assert "| bytes per trainable weight, float32 | 6.000 |" in capsys.readouterr().out


def test_a_run_that_is_broken_off_leaves_its_sections_beside_an_earlier_one(tiny, monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["cost", "--only", "disk", "--output", str(tmp_path)])
    cost.main()
    earlier = (tmp_path / "cost.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
    monkeypatch.setattr("sys.argv", ["cost", "--output", str(tmp_path)])
    monkeypatch.setattr(cost, "training_rows", lambda settings, autocast=None: 1 / 0 if autocast else [{"method": "x"}])
    with pytest.raises(ZeroDivisionError):
        cost.main()
    torch.set_num_threads(threads)
    assert (tmp_path / "cost.json").read_text() == earlier
    assert list(json.loads((tmp_path / "cost.part.json").read_text())) == ["settings", "machine", "training"]


# peft's SHiRA makes sparse tensors.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_every_table_is_filled_and_every_bar_is_judged(results, capsys, tmp_path):
    bars = report.bars_of(results)
    report.print_report(results, bars)
    printed = capsys.readouterr().out
    for row in [*results["training"], *results["mixed"]]:
        assert f"| {row['method']} |" in printed
    assert report.mixed_batch_table(results["mixed_batches"]) in printed
    dealt = [(row["method"], row["adapters"]) for row in results["mixed_batches"]]
    assert dealt == [(method, count) for method in ("LoRA r=8", "TR-PTS") for count in (1, 2, 4, 8)]
    assert {row["method"] for row in results["training"]} >= {
        "frozen",
        "LoRA r=8",
        "TR-PTS",
        "full",
        "TR-PTS, U/in 0.1",
    }
    report.print_report({name: rows for name, rows in results.items() if name != "mixed"}, bars)
    assert printed.replace(report.mixed_table(results["mixed"]), "").count("|") == capsys.readouterr().out.count("|")
    assert [bar.limit for bar in bars] == [1.1, 1, 0.87, 0.78, 0.45, 0.78, 0.45, 1.35, 1, 0.95, 0.9, 0.05, 6, 4]
    assert [row["what"] for row in results["switching_bfloat16"]] == [row["what"] for row in results["switching"]]
    json.dumps({**results, "bars": [asdict(bar) for bar in bars]})
    on_a_gpu = report.bars_of({**results, "settings": {**results["settings"], "device": "cuda"}})
    assert [bar.limit for bar, other in zip(on_a_gpu, bars, strict=True) if bar.limit != other.limit] == [1.2]
    figure.draw(results, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    disk = {row["dtype"]: row["bytes_per_weight"] for row in results["disk"]}
    assert disk == {"float32": 6.0, "bfloat16": 4.0}
    by_method = {row["method"]: row for row in results["training"]}
    assert by_method["frozen"]["kept_bytes"] < by_method["TR-PTS"]["kept_bytes"] < by_method["full"]["kept_bytes"]
    assert {name for name, row in by_method.items() if len(row["seconds"]) == 1 + 2} == set(cost.COMPARED)
    assert all(len(row["seconds"]) == 1 for row in results["mixed"])
    linear, frozen = by_method["linear"], by_method["frozen"]
    assert linear["step_to_frozen"] == linear["seconds"][0] / frozen["seconds"][0]
    assert all(row["peak_bytes"] >= row["kept_bytes"] / 2 for row in results["training"])
    (fisher,) = results["fisher"]
    assert fisher["sum_bytes"] == 8 * BLOCKS * (4 * WIDTH**2 + 2 * WIDTH * 80)


def test_compiled_steps_are_timed_with_their_memory(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)  # it would take minutes
    rows = cost.compiled_rows(cost.Settings(rounds=1, train_batch=2))
    assert [row["method"] for row in rows] == list(cost.COMPILED)
    assert len(compiled) == len(rows)
    frozen, *_, full = rows
    assert frozen["step_to_frozen"] == 1
    assert full["peak_bytes"] > frozen["peak_bytes"] > cost.resting_bytes(compiled[0])
    assert f"| full | {full['step_to_frozen']:.2f} |" in report.compiled_table(rows)


def test_a_step_is_compiled_once(tiny):
    torch.compiler.reset()
    counter, batch = CompileCounter(), cost.drawn_batch(2, "cpu")
    step = training_step(torch.compile(methods.new_vit(), backend=counter, fullgraph=True))
    for _ in range(2):
        step(batch)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("frozen", WIDTH),
        ("linear", 0),
        ("BitFit", BLOCKS * (4 * WIDTH + 80 + WIDTH + 2 * WIDTH) + WIDTH + WIDTH),
        ("LoRA r=8", BLOCKS * 8 * (4 * 2 * WIDTH + 2 * (WIDTH + 80))),
        ("TR-PTS", BLOCKS * (5 * WIDTH + 80) * (3 + 1)),
    ],
)
def test_trainable_parameters_without_the_head(tiny, name, trained):
    model = methods.methods()[name]()
    counted = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    assert counted == trained
    assert any("classifier" in n and p.requires_grad for n, p in model.named_parameters())


def test_gradients_flow_through_every_block_of_the_frozen_model(tiny):
    model, reached = methods.methods()["frozen"](), []
    for block in model.vit.layers:
        block.register_full_backward_hook(lambda *_: reached.append(1))
    model(**cost.drawn_batch(2, "cpu")).loss.backward()
    assert len(reached) == BLOCKS
    assert not any(p.requires_grad for p in model.vit.layers.parameters())


def test_linears_use_the_share_of_their_inputs_that_is_asked_for(tiny):
    shares = used_shares(methods.trpts(shares=methods.everywhere(0.2)))
    assert shares == {kind: pytest.approx(0.2) for kind in methods.LINEARS}


def test_onnx_runtime_is_timed_with_and_without_all_tokens(tiny, monkeypatch):
    monkeypatch.setattr(onnx_runtime, "ROUNDS", 1)
    table = onnx_runtime.rows()
    assert [row[0] for row in table] == ["8", "1"]
    for _, speedup, ideal, share in table:
        assert float(ideal) > 1
        assert float(share) == pytest.approx(float(speedup) / float(ideal), abs=2e-3)


@pytest.mark.parametrize(("measured", "holds"), [(0.9, ["yes", "yes", "NO"]), (1.0, ["yes", "NO", "yes"])])
def test_bars(measured, holds):
    assert [report.Bar("x", measured, sign, 1.0).holds for sign in ("≤", "<", "≥")] == holds


# ---- measuring ----


def test_the_peak_counts_what_is_alive_at_a_time():
    def action():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2 + 1

    assert 12_000 <= peak_bytes(action) < 12_100  # three tensors, and the numbers 1 and 2


def test_saved_activations_count_each_storage_once_and_nothing_that_led_nowhere():
    model = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)

    class Output(dict):
        loss = property(lambda self: self["loss"])

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, pixel_values):
            y = self.linear(pixel_values)
            pixel_values.exp().exp()
            return Output(loss=(y * y * 2).sum())

    assert saved_activation_bytes(Squared(), {"pixel_values": x}) == 4 * 8 * 4
    in_16_bits = 2 * (8 * 8 + 4 * 8)  # the weight that was converted, and y
    assert saved_activation_bytes(Squared(), {"pixel_values": x}, torch.bfloat16) == in_16_bits


def test_resident_bytes_count_each_storage_once():
    tensor = torch.zeros(10)
    assert resident_bytes(tensor, tensor[:3], torch.zeros(2)) == 48


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_computes_in_the_dtype_that_it_is_told(tiny, dtype):
    model, seen = methods.new_vit(), set()
    model.vit.layers[0].mlp.fc1.register_forward_hook(lambda _module, _args, y: seen.add(y.dtype))
    training_step(model, dtype)(cost.drawn_batch(2, "cpu"))
    assert seen == {dtype or torch.float32}


def test_actions_take_turns():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_ratios_are_taken_within_a_round():
    assert median_ratio([2.0, 30.0, 5.0], [1.0, 10.0, 2.0]) == 2.5


@pytest.mark.parametrize(("rounds", "place"), [(6, 1), (8, 1), (9, 2), (15, 4), (31, 10)])  # of the tables of the test
def test_the_interval_of_a_ratio_is_that_of_the_sign_test(rounds, place):
    ratios = [float(2 + (7 * number) % rounds) for number in range(rounds)]  # each once, in no order
    reference = [2.0 ** (number % 3) for number in range(rounds)]
    seconds = [ratio * its for ratio, its in zip(ratios, reference, strict=True)]
    assert ratio_interval(seconds, reference) == (1.0 + place, 2.0 + rounds - place)


def test_few_rounds_have_no_interval():
    assert ratio_interval([1.0] * 5, [1.0] * 5) is None


def test_the_page_shows_the_tables_of_the_recorded_runs():
    runs = {
        name: json.loads((DOCS / "benchmarks" / f"cost-{name.lower()}.json").read_text(encoding="utf-8"))
        for name in ("EPYC", "Xeon")
    }
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    bars, recorded = {name: report.bars_of(results) for name, results in runs.items()}, runs["Xeon"]
    for table in (
        report.bar_table(bars),
        report.training_table(recorded["training"]),
        report.fisher_table(recorded["fisher"]),
        report.inference_table(recorded["inference"]),
        report.forward_table(recorded["forward"]),
        report.switching_table(recorded["switching"]),
        report.disk_table(recorded["disk"]),
        report.mixed_table(recorded["mixed"]),
        report.compiled_table(recorded["compiled"]),
        report.mixed_batch_table(recorded["mixed_batches"]),
        report.switching_table(recorded["switching_bfloat16"]),
    ):
        assert f"\n\n{table}\n\n" in page
    for pair in zip(*bars.values(), strict=True):
        missed = " and ".join(dict.fromkeys(f"{bar.measured:.3f}" for bar in pair if bar.holds == "NO"))
        assert not missed or f"{missed} instead of {pair[0].limit:.2f}" in page


def test_the_readme_quotes_the_recorded_run():
    recorded = json.loads((DOCS / "benchmarks" / "cost-xeon.json").read_text(encoding="utf-8"))
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for what, section, method in (
        ("in 32 bits", "training", "TR-PTS"),
        ("in mixed precision (`bf16=True`)", "mixed", "TR-PTS"),
        ("compiled (`torch_compile=True`)", "compiled", "TR-PTS"),
        ("in 32 bits, blocks 3, 6 and 9 keep 80 % of their tokens", "training", "TR-PTS, keep rate 0.8"),
    ):
        rows = {row["method"]: row for row in recorded[section]}
        memory = rows[method]["peak_bytes"] / rows["LoRA r=8"]["peak_bytes"]
        assert f"\n| {what} | {rows[method]['step_to_lora']:.2f} | {memory:.2f} |\n" in readme
    (merged,) = (row for row in recorded["inference"] if [*row.values()][:3] == ["TR-PTS, keep rate 0.8", 8, False])
    assert f"predicts {merged['speedup']:.2f} times as fast" in readme


def test_a_bar_holds_if_it_does_in_every_run():
    high, low = ([report.Bar("x", measured, "≤", 2)] for measured in (3.0, 1.0))
    held = [report.bar_table(runs).endswith("| yes |") for runs in ({"a": low}, {"a": low, "b": high}, {"b": high})]
    assert held == [True, False, False]
    assert "| x | 1.000 | 3.000 | ≤ 2 | NO |" in report.bar_table({"a": low, "b": high})


def test_a_bar_shows_what_its_rounds_leave_open():
    settled, open_, missed = ([report.Bar("x", 1.0, "≤", limit, (0.5, 1.25))] for limit in (2, 1.1, 0.4))
    assert "| x | 1.000 (0.500 to 1.250) | ≤ 2 | yes |" in report.bar_table({"a": settled})
    assert "| ≤ 1.1 | open |" in report.bar_table({"a": open_, "b": settled})
    assert "| NO |" in report.bar_table({"a": open_, "b": missed})


def test_the_bars_of_predictions_and_scores_show_what_their_rounds_leave_open():
    mine, plain = [1.0, 2.0, 1.0, 1.0, 1.0, 1.0], [1.2, 2.8, 1.1, 1.5, 1.3, 1.25]
    prediction = {"model": "keep rate 0.8", "compiled": False, "batch": 8, "of_ideal": 1.0, "ideal": 1.25}
    fisher = {"fisher_to_plain": 0.8, "seconds": {"fisher": mine, "plain": plain}}
    fisher |= {"peak_bytes": 2, "score_bytes": 1, "workspace_bytes": 1, "activation_bytes": 1}
    results = {"settings": {"device": "cpu"}, "fisher": [fisher]}
    results["inference"] = [{**prediction, "seconds": mine, "plain_seconds": plain}, {**prediction, "seconds": mine}]
    scores, _, recorded, before = report.bars_of(results)
    assert scores.interval == pytest.approx((1 / 1.5, 1 / 1.1))
    assert recorded.interval == pytest.approx((1.1 / 1.25, 1.5 / 1.25))
    assert before.interval is None


def test_markdown_table():
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
