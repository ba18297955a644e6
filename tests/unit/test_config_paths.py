"""`~` is the home folder in every key and argument that is a path, and a path may have any name."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from distill.cache.local import LocalStore
from distill.cache.open_store import open_store
from distill.config import spelling
from distill.config.load import CONF, precheck, resolve, to_dict
from distill.config.ranges import IS_PATH
from distill.config.schema import RunConfig
from distill.config.spelling import spelt
from distill.tools.commands import COMMANDS

NO_PATHS = {
    "data.corpora.*.text_key", "data.corpora.*.mask_key", "data.corpora.*.image_key", "data.tokenizer.bos",
    "data.tokenizer.eos", "evaluate.accuracy_on", "backfill.corpora.*", "engine.backend", "tracking.project",
    "tracking.name", "job", "cache.codec.name", "precision.name", "engine.dispatcher", "student.loss", "plugins.*",
    "lab.name", "lab.only.*", "lab.only_arms.*", "lab.regimes.*.curve", "lab.arms.*.like",
}  # fmt: skip
"""Keys that hold a text of another kind. A new key must be put here, or among the paths."""


def texts(kind, key="", path=False):
    """Dotted keys of a type that may hold a text, and whether it is a path; `*` for free names and places in lists."""
    if kind is str:
        yield key.removesuffix("."), path
    elif typing.get_origin(kind) is typing.Annotated:
        yield from texts(typing.get_args(kind)[0], key, IS_PATH in typing.get_args(kind))
    elif isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        for each in typing.get_args(kind):
            yield from texts(each, key)
    elif typing.get_origin(kind) in (dict, list):
        yield from texts(typing.get_args(kind)[-1], f"{key}*.")
    elif dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from texts(hint, f"{key}{name}.")


PATHS = sorted(key for key, path in texts(RunConfig) if path)


def test_every_key_is_a_path_or_is_not():
    assert len(PATHS) > 10
    assert {key for key, path in texts(RunConfig) if not path} == NO_PATHS


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").touch()
    return tmp_path


def leaf(config, key):
    for name in key.split("."):
        config = config[int(name) if isinstance(config, list) else name]
    return config


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("quote", ["", "'"])
def test_home_in_a_key(home, key, quote):
    at = key.replace("files.*", "files").replace("*", "main")
    job = {"export.dir": "student", "teacher.from_": "backfill"}.get(key, "teacher")
    value = f"{quote}~/x{quote}" if key != "teacher.from_" else f"{quote}hf:~/x{quote}"
    more = []
    if "files" in key:
        at, value = at.removesuffix(".*"), f"[{quote}~/x/a.jsonl{quote},{quote}~/x/*.jsonl{quote}]"
        more = ["data=files"] + (["data.corpora.main.files=[b.jsonl]"] if "held_out" in at else [])
    if job == "student":
        more += ["student.cached=false"]
    found = leaf(to_dict(resolve([f"job={job}", *more, f"{at}={value}"])), at)
    want = {
        "teacher.from_": f"hf:{home}/x",
        "data.corpora.main.files": [f"{home}/x/a.jsonl", f"{home}/x/*.jsonl"],
        "data.corpora.main.held_out_files": [f"{home}/x/a.jsonl", f"{home}/x/*.jsonl"],
    }
    assert found == want.get(at, f"{home}/x")


@pytest.mark.parametrize("url", ["s3://bucket/~x", "s3://~/x", "simplecache::s3://bucket/~"])
def test_a_url_stays(home, url):
    assert resolve(["job=teacher", f"cache.dir='{url}'"]).cache.dir == url
    assert resolve(["job=teacher", f"cache.dir={url}"]).cache.dir == url


@pytest.mark.parametrize("key", spelling.HYDRA_KEYS)
@pytest.mark.parametrize("value", ["~/a/${seed}", "'~/a/${seed}'"])
def test_home_in_hydras_own_folders(home, key, value):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose("config", overrides=spelt(["job=teacher", f"{key}={value}"]), return_hydra_config=True)
    parent = found.hydra.run if "run" in key else found.hydra.sweep
    assert parent.dir == f"{home}/a/0"


def test_home_in_a_folder_of_configurations(home):
    group = home / "x" / "experiment"
    group.mkdir()
    (group / "mine.yaml").write_text("# @package _global_\nseed: 3\ncache:\n  dir: ~/x/cache\n")
    for flag in (["--config-dir=~/x"], ["--config-dir", "~/x"], ["-cd", "~/x"]):
        assert f"--config-dir={home}/x" in precheck([*flag, "job=teacher", "experiment=mine"])


NAMES = ["a::b", "a:b", "a b", "ä ü", "a#b", "a?b", "a%20b", "a*b", "[a]", "a[0]", "a'b", 'a"b', "a\\", "a~b",
         "~", "{a}", "a,b", "(a)", "file:a", "s3:/a", "$a", "日本"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_may_be_quoted(name):
    path = f"/tmp/{name}/x"
    found = resolve(["job=teacher", f"cache.dir={spelling.quoted(path)}", f"data.dir={spelling.quoted(path)}"])
    assert found.cache.dir == found.data.dir == path
    assert isinstance(open_store(path), LocalStore) and open_store(path).folder == Path(path)


@pytest.mark.parametrize(
    "name", ["a::b", "a:b", "a b", "ä ü", "a#b", "a?b", "a%20b", "a*b", "a~b", "日本", "a#b&c;d", "x!y", "<x>^`"]
)
def test_most_names_need_no_quotes(name):
    found = resolve(["job=teacher", f"cache.dir=out/{name}", "data=files", f"data.corpora.main.files=[out/{name},b]"])
    assert found.cache.dir == f"out/{name}" and found.data.corpora["main"].files == [f"out/{name}", "b"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=spelt([f"hydra.run.dir=out/{name}"]), return_hydra_config=True)
    assert composed.hydra.run.dir == f"out/{name}"


def test_a_sweep_and_a_dictionary():
    assert spelt(["data.dir=~/a,b"]) == ['data.dir="~/a",b']
    assert spelt(["cache.dirs={main:~/a,more:b}"]) == ['++cache.dirs={main:"~/a",more:b}']
    assert spelt(["~codistill.arms.hard", "seed=1"]) == ["~codistill.arms.hard", "seed=1"]


# ---------------------------------------------------------------- tools

NO_TOOL_PATHS = {
    "per", "overrides", "codec", "format", "split", "bos", "eos", "their_bos", "their_end", "teacher", "writer",
    "tokens_column", "dense_column", "ids_column", "values_column", "lse_column", "purge",
}  # fmt: skip
TOOL_PATHS = {"dir", "html", "into", "sources", "a", "b", "file", "files", "corpus", "tokenizer", "order", "like",
              "config_dir"}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_home_in_the_arguments_of_tools(home, command):
    parser = argparse.ArgumentParser()
    COMMANDS[command].load().add_arguments(parser)
    found = 0
    for action in parser._actions:
        if action.nargs == 0 or action.type in (int, float) or action.dest in NO_TOOL_PATHS | {"help"}:
            continue
        if (command, action.dest) == ("estimate", "config") or "_count" in getattr(action.type, "__name__", ""):
            continue
        assert action.dest in TOOL_PATHS or (command, action.dest) == ("import", "config"), action.dest
        assert action.type("~/x") == f"{home}/x" and action.type("s3://b/~") == "s3://b/~", action.dest
        found += 1
    assert found >= 1


def test_home_in_python(home):
    assert open_store("~/x").root == f"{home}/x" and open_store("file://~/x").root == f"{home}/x"
