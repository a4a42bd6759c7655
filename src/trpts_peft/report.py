"""What a finished run leaves behind: results.json, figures, the results in the model card, an upload."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from torch import Tensor, nn

from .card import drop_local_base, plain
from .cost import estimate_cost
from .families import find_family
from .folders import first_line
from .image_data import ImageData, with_pixel_values
from .inspection import read_selection
from .plots import plot_layer_importance, plot_tokens
from .run_folder import read_json, write_json
from .selection import Selection
from .vit import keep_rates_in_force, set_token_selection

__all__ = [
    "check_upload",
    "draw_figures",
    "license_of",
    "measured_speedup",
    "read_results",
    "result_folder",
    "start_card",
    "summary",
    "upload",
    "write_report",
]

logger = logging.getLogger(__name__)

_PACKAGES = ("trpts-peft", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
_ROUNDS, _TIMED_IMAGES = 9, 8


def write_report(
    output: Path,
    folder: Path,
    model: nn.Module,
    processor: Any,
    data: ImageData,
    *,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Figures, card and results of a run whose model is saved; results.json comes last, as the sign that all is there.

    Args:
        output: the run's folder.
        folder: where the adapter, or the model, was saved.
        model: the trained model, with its image processor and its data.
        settings, metrics, seconds: what goes into the results as it is.

    Returns:
        What results.json holds.
    """
    selects = isinstance(model, PeftModel) and settings["method"] == "trpts"
    pixels = torch.stack(with_pixel_values(data.test, processor)[:_TIMED_IMAGES]["pixel_values"])
    results: dict[str, Any] = {
        "settings": dict(settings),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "data": data.describe(),
        "preprocessing": json.loads(processor.to_json_string()),
        **{name: metrics[name] for name in ("accuracy", "accuracy_per_class", "loss")},
        "parameters": _parameters(model, pixels),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "seconds": dict(seconds),
        "speed": _speed(model, pixels),
        **(_about_selection(read_selection(folder)) if selects else {}),
        "figures": draw_figures(output / "figures", model, processor, data, folder) if selects else [],
    }
    _add_to_card(folder, results)
    write_json(output / "results.json", results)
    return results


def _about_selection(selection: Selection) -> dict[str, Any]:
    decided = {name: getattr(selection, name) for name in ("importance", "connections")}
    return {"selection": {**decided, "token_layers": list(selection.token_layers)}}


def result_folder(output: Path) -> Path:
    """Where a run saved what it trained: `adapter`, or `model` for methods that change the model itself."""
    return next((output / name for name in ("adapter", "model") if (output / name).is_dir()), output / "adapter")


def read_results(path: Path) -> dict[str, Any]:
    """What `write_report` wrote; a ValueError where it is not whole."""
    results = read_json(path)
    try:
        summary(results, path.parent)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"`output` must hold a whole {path.name}, got one without {error}: delete it.") from error
    return results


def summary(results: Mapping[str, Any], output: Path) -> str:
    """The results in a few lines."""
    rows = [
        ("accuracy", f"{results['accuracy']:.2f} %, mean per class {results['accuracy_per_class']:.2f} %"),
        ("trained", f"{results['parameters']['trainable']:,} parameters, {results['bytes']:,} bytes on disk"),
        *([("speed-up", _speed_in_words(results["speed"]))] if results["speed"] else []),
        ("results", str(output / "results.json")),
        ("saved", str(result_folder(output))),
    ]
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


# ---- figures and numbers ----


def _parameters(model: nn.Module, pixels: Tensor) -> dict[str, float]:
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if find_family(model) is None:
        return {"trainable": trainable}
    cost = estimate_cost(model, _size(pixels))
    return {
        "total": cost.total_parameters,
        "trainable": cost.trainable_parameters,
        "trainable_without_head": cost.trainable_parameters_without_head,
        "trainable_percent": cost.trainable_percent,
        "trainable_percent_without_head": cost.trainable_percent_without_head,
        "macs_per_image": cost.macs,
        "macs_per_image_with_all_tokens": cost.dense_macs,
    }


def _speed(model: nn.Module, pixels: Tensor) -> dict[str, float] | None:
    """Speed-up of inference by token selection: predicted from multiply-accumulates, and measured; None without any."""
    if not keep_rates_in_force(model):
        return None
    return {"predicted": estimate_cost(model, _size(pixels)).speedup, "measured": measured_speedup(model, pixels)}


def _size(pixels: Tensor) -> tuple[int, int]:
    """Height and width of the images as the model gets them, which need not be those that its config names."""
    return pixels.shape[2], pixels.shape[3]


def measured_speedup(model: nn.Module, pixel_values: Tensor) -> float:
    """Time of a forward pass with all tokens over that with the selected ones, merged; median over interleaved rounds.

    Args:
        model: a PeftModel that selects tokens; it is left as it was, though in eval mode.
        pixel_values: (B, 3, H, W).
    """
    assert isinstance(model, PeftModel)
    model.eval()
    pixels = pixel_values.to(next(model.parameters()).device)
    model.merge_adapter()
    try:
        with torch.inference_mode():
            ratios = [_seconds(model, pixels, False) / _seconds(model, pixels, True) for _ in range(_ROUNDS + 1)]
    finally:
        set_token_selection(model, True)
        model.unmerge_adapter()
    return statistics.median(ratios[1:])  # the first round allocates


