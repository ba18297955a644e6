"""Named parts: registered once, known by name without torch, added by a user's module."""

import subprocess
import sys

import pytest

from distill.config import registry
from distill.config.errors import ConfigError
from distill.config.registry import Registry

REGISTRIES = {name: part for name, part in vars(registry).items() if isinstance(part, Registry)}


def test_an_entry_is_an_object_or_a_place():
    parts = Registry("part", {"here": 3, "there": "math:pi"})
    parts.add("new", 4)
    parts.add("new", 4)  # the same again: a module that is imported twice under two names
    assert (parts["here"], parts["there"], parts["new"]) == (3, __import__("math").pi, 4)
    assert parts.problem("a.b", "here") is None
    assert parts.problem("a.b", "where") == "a.b is where; allowed: here, there, new"
    with pytest.raises(ConfigError, match="part there is registered twice; choose another name"):
        parts.add("there", 5)


def test_names_need_no_torch():
    code = "import sys; from distill.config import schema, checks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    problems = registry.import_plugins(["no_such_plugin", "broken_plugin"])
    assert problems == [
        "plugins has no_such_plugin; it cannot be imported: ModuleNotFoundError: No module named 'no_such_plugin'",
        "plugins has broken_plugin; it cannot be imported: ZeroDivisionError: division by zero",
    ]
