"""A user's own YAML: what is wrong with it is told with file, line and column, and the way out; what is sound loads."""

import pytest
from hydra import compose, initialize_config_dir, version

from distill.config.errors import ConfigError
from distill.config.load import CONF, _compose, _hydra, load, precheck

LINE = "# @package _global_\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    return tmp_path / "own"


def write(folder, data, name="experiment/mine.yaml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def problems(folder, *arguments):
    with pytest.raises(ConfigError) as caught:
        precheck(["--config-dir", str(folder), *arguments])
    return caught.value.problems


def loaded(folder, *arguments):
    found = precheck(["--config-dir", str(folder), *arguments])
    overrides = [each for each in found if not each.startswith("--")]
    with _hydra(str(folder)) as hydra:
        return load(_compose(hydra, "config", overrides))


FILES = {
    # what the file says: where, and what of it, the message has
    "a key twice": (LINE + "seed: 1\njob: teacher\nseed: 2\n", "line 4, column 1: while constructing a mapping found"),
    "a deep key twice": (LINE + "data:\n  seed: 1\n  seed: 2\n", "line 4, column 3: while constructing a map"),
    "a tab": (LINE + "data:\n\tseed: 1\n", "line 3, column 1: while scanning for the next token found char"),
    "not UTF-8": (LINE.encode() + b"tracking:\n  name: caf\xe9\n", "line 3, column 12: byte 0xe9 is not UTF-8"),
    "UTF-16": (("\ufeff" + LINE + "seed: 1\n").encode("utf-16-le"), "line 1, column 1: byte 0xff is not UTF-8"),
    "no package line": ("seed: 1\n", "below `experiment.`, where there are no keys; its first line must"),
    "a late package line": ("seed: 1\n" + LINE, "there are no keys; its first line must be `# @package _global_`"),
    "a wrong package": ("# @package global\nseed: 1\n", "below `global.`, where there are no keys; its first line"),
    "a long package line": ("# @package _global_ for all\nseed: 1\n", "Too many components in '@pac"),
    "empty": ("", " is empty; a configuration is lines of `key: value`"),
    "comments alone": (LINE, " is empty; a configuration is lines of `key: value`"),
    "a list": (LINE + "- seed: 1\n", " is [{'seed': 1}]; a configuration is lines of `key: value`"),
    "a text": (LINE + "seed\n", " is 'seed'; a configuration is lines of `key: value`"),
    "no space": (LINE + "job: teacher\nseed:1\n", "line 3, column 1: while scanning a simple key could"),
    "an open bracket": (LINE + "job: [\n", "line 3, column 1: while parsing a flow"),
    "two documents": (LINE + "seed: 1\n---\nseed: 2\n", "line 3, column 1: expected a single document"),
    "an unknown key": (LINE + "student:\n  optim:\n    lrr: 1\n", "student.optim.lrr is no key; allowed there: lr"),
    "a wrong type": (LINE + "student:\n  optim:\n    lr: fast\n", "student.optim.lr is fast; Value 'fast'"),
    "a rule": (LINE + "job: teacher\nseed: -1\n", "seed is -1; at least 0"),
    "a boolean for a text": (LINE + "tracking:\n  project: no\n", "tracking.project is false; it is no text: write"),
    "off": (LINE + "tracking:\n  wandb: off\n", "tracking.wandb is false; Invalid value 'False'"),
    "a boolean for a number": (LINE + "seed: yes\n", "seed is true; Value 'True' of type 'bool' could not be conv"),
    "a boolean for a key": (LINE + "data:\n  corpora:\n    on: {source: stdlib}\n", "the key on is no text to YAML;"),
    "a text for a list": (LINE + "evaluate:\n  needle:\n    lengths: 3\n", "evaluate.needle.lengths is 3; "),
    "a value for a part": (LINE + "teacher: big\n", "teacher is big; it has keys of its own: teacher.model, "),
    "a misspelt choice": (
        LINE + "defaults:\n  - override /cache: topc\njob: teacher\n",
        "line 3, column 5: cache is topc; allowed: multinomial, systematic, threshold, topk",
    ),
    "a misspelt group": (
        LINE + "defaults:\n  - override /cash: topk\njob: teacher\n",
        "line 3, column 5: In 'experiment/mine': Could not override 'cash'. No match in the defaults list.",
    ),
    "no override": (
        LINE + "defaults:\n  - /cache: topk\njob: teacher\n",
        "line 3, column 5: Multiple values for cache. To override a value use 'override cache: topk'",
    ),
    "no slash": (
        LINE + "defaults:\n  - override cache: topk\njob: teacher\n",
        "line 3, column 5: In 'experiment/mine': Could not override 'experiment/cache@cache'. No match in the defaults",
    ),
    "defaults that are no list": (LINE + "defaults: smoke\njob: teacher\n", "line 2, column 1: Invalid defaults list"),
    "a base that is not there": (LINE + "defaults:\n  - smok\n  - _self_\n", "line 3, column 5: In 'experiment"),
    "an alias in itself": (LINE + "data: &a\n  dir: *a\n", ": an alias within what it names"),
    "an unknown anchor": (LINE + "data: *a\n", "line 2, column 7: found undefined alias 'a'"),
    "a tag of Python": (LINE + "seed: !!python/object:os.system {}\n", "line 2, column 7: could not determine a con"),
    "a reference to nothing": (LINE + "job: teacher\nseed: ${nope}\n", "seed is ${nope}; Interpolation key 'nope' not"),
    "of hydra": (LINE + "job: teacher\nhydra:\n  run:\n    dirr: x\n", "hydra.run.dirr is no key; allowed there: dir"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_meant_is_told_in_one_line_with_its_name(folder, case):
    data, message = FILES[case]
    path = write(folder, data)
    (line,) = problems(folder, "experiment=mine", "job=teacher")
    assert message in line and str(path) in line, line


def test_all_of_a_file_comes_at_once_with_the_command_line_and_nothing_twice(folder):
    path = write(folder, LINE + "job: teacher\nstudent:\n  optim:\n    lrr: 1\n    lr: [1]\nseed: x\nfoo: 1\n")
    assert problems(folder, "experiment=mine", "teacher.optim.lr=x", "cache=zip") == [
        "teacher.optim.lr is x; Value 'x' of type 'str' could not be converted to Float",
        "cache is zip; allowed: multinomial, systematic, threshold, topk",
        f"student.optim.lrr is no key; allowed there: lr ({path}, line 5, column 5)",
        "student.optim.lr is [1]; Value '[1]' of type 'ListConfig' could not be converted to Float "
        f"({path}, line 6, column 5)",
        f"seed is x; Value 'x' of type 'str' could not be converted to Integer ({path}, line 7, column 1)",
        problems(folder, "experiment=mine")[-1],
    ]


def test_a_rule_names_the_file_unless_the_command_line_sets_the_key(folder):
    path = write(folder, LINE + "job: teacher\nteacher:\n  optim:\n    lr: -1\n")
    assert problems(folder, "experiment=mine") == [
        f"teacher.optim.lr is -1.0; it must be positive ({path}, line 5, column 5)"
    ]
    assert problems(folder, "experiment=mine", "teacher.optim.lr=-2") == [
        "teacher.optim.lr is -2.0; it must be positive"
    ]


def test_what_is_sound_loads(folder):
    text = (
        "job: teacher\nteacher:\n  optim: &optim\n    lr: 1e-3\n    betas: [0.9, 0.99]\nstudent:\n  optim:\n"
        "    <<: *optim\n    clip: .5\nresume: yes\ntracking:\n  name: 'off'\n  report: off\nevaluate:\n"
        "  samples: 1_000\ndata:\n  corpora:\n    main:\n      max_documents: null\n"
    )
    for data in (LINE + text, "\ufeff" + LINE + text, "\n" + LINE + text.replace("\n", "\r\n"), "---\n" + text):
        if data.startswith("---"):
            data = LINE + data
        write(folder, data)
        run = loaded(folder, "experiment=mine")
        assert (run.teacher.optim.lr, run.student.optim.lr, run.student.optim.clip) == (1e-3, 1e-3, 0.5)
        assert (run.resume, run.tracking.report, run.tracking.name) == (True, False, "off")
        assert run.evaluate.samples == 1000 and run.teacher.optim.betas == [0.9, 0.99]


def test_a_file_that_is_broken_after_the_command_line_was_checked_is_no_empty_one(folder):
    """As in a sweep, each of whose jobs reads its files anew."""
    path = write(folder, LINE + "job: teacher\nseed: 3\n")
    precheck(["--config-dir", str(folder), "experiment=mine"])
    with _hydra(str(folder)) as hydra:
        assert load(_compose(hydra, "config", ["experiment=mine"])).seed == 3
        path.write_text(LINE + "job: teacher\nseed: 4\nseed: 5\n")
        with pytest.raises(ConfigError, match=r"line 4, column 1: .*duplicate key seed"):
            load(_compose(hydra, "config", ["experiment=mine", "job=teacher"]))


def test_files_build_on_ours_and_on_each_other(folder):
    write(folder, LINE + "defaults:\n  - smoke\n  - override /cache: small\n  - _self_\njob: teacher\nseed: 3\n")
    path = write(folder, "codec:\n  name: topk\n  k: 5\n", "cache/small.yaml")
    write(folder, LINE + "defaults:\n  - mine\n  - _self_\nseed: 4\n", "experiment/deep/more.yaml")
    run = loaded(folder, "experiment=mine")
    assert (run.seed, run.cache.codec.k, run.teacher.train.steps) == (3, 5, 2000)
    path.write_text("codec:\n  name: topk\n  k: 0\n")
    assert problems(folder, "experiment=mine") == [f"cache.codec.k is 0; allowed: 1 to 255 ({path}, line 3, column 3)"]
    path.write_text("codec:\n  nam: topk\n")
    assert problems(folder, "experiment=mine") == [
        f"cache.codec.nam is no key; allowed there: name ({path}, line 2, column 3)"
    ]


STUDY = """# @package _global_
defaults:
  - quick
  - _self_
job: lab
lab:
  only: [mine]
  regimes:
    mine:
      set: &wide
        teacher.model.layers: 2
    more:
      set:
        <<: *wide
        teacher.train.steps: 9
  arms:
    new:
      grid:
        student.optim.lr: [1e-3]
"""


def test_a_study_of_one_s_own_has_paths_for_keys(folder):
    path = write(folder, STUDY, "study/mine.yaml")
    lab = loaded(folder, "study=mine").lab
    assert lab.regimes["more"].set == {"teacher.model.layers": 2, "teacher.train.steps": 9}
    assert lab.arms["new"].grid["student.optim.lr"] == [1e-3]
    path.write_text(LINE + "job: lab\nstudent:\n  optim.lr: 1\n")
    (problem,) = problems(folder, "study=mine")
    assert "Key 'optim.lr' not in 'StudentConfig'" in problem and "mine.yaml, line 3, column 1)" in problem


def test_a_file_is_found_or_the_message_says_why_not(folder):
    (line,) = problems(folder, "experiment=mine", "job=teacher")
    assert line == "experiment is mine; allowed: demo, digits, needle, smoke"
    path = write(folder, LINE + "seed: 1\n", "experiment/mine.yml")
    (line,) = problems(folder, "experiment=mine", "job=teacher")
    way_out = "is chosen by experiment=mine where it is DIR/experiment/mine.yaml, with --config-dir DIR"
    assert line.endswith(f"; {path} {way_out}")
    path.rename(folder / "mine.yaml")
    (line,) = problems(folder, "experiment=mine", "job=teacher")
    assert line.endswith(f"; {folder}/mine.yaml {way_out}")
    (line,) = problems(folder, f"experiment={folder}/mine.yaml", "job=teacher")
    assert line.endswith(f"; {folder}/mine.yaml {way_out}")
    write(folder, LINE + "seed: 1\n")
    assert loaded(folder, "experiment=mine", "job=teacher").seed == 1
    (line,) = problems(folder, "experiment=mine.yaml", "job=teacher")
    assert line.endswith(f"; {folder}/experiment/mine.yaml {way_out}")


@pytest.mark.parametrize("name", ["experiment/smoke.yaml", "data/stdlib.yaml"])
def test_a_file_of_our_name_is_refused_where_it_would_be_chosen_since_ours_wins(folder, name):
    """data/stdlib is a choice of config.yaml: nobody has to name it."""
    path = write(folder, (CONF / name).read_bytes() + b"seed: 5\n", name)
    (line,) = problems(folder, "job=teacher", "experiment=smoke")
    assert line.startswith(f"{path} has the name of one of the project's own files, which Hydra would load; rename it")
    path.write_bytes((CONF / name).read_bytes())
    precheck(["--config-dir", str(folder), "job=teacher", "experiment=smoke"])
    write(folder, "not: [yaml", "experiment/unused.yaml")  # what is not chosen is nobody's business
    precheck(["--config-dir", str(folder), "job=teacher", "experiment=smoke"])


def test_the_folder_and_the_root_file_have_to_be_there(folder, tmp_path):
    assert problems(tmp_path / "nowhere", "job=teacher") == [f"--config-dir is {tmp_path}/nowhere; no such folder"]
    path = write(folder, "seed: 1\n", "file")
    assert problems(path, "job=teacher") == [f"--config-dir is {path}; it is a file, not a folder"]
    (line,) = problems(folder, "--config-name", "nonsense", "job=teacher")
    assert line == f"--config-name is nonsense; no such file in {CONF}, {folder}"
    write(folder, "defaults:\n  - config\n  - _self_\nseed: 5\n", "root.yaml")
    precheck(["--config-dir", str(folder), "--config-name", "root", "job=teacher"])
    root = write(folder, "defaults:\n  - config\n  - _self_\nsed: 5\n", "root.yaml")
    assert problems(folder, "--config-name", "root", "job=teacher") == [
        f"sed is no key; allowed: seed ({root}, line 4, column 1)"
    ]


def test_hydra_s_own_search_path_is_read_as_strictly(folder):
    write(folder, LINE + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="duplicate key seed"):
        precheck([f"hydra.searchpath=[file://{folder}]", "experiment=mine", "job=teacher"])
    assert version.getbase() is not None


def test_a_refused_file_is_forgotten_with_the_command_line_that_chose_it(folder):
    write(folder, LINE + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="duplicate key seed"):
        precheck(["--config-dir", str(folder), "experiment=mine", "job=teacher"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert load(compose("config", overrides=["job=teacher"])).seed == 0


def test_a_refused_file_is_forgotten_with_the_configuration_that_it_is_part_of(folder):
    write(folder, LINE + "seed: 1\nseed: 2\n")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        broken = compose("config", overrides=[f"hydra.searchpath=[file://{folder}]", "experiment=mine", "job=teacher"])
        with pytest.raises(ConfigError, match="duplicate key seed"):
            load(broken)
        assert load(compose("config", overrides=["job=teacher"])).seed == 0
