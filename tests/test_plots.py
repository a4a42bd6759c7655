"""The figures show the numbers they are given, leave matplotlib's state and the model alone, and refuse bad input."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessorPil

from conftest import PREFIX, LabelledImages, build_images, build_vit
from trpts_peft import (
    Selection,
    TRPTSConfig,
    calibrate,
    plot_layer_importance,
    plot_overlap,
    plot_tokens,
    plots,
    record_tokens,
    set_token_selection,
)
from trpts_peft.plots import overlap

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _global_state_is_left_alone() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def selection(importance: dict[str, float], token_layers: tuple[int, ...] = (), **columns: Tensor) -> Selection:
    return Selection(importance=importance, connections={}, columns=columns, token_layers=token_layers)


def blocks(*weights: float) -> dict[str, float]:
    return {f"vit.layers.{index}": weight for index, weight in enumerate(weights)}


def draw(figure: Any) -> None:
    figure.savefig(io.BytesIO(), format="png")


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def ticks(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


# ---- figure 5 ----


def test_bars_are_the_importance_in_percent() -> None:
    ax = plot_layer_importance(selection(blocks(0.5, 0.125, 0.375), (1,)))
    assert [bar.get_height() for bar in ax.patches] == [50.0, 12.5, 37.5]
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in ax.patches] == [0, 1, 2]
    assert ticks(ax) == ["0", "1", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("transformer block", "share of top-scoring weights (%)")
    assert [tuple(line.get_xydata()[0]) for line in ax.lines] == [(1.0, 12.5)]
    assert legend(ax) == ["selects tokens"]
    draw(ax.figure)


def test_blocks_stand_in_the_order_of_their_numbers() -> None:
    importance = {f"vit.layers.{index}": index / 66 for index in (10, 2, 11, 1, 9)} | {"classifier": 0.5}
    ax = plot_layer_importance(selection(importance))
    assert ticks(ax) == ["1", "2", "9", "10", "11", "classifier"]
    heights = {round(bar.get_x() + 0.4): bar.get_height() for bar in ax.patches}
    assert [heights[place] for place in range(6)] == [
        100 * share for share in (1 / 66, 2 / 66, 9 / 66, 10 / 66, 11 / 66, 0.5)
    ]
    assert (ax.get_xlabel(), legend(ax)) == ("unit", [])


def test_linears_as_units_are_marked_by_their_block() -> None:
    names = [f"vit.layers.{block}.mlp.{linear}" for block in (1, 11) for linear in ("fc1", "fc2")]
    ax = plot_layer_importance(selection(dict.fromkeys(names, 0.25), (1,)))
    assert ticks(ax) == ["1.mlp.fc1", "1.mlp.fc2", "11.mlp.fc1", "11.mlp.fc2"]
    assert [line.get_xydata()[0][0] for line in ax.lines] == [0, 1]


def test_blocks_are_told_apart_however_deep_they_lie() -> None:
    deep = plot_layer_importance(selection({f"towers.0.vit.layers.{index}": 0.5 for index in (0, 1)}, (1,)))
    assert ticks(deep) == ["0", "1"] and [line.get_xydata()[0][0] for line in deep.lines] == [1]
    stages = plot_layer_importance(selection({f"swin.layers.{stage}.blocks.0": 0.5 for stage in (0, 1)}))
    assert ticks(stages) == ["0.blocks.0", "1.blocks.0"]


def test_a_dollar_sign_in_a_name_is_no_formula() -> None:
    ax = plot_layer_importance(selection({r"$\frac{$": 1.0}))
    draw(ax.figure)
    assert ticks(ax) == [r"$\frac{$"]


def test_several_selections_stand_side_by_side() -> None:
    sources = {"one": selection(blocks(0.75, 0.25), (0,)), "two": selection(blocks(0.5, 0.3, 0.2), (2,))}
    ax = plot_layer_importance(sources)
    assert [bar.get_height() for bar in ax.patches] == [75, 25, 50, 30, 20]
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
    assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(spans))
    colors = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert len(set(colors)) == 2
    assert [(line.get_xydata()[0][1], to_hex(line.get_color())) for line in ax.lines] == [
        (75, colors[0]),
        (20, colors[-1]),
    ]
    assert legend(ax) == ["one", "two", "selects tokens"]


def test_axes_that_are_given_are_drawn_on() -> None:
    upper, lower = Figure().subplots(2)
    assert plot_layer_importance(selection(blocks(0.6, 0.4), (1,)), ax=lower) is lower
    assert not upper.patches
    assert len(lower.patches) == 2
    assert plot_overlap({label: selection({}, l=torch.tensor([[0]])) for label in "ab"}, ax=upper) is upper


@pytest.mark.parametrize("source", [None, blocks(1.0), [selection(blocks(1.0))], {"a": None}])
def test_importance_wants_selections(source: Any) -> None:
    with pytest.raises(TypeError, match=r"`source` must be a Selection or \{label: Selection\}, got .*calibrate"):
        plot_layer_importance(source)


def test_importance_wants_something_to_draw() -> None:
    with pytest.raises(ValueError, match="`source` must hold at least 1 labelled"):
        plot_layer_importance({})


# ---- figure 6 ----


def selecting_vit(family: str = "vit", **options: Any) -> Any:
    config = TRPTSConfig(**{"keep_rate": 0.5, "token_layers": [1, 2], **options})
    return get_peft_model(build_vit(family, attn_implementation="eager"), config).eval()


def shown(ax: Axes) -> Any:
    return np.asarray(ax.images[0].get_array())


def stretched(pixels: Tensor) -> Any:
    array = pixels.permute(1, 2, 0).numpy().astype(np.float64)
    return (array - array.min()) / (array.max() - array.min())


def naive_kept(model: Any, pixels: Tensor, block: int, rate: float, prefix: int) -> list[set[int]]:
    """The kept patches of the first selecting block, from the attention weights of a dense pass."""
    set_token_selection(model, False)
    with torch.no_grad():
        attention = model(pixel_values=pixels, output_attentions=True).attentions[block]
    set_token_selection(model, True)
    importance = attention[:, :, 0, prefix:].mean(1)
    count = int(rate * importance.shape[1])
    return [set(row.argsort(descending=True)[:count].tolist()) for row in importance]


@pytest.mark.parametrize(("family", "prefix"), PREFIX.items())
def test_kept_patches_are_shown_and_merged_ones_are_gray(family: str, prefix: int) -> None:
    model, pixels = selecting_vit(family), build_images(2)
    axes = np.array(plot_tokens(model, pixels).axes).reshape(2, 3)
    kept = naive_kept(model, pixels, 1, 0.5, prefix)
    for row in range(2):
        image = stretched(pixels[row])
        np.testing.assert_allclose(shown(axes[row, 0]), image, atol=1e-6)
        drawn = shown(axes[row, 1])
        for patch in range(64):
            place = np.s_[patch // 8 * 4 : patch // 8 * 4 + 4, patch % 8 * 4 : patch % 8 * 4 + 4]
            assert np.allclose(drawn[place], image[place], atol=1e-6) == (patch in kept[row])
            if patch not in kept[row]:
                assert np.ptp(drawn[place], axis=2).max() == 0  # no color
        assert [ax.get_xlabel() for ax in axes[row, :2]] == ["64 patches", "32 kept"]


def test_the_default_device_is_not_drawn_on() -> None:
    model, pixels = selecting_vit(), build_images(2)
    processor = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    columns = {"fc1": torch.tensor([[0, 1], [2, 3]])}
    with torch.device("meta"):
        draw(plot_tokens(model, pixels, processor=processor))
        assert overlap(columns, columns) == 1


def test_each_selecting_block_has_a_column() -> None:
    model, pixels = selecting_vit(), build_images(3)
    with record_tokens(model) as record, torch.no_grad():
        model(pixel_values=pixels)
    figure = plot_tokens(model, pixels, max_images=2)
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["image", "block 1", "block 2"]
    for row in range(2):
        kept = record[2].kept[row]
        drawn = (np.abs(shown(axes[row, 2]) - shown(axes[row, 0])) < 1e-6).all(2)
        patches = drawn.reshape(8, 4, 8, 4).all((1, 3)).flatten()
        assert np.flatnonzero(patches).tolist() == kept.tolist()
        assert axes[row, 2].get_xlabel() == f"{len(kept)} kept"
    draw(figure)


def test_a_processor_shows_images_in_their_own_colors() -> None:
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1])
    colors = np.random.default_rng(0).integers(60, 200, (3, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in colors]
    model = selecting_vit()
    figure = plot_tokens(model, [*pictures, None], processor=processor, max_images=2)  # the rest is not looked at
    assert len(figure.axes) == 6
    for row in range(2):
        np.testing.assert_allclose(shown(figure.axes[3 * row]), colors[row] / 255, atol=1e-5)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    again = plot_tokens(model, pixels, processor=processor, max_images=2)
    np.testing.assert_allclose(shown(again.axes[4]), shown(figure.axes[4]), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_a_processor_gets_colors(mode: str) -> None:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.fromarray(np.random.default_rng(0).integers(60, 200, (32, 32), dtype=np.uint8)).convert(mode)
    one, other = (plot_tokens(selecting_vit(), [each], processor=processor) for each in (image, image.convert("RGB")))
    np.testing.assert_array_equal(shown(one.axes[1]), shown(other.axes[1]))


def test_an_image_of_as_many_patches_but_another_size() -> None:
    figure = plot_tokens(selecting_vit(), build_images(1, image_size=34))
    assert figure.axes[0].get_xlabel() == "64 patches"


def test_another_image_size_and_gray_images() -> None:
    model = get_peft_model(build_vit(num_channels=1, patch_size=8), TRPTSConfig(keep_rate=0.5, token_layers=[0]))
    pixels = build_images(1)[:, :1, :23, :30]  # two by three patches, and a rest that no patch covers
    figure = plot_tokens(model, pixels)
    image, drawn = shown(figure.axes[0]), shown(figure.axes[1])
    assert image.shape == drawn.shape == (23, 30, 3)
    assert figure.axes[0].get_xlabel() == "6 patches"
    assert (drawn[16:] == image[16:]).all()
    assert (drawn[:, 24:] == image[:, 24:]).all()
    covered = (drawn[:16, :24] == image[:16, :24]).reshape(2, 8, 3, 8, 3).all((1, 3, 4))
    assert covered.sum() == 3


def test_patches_that_are_not_square() -> None:
    model = get_peft_model(build_vit(patch_size=[8, 4]), TRPTSConfig(keep_rate=0.5, token_layers=[0]))
    figure = plot_tokens(model, build_images(1))
    image, drawn = shown(figure.axes[0]), shown(figure.axes[1])
    assert (drawn == image).reshape(4, 8, 8, 4, 3).all((1, 3, 4)).sum() == 16


def test_the_model_is_left_as_it_was() -> None:
    model = selecting_vit(train_bias=False).train()
    model.get_base_model().vit.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    during: list[bool] = []
    model.get_base_model().classifier.register_forward_hook(
        lambda module, _args, output: during.extend([module.training, output.requires_grad])
    )
    plot_tokens(model, build_images(1))
    assert during == [False, False]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(not module._forward_hooks for block in (1, 2) for module in [model.get_base_model().vit.layers[block]])


def test_a_model_that_selects_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="`model` must select tokens"):
        plot_tokens(build_vit(), build_images(1))
    model = selecting_vit()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"`model` must select tokens .*set_token_selection"):
        plot_tokens(model, build_images(1))
    set_token_selection(model, False)
    with pytest.raises(ValueError, match=r"`model` must select tokens .*set_token_selection"):
        plot_tokens(model, build_images(1))


def test_images_are_checked() -> None:
    model = selecting_vit()
    with pytest.raises(ValueError, match=r"`images` must be a batch of shape .*, got \(3, 32, 32\).*unsqueeze"):
        plot_tokens(model, build_images(1)[0])
    with pytest.raises(ValueError, match=r"`images` must be a batch of shape .*, got \(0, 3, 32, 32\)"):
        plot_tokens(model, build_images(0))
    with pytest.raises(TypeError, match=r"`images` must be a tensor .* no `processor`, got list\. Pass"):
        plot_tokens(model, [Image.new("RGB", (32, 32))])
    with pytest.raises(ValueError, match="`images` must hold at least one image, got none"):
        plot_tokens(model, [], processor=ViTImageProcessorPil())
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="`max_images` must be an integer of at least 1, got"):
            plot_tokens(model, build_images(1), max_images=wrong)  # type: ignore[arg-type]


# ---- figure 7 ----


def naive_overlap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    sets: list[set[tuple[str, int, int]]] = [set(), set()]
    for positions, side in zip(sets, (a, b), strict=True):
        for name, rows in side.items():
            for row, columns in enumerate(rows.tolist()):
                positions.update((name, row, column) for column in columns)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def random_columns(seed: int, names: str, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(7, 9, generator=generator).argsort(1)[:, :count].sort(1).values for name in names}


@pytest.mark.parametrize(("names", "count"), [("abc", 3), ("bcd", 4), ("d", 2), ("abc", 9)])
def test_overlap_is_that_of_the_sets(names: str, count: int) -> None:
    one, other = random_columns(0, "abc", 3), random_columns(1, names, count)
    assert overlap(one, other) == overlap(other, one) == naive_overlap(one, other)


def test_overlap_of_equal_and_of_wide_layers() -> None:
    one = random_columns(0, "ab", 3)
    assert overlap(one, one) == 1.0
    wide = {"a": torch.tensor([[0, 70_000], [1, 2]])}
    assert overlap(wide, {"a": torch.tensor([[70_000], [70_000 - 2**16]])}) == 1 / 5


def test_overlap_refuses_nothing_and_other_models() -> None:
    with pytest.raises(ValueError, match="must hold trainable positions, got none"):
        overlap({}, {})
    with pytest.raises(ValueError, match="same base model, got 2 and 3 neurons in fc"):
        overlap({"fc": torch.zeros(2, 1).long()}, {"fc": torch.zeros(3, 1).long()})


def heat(ax: Axes) -> Any:
    return np.asarray(ax.images[0].get_array())


def test_the_heat_map_shows_every_pair() -> None:
    sides = {"one": random_columns(0, "ab", 3), "two": random_columns(1, "ab", 2), "three": random_columns(2, "b", 5)}
    ax = plot_overlap({label: selection({}, **columns) for label, columns in sides.items()})
    expected = [[naive_overlap(one, other) for other in sides.values()] for one in sides.values()]
    np.testing.assert_array_equal(heat(ax), expected)
    assert [text.get_text() for text in ax.texts] == [f"{share:.2f}" for row in expected for share in row]
    assert ticks(ax) == [label.get_text() for label in ax.get_yticklabels()] == list(sides)
    draw(ax.figure)


@pytest.mark.parametrize("label", [r"$\frac{$", "a$b$"])
def test_a_dollar_sign_in_a_label_is_no_formula(label: str) -> None:
    sources = {label: selection({}, **random_columns(0, "a", 2)), "b": selection({}, **random_columns(1, "a", 2))}
    draw(plot_overlap(sources).figure)
    ax = plot_layer_importance({name: selection(blocks(0.5, 0.5)) for name in sources})
    draw(ax.figure)
    assert legend(ax) == list(sources)


def test_adapters_of_a_model_are_compared() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(modules_to_save=["classifier"]))
    model.add_adapter("second", TRPTSConfig(modules_to_save=["classifier"], target_modules=["q_proj", "fc1"]))
    data = LabelledImages(24)
    selections = {"default": calibrate(model, data, progress=False)}
    model.set_adapter("second")
    selections["second"] = calibrate(model, data, progress=False)
    ax = plot_overlap(model)
    np.testing.assert_array_equal(heat(ax), heat(plot_overlap(selections)))
    assert 0 < heat(ax)[0, 1] < 1
    assert ticks(ax) == ["default", "second"]


def test_overlap_wants_two_of_a_kind() -> None:
    with pytest.raises(ValueError, match=r"`sources` must hold at least 2 labelled .*, got 1"):
        plot_overlap({"one": selection({}, a=torch.tensor([[0]]))})
    for model, count in (
        (build_vit(), 0),
        (selecting_vit(), 1),
        (get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"])), 0),
    ):
        with pytest.raises(ValueError, match=f"`sources` must be a model with at least two .*, got {count}"):
            plot_overlap(model)
    with pytest.raises(TypeError, match=r"`sources` must be a model or \{label: Selection\}, got Selection"):
        plot_overlap(selection({}, a=torch.tensor([[0]])))  # type: ignore[arg-type]


# ---- matplotlib itself ----


def test_figures_without_matplotlib_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install trpts-peft\[plots\]"):
        plot_layer_importance(selection(blocks(1.0)))
    with pytest.raises(ImportError, match=r"pip install trpts-peft\[plots\]"):
        plot_tokens(selecting_vit(), build_images(1))
    with pytest.raises(ImportError, match=r"pip install trpts-peft\[plots\]"):
        plot_overlap({label: selection({}, a=torch.tensor([[0]])) for label in "ab"})


def test_the_module_can_be_imported_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("trpts_peft.plots_again", plots.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
