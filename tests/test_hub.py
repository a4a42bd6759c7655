"""From one process to a Hub and from there to another: the same adapter. The Hub is `loopback_hub`, the client real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import ViTForImageClassification
from typer.testing import CliRunner

from conftest import LabelledImages, build_images
from loopback_hub import LoopbackHub
from pictures import write_base, write_folder
from trpts_peft import TRPTSConfig, calibrate
from trpts_peft.cli import app
from trpts_peft.deployment import load_adapted
from trpts_peft.inspection import find_adapter
from trpts_peft.layer import TRPTSLinear

BASE, PUSHED, UPLOADED = "someone/vit", "someone/vit-flowers-trpts", "someone/vit-flowers-trpts-folder"
FINETUNED, LOCAL = "someone/by-command", "someone/of-a-local-base"
DAMAGED, MISSING = "someone/damaged", "someone/missing"
COLUMNS = "base_model.model.vit.layers.1.mlp.fc1.trpts_columns"

# ---- what the two processes do ----


def load_base() -> nn.Module:
    """The base model from the Hub, whose five classes give way to three."""
    return ViTForImageClassification.from_pretrained(BASE, num_labels=3, ignore_mismatched_sizes=True)


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    return model.eval()(build_images()).logits


def push(folder: Path) -> None:
    """Push a calibrated adapter with random values, and upload the folder that `save_pretrained` writes."""
    config = TRPTSConfig(keep_rate=0.5, token_layers=[1], modules_to_save=["classifier"], min_connections=2)
    model = get_peft_model(load_base(), config)
    calibrate(model, LabelledImages(12), progress=False)
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_(std=0.2)
    model.push_to_hub(PUSHED)
    local = ViTForImageClassification.from_pretrained(folder / "base")
    get_peft_model(local, TRPTSConfig()).push_to_hub(LOCAL)  # the Hub refuses cards that name the folder
    model.save_pretrained(folder / "adapter")
    api = HfApi()
    api.create_repo(UPLOADED)
    api.upload_folder(repo_id=UPLOADED, folder_path=folder / "adapter")
    torch.save(predict(model), folder / "pushed.pt")
    by_command(folder)


def by_command(folder: Path) -> None:
    """What one command fine-tunes and uploads, from a base on the Hub and a folder of images."""
    output = folder / "run"
    options = {"model": BASE, "dataset": folder / "set", "output": output, "push-to-hub": FINETUNED}
    options |= {"epochs": 1, "batch-size": 3, "token-layers": "1,", "keep-rate": 0.5}
    result = CliRunner().invoke(app, ["finetune", *(f"--{name}={value}" for name, value in options.items())])
    assert result.exit_code == 0, result.output
    assert f"uploaded to {os.environ['HF_ENDPOINT']}/{FINETUNED}" in result.stdout
    torch.save(predict(load_adapted(output / "adapter")[0]), folder / "finetuned.pt")


def by_peft() -> nn.Module:
    return PeftModel.from_pretrained(load_base(), PUSHED)


def by_transformers() -> nn.Module:
    model = load_base()
    model.load_adapter(PUSHED)
    return model


def by_snippet() -> nn.Module:
    """What the card tells to do."""
    (code,) = re.findall(r"```python\n(import trpts_peft.*?)```", ModelCard.load(PUSHED).text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("user/repository", PUSHED), names)
    return names["model"]


def refuse(repo: str) -> dict[str, Any]:
    """How loading fails, and whether the base model is left as it was."""
    base = load_base()
    names, logits = list(base.state_dict()), predict(base)
    with pytest.raises(Exception) as caught:
        PeftModel.from_pretrained(base, repo)
    return {
        "type": caught.type.__name__,
        "message": str(caught.value),
        "context": type(caught.value.__context__).__name__,
        "plain": not any(isinstance(module, TRPTSLinear) for module in base.modules()),
        "same": list(base.state_dict()) == names and torch.equal(predict(base), logits),
    }


WAYS: dict[str, Callable[[], nn.Module]] = {
    "peft": by_peft,
    "transformers": by_transformers,
    "snippet": by_snippet,
}


def pull(folder: Path) -> None:
    """Load what `push` has left on the Hub in each way, and what must not load."""
    results = {name: predict(way()) for name, way in WAYS.items()}
    results["command"] = predict(load_adapted(find_adapter(FINETUNED))[0])
    inspected = CliRunner().invoke(app, ["inspect", FINETUNED, "--json"])
    results["inspected"] = json.loads(inspected.stdout)
    torch.save({**results, **{repo: refuse(repo) for repo in (DAMAGED, MISSING)}}, folder / "pulled.pt")


CODE = """
import os, pathlib, sys
import huggingface_hub.constants  # reads HF_HUB_OFFLINE, which conftest sets: before that
import test_hub
del os.environ["HF_HUB_OFFLINE"]  # PEFT reads it whenever it saves
getattr(test_hub, sys.argv[1])(pathlib.Path(sys.argv[2]))
"""


def run(hub: LoopbackHub, step: str, folder: Path) -> None:
    """Run `push` or `pull` in a new process with an empty cache. It speaks to the Hub alone, and may not warn."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, **hub.environment(folder / step), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", CODE, step, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert hub.unknown == [], result.stderr
    assert result.returncode == 0, result.stderr


