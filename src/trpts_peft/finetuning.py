"""Fine-tune an image classifier on a data set, from the pretrained model to results on disk; can be interrupted."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from .calibration import calibrate
from .callbacks import TRPTSCallback
from .config import TRPTSConfig
from .data import process_state
from .folders import first_line
from .image_data import ImageData, check_shapes, load_image_data, with_pixel_values
from .methods import METHODS
from .metrics import accuracy_of
from .pretrained import load_whole
from .report import check_upload, read_results, result_folder, start_card, write_report
from .run_folder import SETTINGS, check_data, check_output, hold, last_checkpoint, let_go, step_of, write_json
from .vit import forget_token_selection

__all__ = [
    "FinetuneRun",
    "FinetuneSettings",
    "check_finite",
    "finished",
    "load_classifier",
    "load_processor",
    "prepare",
    "saved_under_own_names",
]

_CALIBRATED = "calibrated"
_WARMUP = 0.1  # of all steps
_TRPTS_OPTIONS = ("keep_rate", "budget", "token_layers")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _trpts_option(name: str) -> Any:
    option = TRPTSConfig.__dataclass_fields__[name]
    return field(default=option.default, metadata={"help": option.metadata["help"]})


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run does. Every field is an option of `trpts finetune`; `trpts finetune --help` says what it means.

    Raises:
        ValueError: an option is out of its range, or belongs to another method.
    """

    model: str = field(metadata={"help": "Pretrained image classifier: an id on the Hub or a folder."})
    dataset: str = field(metadata={"help": "Data set: an id on the Hub, or a folder of images or of parquet files."})
    output: Path = field(metadata={"help": "Folder for the results; must be empty or not there."})
    method: Literal["trpts", "lora", "linear", "bitfit", "full"] = _option("trpts", "What to train.")
    epochs: int = _option(100, "Passes over the training images; the learning rate rises for the first tenth.")
    batch_size: int = _option(32, "Images per step, over all processes.")
    learning_rate: float | None = _option(None, "Peak learning rate of Adam. Without it: the usual one of the method.")
    keep_rate: float = _trpts_option("keep_rate")
    budget: float | None = _trpts_option("budget")
    token_layers: str = _option("3", "How many blocks select tokens (3), or which, each with a comma (3,6,9 or 5,).")
    num_train: int | None = _option(None, "Train on so many images, drawn with the seed. Without it: on all.")
    image_column: str | None = _option(None, "Column of the images. Without it: the only one there is.")
    label_column: str | None = _option(None, "Column of the labels. Without it: the only one of classes, or 'label'.")
    seed: int = _option(0, "Seed of all that is drawn.")
    bf16: bool = _option(False, "Train in bfloat16 autocast; the trained values stay float32.")
    num_workers: int = _option(0, "Processes that load images beside each process that calibrates and trains.")
    resume: bool = _option(False, "Go on with the run in the output folder, from its last checkpoint.")
    push_to_hub: str | None = _option(None, "Upload what was trained to this repository on the Hub, user/name.")
    report_to: str = _option("none", "Where Trainer reports to: tensorboard, wandb, ... or none.")

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("num_train", 2), ("seed", 0), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.seed >= 2**32:  # the bound of NumPy's
            raise ValueError(f"`seed` must be below 2**32, got {self.seed}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be a finite number above 0, got {self.learning_rate}.")
        if self.method != "trpts":
            given = [f.name for f in fields(self) if f.name in _TRPTS_OPTIONS and getattr(self, f.name) != f.default]
            if given:
                raise ValueError(f"`{given[0]}` must be left out with `method` {self.method!r}: it belongs to 'trpts'.")
        self.trpts_options()

    def trpts_options(self) -> dict[str, Any]:
        """The options of TRPTSConfig; raises where one is out of its range."""
        options: dict[str, Any] = {"keep_rate": self.keep_rate, "budget": self.budget, "seed": self.seed}
        parts = [part.strip() for part in self.token_layers.split(",")]
        if not all(part.isdecimal() for part in parts if part) or not parts[0]:
            raise ValueError(
                f"`token_layers` must be a number or block indices with commas, got {self.token_layers!r}."
            )
        numbers = [int(part) for part in parts if part]
        options["token_layers"] = numbers if "," in self.token_layers else numbers[0]
        TRPTSConfig(**options)
        return options

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate asked for, else the method's."""
        return METHODS[self.method].learning_rate if self.learning_rate is None else self.learning_rate

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with the learning rate in force."""
        return {**asdict(self), "output": str(self.output), "learning_rate": self.peak_learning_rate}

    @property
    def reporters(self) -> list[str]:
        """The names in `report_to`; none for `none`."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [] if names == ["none"] else names


