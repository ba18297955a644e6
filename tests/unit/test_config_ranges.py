"""Every number of the schema has a range, and no value gets past it: neither NaN nor what no run could mean."""

import dataclasses
import math
import types
import typing

import pytest

from distill.cache import format as layout
from distill.cache.codecs import make_codec
from distill.config.checks import check
from distill.config.errors import CacheError, ConfigError
from distill.config.load import precheck, resolve
from distill.config.ranges import MOST_IDS
from distill.config.schema import ArmConfig, CodecConfig, RopeScaling, RunConfig, VisionConfig
from distill.config.study import LabTeacher, RegimeConfig

# What takes a zero, and what takes a token that is none: written down here again on purpose.
ZERO = {
    "seed", "data.seed", "data.corpora.*.needle.seed", "data.corpora.*.law.seed",
    "data.corpora.*.law.draw", "lab.tuning_seeds", "lab.first_seed",
    "data.corpora.*.held_out", "engine.zero", "engine.threads",
    *(f"{role}.{key}" for role in ("teacher", "student") for key in (
        "optim.betas", "optim.clip", "optim.warmup", "optim.decay", "optim.final_lr",
        *(f"optim.weight_decay.{part}" for part in ("matrices", "embedding", "head", "router", "norms")),
        "train.eval_every", "train.checkpoint_every", "train.balance_rate", "train.balance_loss", "train.z_loss",
        "model.experts", "model.active_experts", "model.moe_step", "model.nope_step", "model.moe_layers",
        "model.attn_scale", "model.bos_id", "model.eos_ids", "model.pad_id", "model.vision.image_token_id",
    )),
    *(f"{part}weighting.{key}" for part in ("student.", "codistill.arms.*.") for key in (
        "alpha", "final_alpha", "warmup", "decay", "entropy.skip", "label_gap.margin")),
    "student.hidden_match", "student.loss_options.alpha", "student.loss_options.beta", "evaluate.needle.depths",
}  # fmt: skip
NO_TOKEN = {f"{role}.model.{key}" for role in ("teacher", "student") for key in ("bos_id", "eos_ids", "pad_id")}
NO_TOKEN |= {f"{role}.model.vision.image_token_id" for role in ("teacher", "student")}


