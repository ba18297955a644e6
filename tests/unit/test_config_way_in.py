"""Every mistake of a command line is one line with the way out, and the spelling that it names works."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from hydra._internal.utils import get_args_parser

from distill.config import arguments
from distill.config.errors import ConfigError
from distill.config.load import _compose, _hydra, load, precheck
from tests.cli import environment


def problems(*given):
    with pytest.raises(ConfigError) as caught:
        precheck(list(given))
    return caught.value.problems


def loaded(*given):
    found = precheck(list(given))
    with _hydra(None) as hydra:
        cfg = _compose(hydra, "config", [each for each in found if not each.startswith("--")])
        return load(cfg), cfg.hydra


FILES = ("data=files", "data.corpora.main.files")
# What is written; what it sets when it is written as the message says, where that is one value.
SPELLINGS = {
    "data.corpora.main.files=a.jsonl": ["a.jsonl"],
    "data.corpora.main.files=a.jsonl,b.jsonl": ["a.jsonl", "b.jsonl"],
    "data.corpora.main.files=7": ["7"],
    "data.corpora.main.files=[d=e.jsonl]": ["d=e.jsonl"],
    "data.corpora.main.files=d=e.jsonl": ["d=e.jsonl"],
    "data.corpora.main.files=[a(1).jsonl,b c.jsonl]": ["a(1).jsonl", "b c.jsonl"],
    "data.corpora.main.files=[it's.jsonl]": ["it's.jsonl"],
    "data.corpora.main.files=[a.jsonl": ["a.jsonl"],
    "data.corpora.main.files=a.jsonl]": ["a.jsonl"],
    "hydra.run.dir=out/lr=1": "out/lr=1",
    "hydra.run.dir=a,b": "a,b",
    "hydra.run.dir=a[1]": "a[1]",
    "hydra.run.dir=[1]": "[1]",
    "cache.dir={a:1}": "{a:1}",
    "cache.dir=a(1)/b": "a(1)/b",
    "cache.dir=it's": "it's",
    'cache.dir=a"b': 'a"b',
    "cache.dir='x": "x",
    'cache.dir=x"': "x",
    r'cache.dir=C:\my=x\"y"\z': r'C:\my=x\"y"\z',
    "cache.dir=C:\\a=b\\": "C:\\a=b\\",
    "tracking.name=1e3": "1e3",
    "tracking.name=1_000": "1_000",
    "tracking.name=1.50": "1.50",
    "tracking.name=\u201cx y\u201d": "x y",
    "tracking.name=x\u2013y": "x-y",
    "tracking.name=d\u00fcsseldorf=1": "d\u00fcsseldorf=1",
    "tracking.name=a, b": "a, b",
    "teacher.model.moe_layers=3": [3],
    "student.optim.betas=0.9,0.99": [0.9, 0.99],
    "seed = 3": 3,
    "seed =3": 3,
    "\u201cseed=3\u201d": 3,
    "seed=\u20193\u2019": 3,
    "--seed=3": 3,
    "\u2014seed=3": 3,
    "+experiment=smoke": None,
    "++experiment=smoke": None,
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_the_spelling_that_a_message_names_works_and_means_what_was_meant(text):
    base = ["job=teacher", *(["data=files"] if "corpora.main.files" in text else [])]
    (line,) = problems(*base, text)
    found = re.search(r"(?:write|dashes,) (.+?)(?: for this text)?(?:, and --help.*)?$", line)
    assert found, line
    (spelt,) = shlex.split(found[1])
    run, hydra = loaded(*base, spelt)
    want, at = SPELLINGS[text], {"hydra": hydra, **vars(run)}
    key, *rest = spelt.partition("=")[0].split(".")
    value = at.get(key)
    for name in rest:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    assert want is None or value == want, (spelt, value)


SENTENCES = {
    "hydra.run.dirr=x": "hydra.run.dirr is no key; allowed there: dir",
    "hydra.job.chdir=maybe": "hydra.job.chdir is maybe; Value 'maybe' is not a valid bool",
    "hydra.sweep.foo=x": "hydra.sweep.foo is no key; allowed there: dir, subdir",
    "hydra.mode=XX": "hydra.mode is XX; Invalid value 'XX', expected one of [RUN, MULTIRUN]",
    "hydra=x": "hydra is x; it has keys of its own: ",
    "hydra/launcher=foo": "hydra/launcher is foo; allowed: basic",
    "hydra/job_logging=foo": "hydra/job_logging is foo; allowed: default, disabled, none, stdout",
    "hydra/foo=bar": "hydra/foo is no group; allowed: hydra/env, ",
    "hydra.searchpath=x": "hydra.searchpath is x; it is a list of folders: write 'hydra.searchpath=[FOLDER]'",
    "hydra.searchpath=[/nowhere]": "hydra.searchpath has /nowhere; no such folder",
    "hydra.run.dir=${nope}": "hydra.run.dir is ${nope}; Interpolation key 'nope' not found: ${KEY} takes",
    "hydra.run.dir=": "hydra.run.dir is empty; give it a folder",
    "hydra.run.dir=null": "hydra.run.dir is null; ",
    "hydra.job.env_copy=[NO_SUCH_NAME]": "'hydra.job.env_copy=[NO_SUCH_NAME]': KeyError: 'NO_SUCH_NAME'",
    "hydra.launcher.n_jobs=2": "Could not override 'hydra.launcher.n_jobs'. To append to your config use +hydra.laun",
    "teacher.optim.lr=${nope}": "teacher.optim.lr is ${nope}; Interpolation key 'nope' not found: ${KEY} takes the v",
    "teacher.optim.lr=${oc.env:NO_SUCH_NAME}": "teacher.optim.lr is ${oc.env:NO_SUCH_NAME}; Environment variable 'NO",
    "teacher.optim.lr=${job}": "teacher.optim.lr is ${job}; Value 'teacher' of type 'str' could not be conv",
    "teacher.model.vision=${job}": "teacher.model.vision: ",
    "teacher.model.moe_layers=${job}": "teacher.model.moe_layers: ",
    "data.corpora=${oc.env:HOME}": "data.corpora: ",
    "teacher.model.moe_layers=[[1]]": "teacher.model.moe_layers is [[1]]; each of its elements is one value",
    "data.corpora.main.files=[{a:1}]": "data.corpora.main.files is [{'a': 1}]; each of its elements is one value",
    "teacher.optim.lr=${": "'teacher.optim.lr=${' is not an override: Hydra cannot read its value (extraneous input",
    "teacher.optim.lr=${nope:1}": "teacher.optim.lr is ${nope:1}; Unsupported interpolation type nope",
    "seed": "'seed' is not an override: it has no value; write seed=VALUE",
    "smoke": "'smoke' is not an override: it has no value; write experiment=smoke",
    "": "'' is not an override: it has no value; write KEY=VALUE",
    "-1": "'-1' is not an override: it has no value",
    "=x": "'=x' has no key; write KEY=x",
    "seed=": "seed is empty; write seed=VALUE",
    "seed=null": "seed is null; Incompatible value 'None'",
    "resume=2": "resume is 2; allowed: true, false",
    "resume=": "resume is empty; write resume=VALUE",
    "cache.dir=": "cache.dir is empty; give it a value, or null where it may have none",
    "cache.dir=$PATH/x": "cache.dir is $PATH/x; nothing replaces $PATH within single quotes: leave them out",
    "cache.dirs=x": "cache.dirs is x; ",
    "data.corpora={}": "data.corpora is {}; that takes nothing away: names are left out one by one, ~data.corpora.main",
    "teacher=big": "teacher is big; it has keys of its own: teacher.model, ",
    "data.corpora.main.files=": "data.corpora.main.files is empty; it is a list: write 'data.corpora.main.files=[]'",
    "data.corpora.code.source=files": "Could not override 'data.corpora.code.source'. To append to your config use +da",
    "model=maverick": "Could not override 'model'. Did you mean to override one of model@student.model, model@teacher",
    "modle@student.model=maverick": "modle is no group; allowed: cache, data, engine, experiment, model, ",
    "seed=1,2": "seed=1,2 is a sweep over seed; add --multirun to run one after the other, or give one value",
    "seed=range(0,3)": "seed=range(0,3) is a sweep over seed; add --multirun",
    "cache=topk,threshold": "cache=topk,threshold is a sweep over cache; add --multirun to run one after the other, or",
    "tracking.name=a,b": "tracking.name=a,b is a sweep over tracking.name; add --multirun to run one",
    "seed=nope(1)": "'seed=nope(1)' is not an override: ",
    "-k": "-k is no flag; a key is set without dashes, k=VALUE, and --help lists the flags",
    "--cfg=jobs": "argument --cfg/-c: invalid choice: 'jobs' (choose from ",
    "--cfg": "argument --cfg/-c: expected one argument",
    "--resolve": "--resolve is given without --cfg, whose output it changes; add --cfg job",
    "--multirun=3": "argument --multirun/-m: ignored explicit argument '3'",
    "--config-path=x": "--config-path is x; it would replace the project's own folder of values: --config-dir adds",
    "--config-name=x": "--config-name is x; no such file in ",
    "--config-dir=/nowhere": "--config-dir is /nowhere; no such folder",
    "--experimental-rerun=x": "--experimental-rerun is x; a rerun loads a pickle",
    "\u2013-multirun": "'\u2013-multirun' begins with a long dash, as documents have it; write --multirun",
    "\u2014multirun": "'\u2014multirun' begins with a long dash, as documents have it; write --multirun",
    "\ud800=1": "'\\ud800=1' is not an override: ",
}  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES, ids=ascii)
def test_a_mistake_is_one_line_with_the_way_out(text):
    (line,) = problems("job=teacher", text)
    assert line.startswith(SENTENCES[text]), line


def test_a_run_folder_that_cannot_be_made_is_told_before_anything_starts(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert problems("job=teacher", f"hydra.run.dir={file}") == [
        f"hydra.run.dir is {file}; it is a file, not a folder: choose another folder"
    ]
    assert problems("job=teacher", f"hydra.run.dir={file}/a/b") == [
        f"hydra.run.dir is {file}/a/b; {file} is a file, not a folder: choose another folder"
    ]
    assert problems("-m", "job=teacher", f"hydra.sweep.dir={file}") == [
        f"hydra.sweep.dir is {file}; it is a file, not a folder: choose another folder"
    ]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert problems("job=teacher", f"hydra.run.dir={tmp_path}/a/b") == [
        f"hydra.run.dir is {tmp_path}/a/b; cannot write to {tmp_path}: choose another folder"
    ]


def test_a_home_folder_may_be_written_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run, hydra = loaded("job=teacher", "data=files", "data.corpora.main.files=[~/a.jsonl,~/b.jsonl]", "cache.dir=~/x y",
                        "hydra.run.dir=~/runs")  # fmt: skip
    assert [os.path.expanduser(each) for each in run.data.corpora["main"].files] == [
        "/home/me/a.jsonl",
        "/home/me/b.jsonl",
    ]
    assert (os.path.expanduser(run.cache.dir), hydra.run.dir) == ("/home/me/x y", "/home/me/runs")


def test_all_of_a_command_line_comes_at_once_in_its_order_and_nothing_twice():
    assert problems(
        "hydra.run.dirr=x", "--job=teacher", "seed=x", "cache=zip", "cache.dir=a=b", "teacher.optim.lr=${nope}",
        "student.optim.lr=${oc.env:NO_SUCH_NAME}", "cache.queue=0", "seed=x", "student.optim.lrr=1", "-k", "v",
    ) == [
        "--job=teacher is no flag; a key is set without dashes, job=teacher, and --help lists the flags",
        "-k is no flag; a key is set without dashes, k=v, and --help lists the flags",
        "hydra.run.dirr is no key; allowed there: dir",
        "seed is x; Value 'x' of type 'str' could not be converted to Integer",
        "cache is zip; allowed: multinomial, systematic, threshold, topk",
        "'cache.dir=a=b' is not an override: Hydra cannot read its value (mismatched input '=' expecting <EOF>); write "
        "'cache.dir=\"a=b\"'",
        "student.optim.lrr is no key; allowed there: lr",
        "teacher.optim.lr is ${nope}; Interpolation key 'nope' not found: ${KEY} takes the value of another key, and a "
        "$ that is meant as such is written \\${",
        "student.optim.lr is ${oc.env:NO_SUCH_NAME}; Environment variable 'NO_SUCH_NAME' not found: set it, or write "
        "${oc.env:NAME,DEFAULT}",
    ]  # fmt: skip
    # What only a composed configuration shows does not hide what is wrong besides.
    assert problems("job=teacher", "teacher.model.vision.layers=3", "hydra.launcher.n_jobs=2", "cache.queue=0") == [
        "teacher.model.vision.layers is 3; teacher.model.vision is null and has no keys to set",
        "Could not override 'hydra.launcher.n_jobs'. To append to your config use +hydra.launcher.n_jobs=2",
        "cache.queue is 0; at least 1",
    ]


def test_a_key_given_twice_takes_its_last_value_as_wrappers_need():
    assert loaded("job=teacher", "seed=1", "seed=2")[0].seed == 2
    assert loaded("job=teacher", "experiment=demo", "experiment=smoke")[0].teacher.train.steps == 2000
    assert problems("job=teacher", "seed=x", "seed=2") == [
        "seed is x; Value 'x' of type 'str' could not be converted to Integer"
    ]


def test_every_combination_of_a_sweep_is_checked_and_flags_may_stand_anywhere(monkeypatch):
    assert precheck(["seed=1,2", "-m", "job=teacher"]) == ["--multirun", "seed=1,2", "job=teacher"]
    assert problems("seed=1,2", "--multi", "job=teacher", "cache=systematic,zip") == [
        "cache is zip; allowed: multinomial, systematic, threshold, topk"
    ]
    assert problems("-m", "job=teacher", "cache=topk,systematic", "cache.codec.k=5,300", "seed=1,2") == [
        "cache.codec.k is 300; allowed: 1 to 255"
    ]
    assert problems("-m", "job=teacher", "seed=interval(0,1)", "hydra/launcher=basic,x", "cache.queue=0") == [
        "'seed=interval(0,1)' is not an override: Hydra cannot read its value (Can only enumerate CHOICE and RANGE "
        "sweeps, type is ValueType.INTERVAL_SWEEP)",
        "hydra/launcher=basic,x is a sweep over hydra/launcher, a setting of Hydra's own; give one value",
        "cache.queue is 0; at least 1",
    ]
    precheck(["-m", "job=teacher", "cache=glob(t*)"])
    monkeypatch.setattr("distill.config.load.MOST_COMBINATIONS", 3)
    assert len(problems("-m", "job=teacher", "seed=range(0,1000000000)", "cache.queue=0")) == 1


def test_flags_are_those_of_hydra():
    given = {"--cfg": "job", "--info": "all"}
    for action in get_args_parser()._actions:
        for name in action.option_strings:
            value = given.get(action.option_strings[0], "x") if action.nargs != 0 else ""
            line = arguments.split([name, value] if value else [name])
            assert line.flags == {action.option_strings[0]: value}, name
            assert arguments.split([f"{name}={value}"]).flags == line.flags or not value or len(name) == 2, name


@pytest.mark.parametrize("asked", [["--help"], ["--hydra-help"], ["--version"], ["--cfg", "job"], ["--info"]])
def test_questions_need_no_configuration(asked):
    assert precheck(asked)


@pytest.mark.parametrize(
    "given, code, said",
    [
        (["--cfg", "job", "--resolve", "-p", "teacher.optim", "job=teacher"], 0, ""),
        (["job=teacher", "--info"], 0, ""),
        (["job=teacher", "+hydra.callbacks.x._target_=nope.Nope"], 2, "error: Error locating target 'nope.Nope'"),
        (["-m", "job=teacher", "seed=1,2", "+hydra.launcher.n_jobs=3"], 2, "error: Error in call to target 'hydra."),
    ],
)
def test_what_only_hydra_s_run_finds_is_one_line_too(tmp_path, given, code, said):
    done = subprocess.run(
        [sys.executable, "-m", "distill", *given],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment(PYTHONPATH=":".join(sys.path)),
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