@dataclass
class FinetuneRun:
    """A run that is ready to train: all that can be refused beforehand was looked at.

    Attributes:
        settings: what was asked for.
        data: the checked images.
        processor: the model's image processor.
        model: the model with what it trains.
        state: this process among the others.
        seconds: wall time of each stage so far, in this process.
        lock: keeps other runs from the output folder, in the main process, from when it is set up until it is trained.
        ended: whether it was trained, to its end or not.
    """

    settings: FinetuneSettings
    data: ImageData
    processor: Any
    model: nn.Module
    state: PartialState
    seconds: dict[str, float] = field(default_factory=dict)
    lock: FileLock | None = None
    ended: bool = False

    def train(self) -> dict[str, Any]:
        """Train from the last whole checkpoint, or from the start; test once; write everything; return the results.

        An interrupted call leaves its checkpoints, from which a run with `resume` goes on.

        Raises:
            FloatingPointError: the training diverged. Its checkpoints are left.
            RuntimeError: it was called before. The output folder may be another run's by now.
        """
        if self.ended:
            raise RuntimeError("`train` must be called once, got a second call: `prepare` a run with `resume`.")
        self.ended = True
        try:
            return self._train()
        finally:
            if self.lock is not None:
                let_go(self.lock)

    def _train(self) -> dict[str, Any]:
        trainer = self._trainer()
        checkpoint = last_checkpoint(self._checkpoints)
        with _timed(self.seconds, "training"), saved_under_own_names(self.model):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        with _timed(self.seconds, "testing"):
            metrics = trainer.evaluate()
        check_finite(self.model, metrics["eval_loss"], self.settings.peak_learning_rate)
        resumed = 0 if checkpoint is None else step_of(checkpoint)
        results: dict[str, Any] = {}
        if self.state.is_main_process:
            results = self._write(trainer, metrics, resumed)
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        self.state.wait_for_everyone()
        return results

    @property
    def _checkpoints(self) -> Path:
        return self.settings.output / "checkpoints"

    def _trainer(self) -> Trainer:
        settings, accelerated = self.settings, self.state.device.type != "cpu"
        per_process = settings.batch_size // self.state.num_processes
        arguments = TrainingArguments(
            output_dir=str(self._checkpoints),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=per_process,
            per_device_eval_batch_size=per_process,
            learning_rate=settings.peak_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=_WARMUP,
            weight_decay=0.0,  # the paper trains with Adam, not AdamW
            bf16=settings.bf16,
            seed=settings.seed,
            save_strategy="epoch",
            save_total_limit=2,  # the one before is still whole if a run ends while the last is written
            logging_strategy="epoch",
            report_to=settings.reporters or "none",
            remove_unused_columns=False,  # the transform makes its columns from those of the data set
            label_names=["labels"],
            dataloader_num_workers=settings.num_workers,
            dataloader_pin_memory=accelerated,
            use_cpu=not accelerated,
        )
        # Without a launcher Trainer would give each GPU of the machine a batch of this size.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Trainer(
            self.model,
            arguments,
            train_dataset=with_pixel_values(self.data.train, self.processor),
            eval_dataset=with_pixel_values(self.data.test, self.processor),
            processing_class=self.processor,
            compute_metrics=accuracy_of,
            preprocess_logits_for_metrics=_predictions,
        )
        if settings.method == "trpts" and settings.reporters:
            trainer.add_callback(TRPTSCallback(trainer))
        return trainer

    def _write(self, trainer: Trainer, metrics: Mapping[str, float], resumed: int) -> dict[str, Any]:
        folder = self.settings.output / ("adapter" if isinstance(self.model, PeftModel) else "model")
        start_card(folder)
        cast(Any, self.model).config.save_pretrained(folder)  # beside an adapter: for the names of the classes
        cast(Any, self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        steps = {"steps": trainer.state.global_step, "resumed_from_step": resumed}
        return write_report(
            self.settings.output,
            folder,
            self.model,
            self.processor,
            self.data,
            settings=self.settings.to_dict(),
            metrics={key.removeprefix("eval_"): value for key, value in metrics.items()},
            seconds={**self.seconds, **steps},
        )


def prepare(settings: FinetuneSettings) -> FinetuneRun:
    """Look at everything that a run needs, calibrate, and set up the output folder.

    Raises:
        ValueError: an id is unknown, the data or the model do not fit, or the output folder holds something else.
            Nothing is written then.
    """
    state = process_state()
    _check_targets(settings)
    if settings.batch_size % state.num_processes:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of processes, {state.num_processes}, "
            f"got {settings.batch_size}."
        )
    _check_reporters(settings)
    processor = load_processor(settings.model)  # before all images are looked at: an unknown id is found at once
    data = load_image_data(
        settings.dataset,
        image_column=settings.image_column,
        label_column=settings.label_column,
        num_train=settings.num_train,
        seed=settings.seed,
        progress=state.is_main_process,
    )
    check_data(settings.output, data.describe())
    set_seed(settings.seed)
    base = load_classifier(settings.model, data.names)
    forget_token_selection(base)  # rates that a merged model carries are none of this run's
    _check_fit(base, data, processor)
    run = FinetuneRun(settings, data, processor, base, state)
    run.model = _adapted(run, base)
    _take_output(run)
    return run


