"""The documentation is true: its snippets run, show what they print, and its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from conftest import has_adapter_methods

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")


def snippets(page):
    """The blocks of a page that run: (line, code, the output shown right below, or None)."""
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence["kind"] != "python":
            continue
        below = following is not None and following["kind"] == "text" and following.start() == fence.end() + 1
        line = text.count("\n", 0, fence.start("text"))
        yield line, fence["text"], following["text"] if below else None


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page):
    return page.name


def test_every_page_is_found():
    assert len(PAGES) > 5
    assert sum(1 for page in PAGES for _ in snippets(page)) > 30


# On a machine without an accelerator, for which no page should have to say `dataloader_pin_memory=False`.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_run_and_print_what_is_shown(page, tiny_vit, labelled_images, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "train_dataset": labelled_images(48),
        "test_dataset": labelled_images(48, seed=5),
        "images": images(4),
    }
    for line, code, shown in snippets(page):
        if "vit.add_adapter(" in code and not has_adapter_methods():
            pytest.skip(f"transformers' adapter methods want a later peft: the page ran up to line {line}")
        names["vit"] = tiny_vit()  # the pages promise a fresh one in each block
        source = compile("\n" * line + code, page.name, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, names)
        if shown is not None:
            assert printed.getvalue() == shown


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
