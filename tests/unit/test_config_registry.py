"""Named parts: registered once, known by name without torch, added by a user's module."""

import subprocess
import sys

import pytest

from distill.config import registry
from distill.config.errors import ConfigError
from distill.config.load import resolve
from distill.config.registry import CodecEntry, Registry
from distill.config.schema import CodecConfig

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


def test_a_factor_of_the_projects_own_and_an_unknown_one_below_plugins():
    with pytest.raises(ConfigError) as caught:
        resolve(["job=teacher", "+student.weighting.plugins.lag.power=1", "+student.weighting.plugins.rampp.by=1"])
    assert caught.value.problems == [
        "student.weighting.plugins.lag: this factor is the project's own; its options are keys of "
        "student.weighting.lag",
        "student.weighting.plugins.rampp is no factor; allowed: shard_lag",
    ]


def test_names_of_parts_are_not_wrong_besides_where_plugins_is():
    with pytest.raises(ConfigError) as caught:
        resolve(["job=teacher", "plugins=my_parts", "student.loss=tripled"])
    (problem,) = caught.value.problems
    assert problem.startswith("plugins is my_parts; it is a list: write ")


def test_a_missing_option_of_a_codec():
    entry = CodecEntry(lambda config, vocab_size: (config.options.get("most", 9), config.options["keep"]))
    assert entry.make(CodecConfig(options={"keep": 3}), 10) == (9, 3)
    with pytest.raises(ConfigError) as caught:
        entry.make(CodecConfig(options={"kept": 3}), 10)
    assert caught.value.problems == [
        "cache.codec.options.keep has no value; allowed below cache.codec.options: most, keep; given: kept"
    ]