def _take_output(run: FinetuneRun) -> None:
    """Set up the output folder in the main process; where that fails, all processes fail."""
    failure: Exception | None = None
    if run.state.is_main_process:
        try:
            run.lock = _set_up(run)
        except Exception as error:  # whatever it is, the others wait to be told
            failure = error
    told = ["" if failure is None else first_line(failure)]
    broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[0]:
        raise ValueError(told[0])


def finished(settings: FinetuneSettings) -> dict[str, Any] | None:
    """The results of the run to resume, where it has come to its end; None where there is something left to do.

    Raises:
        ValueError: the output folder holds something else.
    """
    check_output(settings.output, settings.to_dict())
    path = settings.output / "results.json"
    return read_results(path) if path.is_file() and result_folder(settings.output).is_dir() else None


def _adapted(run: FinetuneRun, base: nn.Module) -> nn.Module:
    """The model with what it trains: calibrated, or as the interrupted run had calibrated it."""
    settings, calibrated = run.settings, run.settings.output / _CALIBRATED
    if settings.method == "trpts" and calibrated.is_dir():
        with _whole(calibrated):
            return PeftModel.from_pretrained(base, str(calibrated), is_trainable=True)
    model = METHODS[settings.method].apply(base, settings.trpts_options() if settings.method == "trpts" else {})
    model.to(run.state.device)
    if settings.method == "trpts":
        with _timed(run.seconds, "calibration"):
            rows = with_pixel_values(run.data.train, run.processor)
            loader = DataLoader(rows, collate_fn=default_data_collator, num_workers=settings.num_workers)
            calibrate(model, loader, batch_size=settings.batch_size, progress=True)
    return model