def numbers(kind, prefix=""):
    """Key, type and ranges of every number below a dataclass."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        yield from _number(f"{prefix}{name.rstrip('_')}", hint)


def _number(key, hint, ranges=()):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from _number(key, arguments[0], arguments[1:])
    elif origin in (types.UnionType, typing.Union):
        yield from (each for part in arguments for each in _number(key, part))
    elif origin is list:
        yield from _number(key, arguments[0])
    elif origin is dict:
        yield from _number(f"{key}.*", arguments[1])
    elif dataclasses.is_dataclass(hint):
        yield from numbers(hint, f"{key}.")
    elif hint in (int, float):
        yield key, hint, ranges


NUMBERS = list(numbers(RunConfig))


@pytest.fixture(scope="module")
def run():
    found = changed(resolve(["job=codistill", "experiment=smoke"]), "codistill.arms", {"one": ArmConfig()})
    found = changed(found, "lab.regimes", {"one": RegimeConfig(teachers={"one": LabTeacher()})})
    for role in ("teacher", "student"):
        found = changed(found, f"{role}.model.vision", VisionConfig())
        found = changed(found, f"{role}.model.rope_scaling", RopeScaling())
    return found


def changed(config, key, value):
    """The configuration with another value of a key; `*` is the only name of a dictionary."""
    name, _, rest = key.partition(".")
    if name == "*":
        return {each: changed(below, rest, value) for each, below in config.items()}
    before = getattr(config, name)
    if rest:
        return dataclasses.replace(config, **{name: changed(before, rest, value)})
    of_list = (isinstance(before, list) or name == "moe_layers") and not isinstance(value, dict)
    return dataclasses.replace(config, **{name: [value] if of_list else value})


def test_there_are_numbers_and_each_has_one_range():
    assert len(NUMBERS) > 130
    assert [key for key, _, ranges in NUMBERS if len(ranges) != 1] == []


@pytest.mark.parametrize("value", [-1, 0, math.nan, math.inf, -math.inf, 10**30, 1e30, -(10**30)], ids=str)
def test_a_number_that_no_run_could_mean_is_refused_by_name_once(run, value):
    """Of numbers that a field takes there is at most a rule between fields that says something."""
    for key, kind, _ in NUMBERS:
        if kind is int and isinstance(value, float):
            continue  # refused as another type
        accepted = (value == 0 and key in ZERO) or (value == -1 and key in NO_TOKEN)
        named = key.replace("corpora.*", "corpora.main").replace(".*", ".one")
        lines = [line for line in check(changed(run, key, kind(value))) if line.startswith(f"{named} ")]
        if accepted:
            assert not any(word in line for line in lines for word in ("at least", "positive", "finite")), lines
        else:
            assert len(lines) == 1, (key, value, lines)


@pytest.mark.parametrize("value", ["true", "x", "[1]", "''", "null", "nan", "1.5", "1e18"])
def test_a_number_is_a_number_on_the_command_line_too(value):
    """Every field at one time, as a user would spell it; none is passed over and none ends in a traceback."""
    keys = [key.replace("*", "main") for key, _, _ in NUMBERS if ".vision." not in key and "arms" not in key]
    keys = [key for key in keys if "rope_scaling" not in key]
    whole = {key.replace("*", "main") for key, kind, _ in NUMBERS if kind is int}
    try:
        precheck(["job=teacher", *(f"{key}={value}" for key in keys)])
        lines = []
    except ConfigError as error:
        lines = error.problems
    wrong = {line.split(" ", 1)[0] for line in lines}
    if value in ("true", "x", "''"):
        assert wrong >= set(keys), set(keys) - wrong
    elif value in ("nan", "1.5", "1e18"):
        assert wrong >= set(keys) & whole, (set(keys) & whole) - wrong
    assert lines


def test_numbers_of_a_range_s_ends_load():
    last = 2**63 - 1
    found = resolve(["job=teacher", f"seed={last}", "cache=topk", "cache.codec.k=255", "engine.timeout=0.5"])
    assert (found.seed, found.data.seed, found.cache.codec.k) == (last, last, 255)
    with pytest.raises(ConfigError, match=r"^seed is 9223372036854775808; at most 9223372036854775807"):
        precheck(["job=teacher", f"seed={last + 1}", "data.seed=0"])


def test_ranges_are_what_the_cache_can_hold():
    assert MOST_IDS == layout.MAX_VOCAB == layout.MAX_SAMPLE_TOKENS
    ranges = {key: found[0] for key, _, found in NUMBERS if found}
    for key, name in (("draws", "systematic"), ("tau", "threshold"), ("k", "topk")):
        each = ranges[f"cache.codec.{key}"]
        ends = [each.least, math.nextafter(1, 0) if each.below else each.most]
        for value in ends:
            make_codec(CodecConfig(name, **{key: value}), 1000)
        for value in (ends[0] - 1 if key != "tau" else 0.0039, ends[1] + 1):
            with pytest.raises(CacheError):
                make_codec(CodecConfig(name, **{key: value}), 1000)


def test_topk_is_checked_against_the_vocabulary_and_the_format_with_the_others():
    with pytest.raises(ConfigError) as caught:
        precheck(["job=teacher", "cache=topk", "cache.codec.k=256", "seed=-1"])
    assert sorted(caught.value.problems) == ["cache.codec.k is 256; allowed: 1 to 255", "seed is -1; at least 0"]
    small = ["teacher.model.vocab_size=272", "data.tokenizer.vocab_size=270"]
    precheck(["job=teacher", "cache=topk", "cache.codec.k=255", *small])
    small_run = changed(resolve(["job=teacher", *small]), "teacher.model.vocab_size", 200)
    small_run = changed(small_run, "cache.codec", CodecConfig("topk", k=201))
    assert "cache.codec.k is 201; at most the size of the teacher's vocabulary, 200" in list(check(small_run))


def test_a_text_is_neither_empty_nor_full_of_what_nobody_sees():
    with pytest.raises(ConfigError) as caught:
        precheck(["job=teacher", "teacher.init_from=", "data.tokenizer.bos=' '", "cache.dir='a\tb'"])
    found = "\n".join(caught.value.problems)
    for line in (
        "teacher.init_from is empty; give it a value, or null",
        "data.tokenizer.bos is empty; give it a value, or null",
        "cache.dir is 'a\\tb'; it has characters that cannot be printed",
    ):
        assert line in found, (line, found)