def _seconds(model: nn.Module, pixels: Tensor, selects: bool) -> float:
    set_token_selection(model, selects)
    start = time.perf_counter()
    model(pixel_values=pixels)
    if pixels.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def draw_figures(folder: Path, model: nn.Module, processor: Any, data: ImageData, adapter: Path) -> list[str]:
    """Figures 5 and 6 of the paper for this run, as far as they can be drawn; returns their names.

    The first goes beside the adapter too, where its card shows it; the second shows images, and stays with the run.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    folder.mkdir(exist_ok=True)
    figures: dict[str, Callable[[], Any]] = {
        "layer_importance.png": lambda: plot_layer_importance(read_selection(adapter)).figure
    }
    if keep_rates_in_force(model):
        images = [image.convert("RGB") for image in data.test[:4]["image"]]
        figures["tokens.png"] = lambda: plot_tokens(model, images, processor=processor)
    drawn = [name for name, draw in figures.items() if _is_saved(draw, folder / name)]
    if "layer_importance.png" in drawn:
        (adapter / "layer_importance.png").write_bytes((folder / "layer_importance.png").read_bytes())
    return drawn


def _is_saved(draw: Callable[[], Any], path: Path) -> bool:
    """Draw a figure and save it; without one the results of the training are results all the same."""
    try:
        draw().savefig(path, dpi=120)
    except Exception as error:  # of a library with settings, styles and fonts of its own
        logger.error("%s could not be drawn: %s", path.name, first_line(error))
        path.unlink(missing_ok=True)
        return False
    return True


# ---- the model card ----


def start_card(folder: Path) -> None:
    """Put an empty card where PEFT would else put a long form to fill in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n", encoding="utf-8")


def _add_to_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Say in the model card what the run reached, and on which data."""
    path, settings = folder / "README.md", results["settings"]
    card = ModelCard.load(path)
    data: Any = card.data
    local = Path(settings["dataset"]).exists()
    name = Path(settings["dataset"]).name if local else settings["dataset"]
    data.metrics = ["accuracy"]
    data.pipeline_tag = "image-classification"
    if not local:
        data.datasets = [name]
    data.base_model = settings["model"]
    if (license := license_of(settings["model"])) is not None:
        data.license = license
    data.model_name = folder.resolve().parent.name
    data.eval_results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_split=results["data"]["test_split"],
            metric_type="accuracy",
            metric_value=round(results["accuracy"] / 100, 4),
        )
    ]
    card.text = f"{card.text.rstrip()}\n\n{_results_section(results, name)}\n"
    card.save(path)
    drop_local_base(folder)


def _results_section(results: Mapping[str, Any], dataset: str) -> str:
    settings, data, parameters, speed = (results[key] for key in ("settings", "data", "parameters", "speed"))
    percent = f" ({parameters['trainable_percent']:.3f} % of the model)" if "trainable_percent" in parameters else ""
    images = f"{data['train']:,} images to train on, {data['test']:,} to test on ({data['test_split']})"
    rows = [
        ("data", f"{plain(dataset)}: {images}"),
        ("accuracy", f"{results['accuracy']:.2f} %"),
        ("mean accuracy per class", f"{results['accuracy_per_class']:.2f} %"),
        ("trained", f"{parameters['trainable']:,} parameters{percent}, the head among them"),
        ("file", f"{results['bytes']:,} bytes"),
        *([("cost", _cost_in_words(parameters))] if "macs_per_image" in parameters else []),
        *([("speed-up by token selection", _speed_in_words(speed))] if speed else []),
        ("recipe", _recipe(settings)),
    ]
    lines = ["## Results", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    if "layer_importance.png" in results["figures"]:
        lines += ["", "![Share of the top-scoring weights in each block](layer_importance.png)"]
    return "\n".join(lines)


def _cost_in_words(parameters: Mapping[str, float]) -> str:
    """Giga-multiply-accumulates of one image."""
    macs, dense = (parameters[name] / 1e9 for name in ("macs_per_image", "macs_per_image_with_all_tokens"))
    return f"{macs:.3g} GMACs an image" + ("" if macs == dense else f", {dense:.3g} with all tokens")


def _speed_in_words(speed: Mapping[str, float]) -> str:
    return f"{speed['predicted']:.2f} predicted, {speed['measured']:.2f} measured"


def _recipe(settings: Mapping[str, Any]) -> str:
    return (
        f"{settings['epochs']} epochs of batches of {settings['batch_size']}, Adam, peak learning rate "
        f"{settings['learning_rate']:g}, cosine, no augmentation, seed {settings['seed']}"
    )


def license_of(model: str) -> str | None:
    """The license that the card of the base model names; None where none is to be had."""
    path = Path(model) / "README.md"
    if Path(model).is_dir() and not path.is_file():
        return None
    try:
        card = ModelCard.load(path if path.is_file() else model)
    except Exception:  # not there, not reachable, not valid: somebody else's card must not end a run
        return None
    name = card.data.get("license")
    return name if isinstance(name, str) else None


# ---- the Hub ----


def check_upload(repository: str) -> None:
    """Raise a ValueError now where `upload` would fail for want of a valid name or of a token."""
    with _hub_errors(repository):
        validate_repo_id(repository)
        HfApi().whoami()


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"`push_to_hub` must be user/name, got {repository!r}.") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"`push_to_hub` must be a repository that you may write to, got {repository!r}, and the Hub says: "
            f"{first_line(error)}"
        ) from error


def upload(folder: Path, repository: str) -> str:
    """Put the files of a saved adapter or model into a repository on the Hub, made if it is not there; returns its URL.

    Raises:
        ValueError: the Hub does not take them.
    """
    api = HfApi()
    with _hub_errors(repository):
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload adapter with its model card")
    return str(url)
