"""The shape of the source tree: imports, names and sizes of files."""

from __future__ import annotations

import ast
import graphlib
import subprocess
from collections import defaultdict
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("distill", "losses", "teacher", "student")
MOST_LINES = 400
MOST_FUNCTION_LINES = 65
PLACES = {
    "hydra": ("distill/config/", "distill/__main__.py"),
    "omegaconf": ("distill/config/", "distill/__main__.py"),
    "rich": ("distill/config/terminal.py",),
    "deepspeed": ("distill/engine/",),
    "plotly": ("distill/tracking/",),
    "wandb": ("distill/tracking/wandb_sink.py",),
    "fsspec": ("distill/cache/far.py",),
    "numba": ("distill/cache/",),
    "tokenizers": ("distill/data/tokenizer.py",),
    "transformers": ("teacher/foreign.py",),
}
"""Large libraries, and where alone they are imported."""


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.Module]:
    """Syntax trees of all Python files of the repository, by path."""
    listing = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: ast.parse((ROOT / name).read_text()) for name in listing.stdout.split() if (ROOT / name).exists()}


def repeated(places: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def product_nodes(sources):
    """Path and syntax node of all code that is not a test."""
    return ((path, node) for path, tree in sources.items() if path.startswith(PACKAGES) for node in ast.walk(tree))


def test_no_circle_of_imports():
    """Imports within functions count, and those for types alone."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_large_libraries_are_imported_in_their_places(sources):
    misplaced = {
        f"{path} imports {name}"
        for path, node in product_nodes(sources)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in {(getattr(node, "module", None) or alias.name).split(".")[0] for alias in node.names}
        if name in PLACES and not path.startswith(PLACES[name])
    }
    assert misplaced == set()


def test_kinds_of_stores_differ_inside_their_classes(sources):
    """Nothing but `open_store` names a kind."""
    places = {f"distill/cache/{name}.py" for name in ("open_store", "local", "far")}
    asking = {
        path
        for path, node in product_nodes(sources)
        if getattr(node, "id", getattr(node, "name", None)) in ("LocalStore", "FarStore")
    }
    assert asking == places


def test_no_two_files_share_a_name(sources):
    places = defaultdict(list)
    for path in sources:
        name = Path(path).name
        if name not in ("__init__.py", "__main__.py"):
            places[name].append(path)
    assert repeated(places) == {}


def test_no_two_classes_share_a_name(sources):
    places = defaultdict(list)
    for path, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert repeated(places) == {}


def test_a_long_file_gives_its_reason(sources):
    """In its docstring, in a sentence with the words "longer than"."""
    long = {
        path
        for path, tree in sources.items()
        if len((ROOT / path).read_text().splitlines()) > MOST_LINES
        and "longer than" not in (ast.get_docstring(tree) or "").lower()
    }
    assert long == set()


def test_no_function_is_long(sources):
    """Its docstring does not count."""
    long = {
        f"{path}: {node.name}"
        for path, node in product_nodes(sources)
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno - node.lineno - len((ast.get_docstring(node) or "").splitlines()) >= MOST_FUNCTION_LINES
    }
    assert long == set()
