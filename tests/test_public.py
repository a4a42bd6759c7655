"""What the package shows, and how it is built: names, sizes of functions and modules, direction of imports."""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path

import pytest
from packaging.version import Version

import trpts_peft

SOURCE = Path(trpts_peft.__file__).parent
MODULES = sorted(SOURCE.glob("*.py"))
FLOORS = (
    {
        *{"card", "change_of_class", "compiled", "families", "folders", "functional", "image_data", "masks", "metrics"},
        *{"merging", "peft_type", "sparse_linear", "stale", "token_layers", "traversal", "tuner_layer"},
    },
    {"run_folder", "config", "layer", "selecting_blocks", "targets", "vit", "fisher", "data", "probe", "head", "cost"},
    {
        "selection",
        "measurement",
        "record",
        "checkpoint",
        "weighted",
        "withdrawal",
        "callbacks",
        "methods",
        "pretrained",
    },
    {"adapters", "model", "plots", "inspection"},
    {"registration", "calibration", "deployment", "keep_rate", "report"},
    {"__init__", "finetuning"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TORCH_ONLY = {"functional", "sparse_linear"}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by(path):
    """The modules of this package that a module imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trpts_peft"):
            found |= {node.module.partition(".")[2]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("trpts_peft.")}
    return found & set(FLOOR_OF)


IMPORTS = {path.stem: imported_by(path) for path in MODULES}


def test_all_is_what_is_visible():
    visible = {
        name
        for name, value in vars(trpts_peft).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(trpts_peft.__all__) == visible | {"functional"}
    assert list(trpts_peft.__all__) == sorted(trpts_peft.__all__)


@pytest.mark.parametrize("name", trpts_peft.__all__)
def test_public_names_say_where_they_live_and_what_they_are(name):
    value = getattr(trpts_peft, name)
    assert value.__doc__
    assert value.__name__.startswith("trpts_peft") or value.__module__.startswith("trpts_peft")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_lists_what_it_gives(path):
    module = __import__(f"trpts_peft.{path.stem}", fromlist=["_"]) if path.stem != "__init__" else trpts_peft
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_function_is_longer_than_50_lines_and_no_module_than_500(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 50, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_function_annotates_its_return(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    assert path.stem in FLOOR_OF, f"{path.stem} has no floor: add it to FLOORS"
    above = {name for name in IMPORTS[path.stem] if FLOOR_OF[name] > FLOOR_OF[path.stem]}
    assert not above


def test_imports_have_no_cycle():
    left = {name: set(imports) for name, imports in IMPORTS.items()}
    while left:
        free = {name for name, imports in left.items() if not imports & set(left)}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: imports for name, imports in left.items() if name not in free}


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_the_equations_know_torch_alone(name):
    roots = set()
    for node in ast.walk(tree_of(SOURCE / f"{name}.py")):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) - TORCH_ONLY == {"torch"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_matplotlib_is_imported_only_where_something_is_drawn(path):
    for node in tree_of(path).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "matplotlib" not in ast.unparse(node)


def test_the_tests_were_run_with_the_lower_bounds():
    root = Path(__file__).parents[1]
    project = (root / "pyproject.toml").read_text(encoding="utf-8").partition("\ndev = [")[0]
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)', project.partition("\ndependencies = [")[2])
    pins = re.findall(r"^([\w-]+)==([\d.]+)", (root / "constraints-oldest.txt").read_text(encoding="utf-8"), re.M)
    assert {"torch", "matplotlib"} <= {name for name, _ in bounds}
    assert {(name, Version(bound)) for name, bound in bounds} <= {(name, Version(pin)) for name, pin in pins}