def _set_up(run: FinetuneRun) -> FileLock:
    """Take the output folder, and write what a resumed run starts from; whole or not at all."""
    output, settings = run.settings.output, run.settings.to_dict()
    lock = hold(output)
    try:
        if finished(run.settings) is not None:  # looks once more: another run may have been at work there meanwhile
            raise ValueError(
                f"`output` must hold a run with something left to do, got {str(output)!r}, where it has come to its "
                "end meanwhile: the same command reads its results."
            )
        write_json(output / SETTINGS, {**settings, "data": run.data.describe()})
        if run.settings.method == "trpts" and not (output / _CALIBRATED).is_dir():
            draft = output / f"{_CALIBRATED}.part"
            cast(PeftModel, run.model).save_pretrained(str(draft))
            os.replace(draft, output / _CALIBRATED)
    except BaseException:
        let_go(lock)
        raise
    return lock


def _check_targets(settings: FinetuneSettings) -> None:
    """What the run will write to at its end is looked at before its start."""
    check_output(settings.output, settings.to_dict())
    if settings.push_to_hub is not None:
        check_upload(settings.push_to_hub)


def _check_reporters(settings: FinetuneSettings) -> None:
    """Make each reporter once, now: Trainer would find out only after calibration that one is not installed."""
    try:
        for reporter in get_reporting_integration_callbacks(settings.reporters):
            reporter()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`report_to` must name reporters that are installed, got {settings.report_to!r}: {first_line(error)}"
        ) from error


def _check_fit(base: nn.Module, data: ImageData, processor: Any) -> None:
    """Run the model on two images, so that a processor of another model is not found out in the first epoch."""
    try:
        with torch.no_grad():
            base(torch.stack(with_pixel_values(data.train, processor)[:2]["pixel_values"]))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"`model` must take what its image processor makes of the images, got {first_line(error)}"
        ) from error
    check_shapes(data, processor)


def check_finite(model: nn.Module, loss: float, learning_rate: float) -> None:
    """Refuse a model that has diverged, with `loss` on its test images, before anything of it is saved."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not math.isfinite(loss) or not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise FloatingPointError(
            f"`learning_rate` must let the training converge, got {learning_rate:g}: the loss is {loss}. Start anew "
            "with a lower one."
        )


@contextmanager
def _whole(calibrated: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"`output` must hold a whole {calibrated.name!r}, got {first_line(error)} Delete that folder; the run then "
            "calibrates anew."
        ) from error


def load_processor(model: str) -> Any:
    """The image processor of a pretrained model; a ValueError where there is none."""
    with _model_errors(model):
        return AutoImageProcessor.from_pretrained(model, trust_remote_code=False)


def load_classifier(model: str, names: Sequence[str]) -> nn.Module:
    """A pretrained model with a head for the classes `names`: a new one, unless its own has as many.

    Raises:
        ValueError: there is no such model, it is no image classifier, or its file holds but a part of it.
    """
    label2id = {name: index for index, name in enumerate(names)}
    options = {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": label2id}
    with _model_errors(model):
        # A base that was trained on another kind of task would go on computing the loss of that, and one whose file is
        # in 16 bits would train, and save, all but the sparse values in them.
        return load_whole(model, **options, problem_type="single_label_classification", dtype=torch.float32)


@contextmanager
def _model_errors(model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # files of somebody else's, and packages that they may need
        raise ValueError(
            f"`model` must be an image classifier, by its id on the Hub or its folder, got {model!r}: "
            f"{first_line(error)}"
        ) from error


def _predictions(logits: Tensor, _labels: Tensor) -> Tensor:
    return logits.argmax(-1)


@contextmanager
def saved_under_own_names(model: nn.Module) -> Iterator[None]:
    """Within, checkpoints hold a whole model under the names that its parameters have.

    transformers 5 saves a ViT under the names of older releases, and Trainer looks for today's when it resumes: it
    would find none, say so in a warning, and train on from the start.
    """
    if isinstance(model, PeftModel):
        yield
        return
    conversions = getattr(model, "_weight_conversions", None)  # a model that was not loaded has none
    cast(Any, model)._weight_conversions = []
    try:
        yield
    finally:
        cast(Any, model)._weight_conversions = conversions


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
