"""The `trpts` command: fine-tune a classifier on images, and read, merge and draw what came out."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import transformers
import typer
from PIL import Image, ImageOps
from safetensors import SafetensorError

from .deployment import draw_adapters, labels_of, merge_into_checkpoint
from .finetuning import FinetuneSettings, finished, prepare
from .folders import check_empty, is_full, printable
from .inspection import describe_file, find_adapter, table
from .report import result_folder, summary, upload

__all__ = ["app", "main"]

_REFUSED, _INTERRUPTED = 2, 130
_GO_ON = "The same command with --resume goes on from the last checkpoint."
_RANK = int(os.environ.get("RANK", "0"))  # among the processes of a launcher

app = typer.Typer(
    name="trpts",
    help="Fine-tune vision transformers with TR-PTS: few weights, few tokens, small files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AdapterArgument = Annotated[str, typer.Argument(help="A folder with a saved adapter, or its id on the Hub.")]
ImagesOption = Annotated[
    list[Path] | None, typer.Option(help="An image to draw the kept tokens of; can be given several times.")
]
OutputOption = Annotated[Path, typer.Option(help="Folder to write to; must be empty or not there.")]


@contextmanager
def _one_line() -> Iterator[None]:
    """What was refused is one line and exit code 2, with nothing written."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        _say(f"trpts: {' '.join(str(error).split())}")
        raise typer.Exit(_REFUSED) from error


def _say(line: str) -> None:
    if _RANK == 0:
        typer.echo(printable(line), err=True)


def _options_of(settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass, described by the field."""
    hints = get_type_hints(settings)

    def parameter(option: Any) -> inspect.Parameter:
        kind: Any = Annotated[hints[option.name], typer.Option(help=option.metadata["help"])]
        default = inspect.Parameter.empty if option.default is MISSING else option.default
        return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [parameter(option) for option in fields(settings)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


@app.command("finetune")
@_options_of(FinetuneSettings)
def _finetune(**options: Any) -> None:
    """Fine-tune an image classifier, and write what was trained, its model card, results.json and figures.

    What does not fit ends with exit code 2 and one line, and nothing is written. Stopped by Ctrl-C or killed, the same
    command with --resume goes on from the last epoch that was finished.
    """
    with _one_line():
        settings = FinetuneSettings(**options)
        results = finished(settings)
    try:
        if results is None:
            with _one_line():
                run = prepare(settings)
            results = run.train()
    except FloatingPointError as error:
        _say(f"trpts: {error}")
        raise typer.Exit(_REFUSED) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(settings.output):
            raise
        _say(f"trpts: no space is left for {str(settings.output)!r}. {_GO_ON}")
        raise typer.Exit(_REFUSED) from error
    except KeyboardInterrupt:
        _say(f"trpts: interrupted. {_GO_ON}")
        raise typer.Exit(_INTERRUPTED) from None
    if _RANK == 0:
        typer.echo(summary(results, settings.output))
        if settings.push_to_hub is not None:
            with _one_line():
                typer.echo(f"uploaded to {upload(result_folder(settings.output), settings.push_to_hub)}")


@app.command("inspect")
def _inspect(
    adapter: AdapterArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what an adapter trains in each block, which tokens it keeps, what it costs, and which base it is for."""
    with _one_line():
        description = describe_file(find_adapter(adapter))
    typer.echo(json.dumps(description, indent=2) if as_json else table(description))


@app.command("merge")
def _merge(
    adapter: AdapterArgument,
    output: OutputOption,
    token_selection: Annotated[
        Literal["keep", "drop"] | None,
        typer.Option(
            help="For an adapter that selects tokens: keep its rates in the checkpoint's config, from where "
            "trpts_peft.apply_token_selection puts them in force, or drop them, which changes the outputs."
        ),
    ] = None,
) -> None:
    """Merge an adapter into its base model, and write that as a plain checkpoint of transformers."""
    with _one_line():
        selects = merge_into_checkpoint(find_adapter(adapter), output, token_selection)
    typer.echo(printable(f"wrote {output}"))
    if selects:
        typer.echo("it keeps all tokens until trpts_peft.apply_token_selection(model) is called on it")


@app.command("plot")
def _plot(
    adapters: Annotated[list[str], typer.Argument(help="Folders with saved adapters, or their ids on the Hub.")],
    output: OutputOption,
    image: ImagesOption = None,
) -> None:
    """Draw the importance of the blocks, what several adapters have in common, and which tokens of images are kept."""
    with _one_line():
        check_empty(output)
        folders = dict(zip(labels_of(adapters), map(find_adapter, adapters), strict=True))
        figures = draw_adapters(folders, [_opened(path) for path in image or ()])
        output.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(output / name, dpi=150)
            typer.echo(printable(f"wrote {output / name}"))


def _opened(path: Path) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":
            raise OSError(f"it has more than 8 bits a channel, mode {image.mode!r}")
        return image.convert("RGB")
    except Exception as error:  # whatever a decoder raises
        raise ValueError(f"`image` must be a readable image, got {str(path)!r}: {error}") from error


def main() -> None:
    """What the console script and `python -m trpts_peft` run."""
    # One line is to be seen as one: no word on heads that start anew, nor on adapters that are about to be calibrated.
    transformers.logging.set_verbosity_error()
    logging.getLogger("trpts_peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a console has no letters for must not end a run
            stream.reconfigure(errors="backslashreplace")
    app()