# ---- what comes of it ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[LoopbackHub]:
    """The Hub after `push`."""
    with LoopbackHub() as hub:
        write_base(folder / "base")
        write_folder(folder / "set", splits={"train": 3, "test": 2})
        (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        hub.add(BASE, {file.name: file.read_bytes() for file in (folder / "base").iterdir()})
        run(hub, "push", folder)
        yield hub


@pytest.fixture(scope="module")
def pulled(hub: LoopbackHub, folder: Path) -> dict[str, Any]:
    """The results of `pull`, with a damaged copy of the adapter on the Hub."""
    files = hub.repositories[PUSHED].files
    tensors = load(files["adapter_model.safetensors"])
    columns = tensors[COLUMNS].long()
    columns[3, -1] = 32  # of inputs 0 to 31
    tensors[COLUMNS] = columns.to(torch.uint16)
    hub.add(DAMAGED, {**files, "adapter_model.safetensors": save(tensors)})
    run(hub, "pull", folder)
    return torch.load(folder / "pulled.pt")


def test_pushing_creates_uploads_and_commits(hub: LoopbackHub) -> None:
    oid = next(iter(hub.objects))
    size = len(hub.objects[oid])
    writes = [f"{method} {path}" for method, path in hub.requests if method not in ("GET", "HEAD")]
    assert writes[:6] == [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        f"POST /api/models/{PUSHED}/preupload/main",
        f"POST /{PUSHED}.git/info/lfs/objects/batch",
        f"PUT /lfs/{oid}/{size}",
        f"POST /api/models/{PUSHED}/commit/main",
    ]
    # The uploaded folder holds the same file, which is not sent twice; two more adapters follow.
    assert len([write for write in writes if write.startswith("PUT")]) == len(hub.objects) == 3


def test_the_command_uploads_what_it_wrote(hub: LoopbackHub, folder: Path) -> None:
    files = hub.repositories[FINETUNED].files
    assert files == {path.name: path.read_bytes() for path in (folder / "run" / "adapter").iterdir()}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == (BASE, "apache-2.0", "peft")


def test_the_commands_adapter_comes_back(pulled: dict[str, Any], folder: Path) -> None:
    assert torch.equal(pulled["command"], torch.load(folder / "finetuned.pt"))
    assert (pulled["inspected"]["base_model"], pulled["inspected"]["token_layers"]) == (BASE, [1])


@pytest.mark.parametrize("repo", [PUSHED, UPLOADED])
def test_the_repository_holds_what_is_saved(hub: LoopbackHub, folder: Path, repo: str) -> None:
    files = hub.repositories[repo].files
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (folder / "adapter" / name).read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_another_process_predicts_the_same(pulled: dict[str, Any], folder: Path, way: str) -> None:
    assert torch.equal(pulled[way], torch.load(folder / "pushed.pt"))


def test_the_adapter_is_downloaded_once(pulled: dict[str, Any], hub: LoopbackHub) -> None:
    gets = [path for method, path in hub.requests if method == "GET" and path.endswith("/adapter_model.safetensors")]
    assert sorted(path.split("/resolve/")[0] for path in gets) == [f"/{repo}" for repo in (FINETUNED, DAMAGED, PUSHED)]


@pytest.mark.parametrize("repo", [PUSHED, UPLOADED])
def test_the_card_on_the_hub(hub: LoopbackHub, repo: str) -> None:
    data = ModelCard(hub.repositories[repo].files["README.md"].decode()).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", BASE, "image-classification")
    assert {"trpts", "sparse", "token-reduction"} <= set(data.tags)


def test_a_damaged_adapter_is_refused(pulled: dict[str, Any]) -> None:
    refusal = pulled[DAMAGED]
    assert refusal["type"] == "ValueError"
    assert re.fullmatch(
        rf"The adapter's `{COLUMNS}` must be from 0 to 31, got \d+ to 32: the file is damaged .*", refusal["message"]
    )
    assert refusal["plain"] and refusal["same"]


def test_a_missing_repository_leaves_the_base_alone(pulled: dict[str, Any]) -> None:
    refusal = pulled[MISSING]
    assert (refusal["type"], refusal["context"]) == ("ValueError", "RepositoryNotFoundError")
    assert refusal["message"] == f"Can't find 'adapter_config.json' at '{MISSING}'"
    assert refusal["plain"] and refusal["same"]


# ---- the Hub itself ----


CARD = json.dumps({"content": "---\nbase_model: /a/folder\n---\n"}).encode()
REFUSALS: dict[str, tuple[str, str, bytes, int, str | None]] = {
    "unknown request": ("GET", "/api/models", b"", 501, None),
    "missing repository": ("HEAD", "/no/repo/resolve/main/config.json", b"", 404, "RepoNotFound"),
    "missing file": ("HEAD", "/a/b/resolve/main/none", b"", 404, "EntryNotFound"),
    "missing revision": ("HEAD", "/a/b/resolve/other/config.json", b"", 404, "RevisionNotFound"),
    "another object": ("PUT", f"/lfs/{64 * '0'}/3", b"abc", 400, None),
    "no token": ("POST", "/api/repos/create", b"{}", 401, None),
    "malformed request": ("POST", "/api/validate-yaml", b"{}", 422, None),
    "base in a folder": ("POST", "/api/validate-yaml", CARD, 400, None),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses(name: str) -> None:
    method, path, body, status, code = REFUSALS[name]
    with LoopbackHub() as hub:
        hub.add("a/b", {"config.json": b"{}"})
        answer = hub.answer(method, path, body)
        assert (answer.status, answer.headers.get("X-Error-Code")) == (status, code)
        assert hub.unknown == ([(method, path)] if status == 501 else [])


def test_what_was_not_uploaded_cannot_be_committed() -> None:
    change = {"key": "lfsFile", "value": {"path": "a.bin", "oid": 64 * "0", "size": 3}}
    with LoopbackHub() as hub:
        hub.add("a/b", {})
        answer = hub.answer("POST", "/api/models/a/b/commit/main", json.dumps(change).encode(), "Bearer token")
        assert (answer.status, answer.body) == (422, {"error": "a.bin was not uploaded"})
        assert hub.repositories["a/b"].files == {}
