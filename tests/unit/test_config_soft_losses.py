"""Which loss may use which targets: the guide's table is what the configuration decides, and a refusal says why."""

import re
from pathlib import Path

import pytest

from distill.config import soft_losses
from distill.config.errors import ConfigError
from distill.config.load import resolve
from distill.config.registry import CODECS, LOSSES
from distill.config.schema import LossOptions, StudentConfig

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
NOT_LINEAR = ["reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "alpha_beta"]


def problems(*arguments):
    try:
        resolve([*arguments])
    except ConfigError as error:
        return error.problems
    return []


def table(first):
    """Rows of cells of the guide's table whose heading starts so."""
    lines = GUIDE[GUIDE.index(f"| {first}") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [[cell.strip(" |") for cell in row] for row in rows if not set("".join(row)) <= set("|-")]


def test_the_table_of_the_guide_is_the_decision():
    (_, *columns), *rows = table("loss | `systematic`")
    forms = [soft_losses.LIVE if "live" in column else None for column in columns]
    codecs = [re.findall(r"`(\w+)`", column) for column in columns]
    assert sorted(name for names in codecs for name in names) == sorted(CODECS.names)
    seen = set()
    for first, *cells in rows:
        for loss in re.findall(r"`(\w+)`", first):
            temperatures = [1.0] if "temperature 1" in first else [2.0, 0.5] if "another" in first else [1.0, 2.0]
            for temperature in temperatures:
                seen.add((loss, temperature == 1))
                for form, names, cell in zip(forms, codecs, cells):
                    for each in [form] if form else map(soft_losses.form_of, names):
                        assert soft_losses.verdict(loss, temperature, each) == cell, (loss, temperature, each)
    every = {(name, flat) for name in [*LOSSES.names, soft_losses.HIDDEN] for flat in (True, False)}
    assert every - seen == {("mixed", False)}  # it has no temperature


def test_the_options_of_the_guide_are_those_that_losses_read():
    rows = table("loss | is | options")[1:]
    found = {
        re.findall(r"`(\w+)`", first)[0]: {k: float(v) for k, v in re.findall(r"`(\w+)` ([\d.]+)", options)}
        for first, _, options in rows
    }
    assert found == {name: dict(LOSSES[name].options) for name in LOSSES.names}
    for name, options in found.items():
        assert soft_losses.options_of(StudentConfig(loss=name)) == options


@pytest.mark.parametrize("loss", NOT_LINEAR)
def test_a_sampled_codec_is_refused_with_the_reason_and_the_way_out(loss):
    (line,) = problems("job=codistill", f"student.loss={loss}")
    assert line == (
        f"student.loss is {loss} with cache.codec.name=systematic; it is not linear in p: a sampled codec gives a "
        "biased gradient; allowed: mixed, forward_kl at temperature 1, codec topk, or student.targets=live"
    )
    assert not problems("job=codistill", f"student.loss={loss}", "cache=topk", "student.loss_options.temperature=3")
    assert not problems("job=codistill", f"student.loss={loss}", "student.targets=live")


def test_a_temperature_is_refused_as_the_key_that_is_wrong():
    assert not problems("job=codistill", "student.loss=forward_kl")
    (line,) = problems("job=codistill", "student.loss=forward_kl", "student.loss_options.temperature=2")
    assert line.startswith(
        "student.loss_options.temperature is 2 with cache.codec.name=systematic; it is not linear in p"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss_options.temperature=2"], "temperature is 2.0; student.loss mixed reads no options"),
        (["loss=reverse_kl", "loss_options.skew=0.5"], "skew is 0.5; student.loss reverse_kl reads temperature"),
        (["loss=jensen_shannon", "loss_options.beta=1"], "beta is 1.0; student.loss jensen_shannon allows (0, 1)"),
        (
            ["loss=alpha_beta", "loss_options.alpha=0.001"],
            "alpha is 0.001; allowed: 0, which is the limit, or 0.01 to 10",
        ),
        (
            ["loss=alpha_beta", "loss_options.alpha=0", "loss_options.beta=0"],
            "alpha is 0.0 and beta is 0.0; one of them",
        ),
        (["loss=skew_kl", "loss_options.skew=1"], "skew is 1.0; allowed: (0, 1)"),
        (["loss=reverse_kl", "loss_options.temperature=0"], "temperature is 0.0; allowed: 0.05 to 100"),
    ],
)
def test_options_are_in_their_ranges_and_read(overrides, said):
    (line,) = problems("job=codistill", "cache=topk", *[f"student.{each}" for each in overrides])
    assert line.startswith(f"student.loss_options.{said}")


def test_limits_of_the_alpha_beta_divergence_need_every_id():
    for options, needs in (({}, False), ({"alpha": 0.0, "beta": 1.0}, True), ({"alpha": 1.0, "beta": 0.0}, False)):
        assert (
            soft_losses.needs_every_id(StudentConfig(loss="alpha_beta", loss_options=LossOptions(**options))) == needs
        )


def test_live_targets_say_what_they_need(tmp_path):
    live = ["student.targets=live", "data=stdlib"]
    assert problems("job=student", *live) == [
        "teacher.from is null; student.targets=live with job=student takes the frozen teacher of that folder"
    ]
    taught = ["job=student", *live, f"teacher.from={tmp_path}"]
    assert not problems(*taught)
    (line,) = problems(*taught, "student.cached=false")
    assert line.startswith("student.cached is false with student.targets=live; it stands for labels alone")
    assert problems(*taught, "cache.follow=true") == [
        "cache.follow is true with student.targets=live; no cache is read"
    ]
    arms = "+codistill.arms={a:{cached:true},b:{cached:false}}"
    (line,) = problems("job=codistill", *live, "teacher.capture=false", arms)
    assert line == (
        "teacher.capture is false; job=codistill trains codistill.arms.a on what the teacher captures "
        "(student.targets=live and arms with cached=false need no capture)"
    )
    assert not problems("job=codistill", *live, "teacher.capture=false")
    (line,) = problems("job=codistill", *live, "student.loss=reverse_kl", arms)
    assert line == (
        "student.loss is reverse_kl with cache.codec.name=systematic, which codistill.arms.a would read; it is not "
        "linear in p: a sampled codec gives a biased gradient; allowed: mixed, forward_kl at temperature 1, codec "
        "topk, or no arms that read it (~codistill.arms.a)"
    )
    (line,) = problems("job=codistill", *live, "student.loss=reverse_kl", "student.model.vocab_size=600")
    assert line == (
        "student.model.vocab_size is 600; teacher.model has 512 ids: allowed is as many; student.loss reverse_kl is "
        "infinite on ids that the teacher lacks"
    )
    assert not problems("job=codistill", *live, "student.model.vocab_size=600")


@pytest.mark.parametrize("job", ["job=codistill", "job=student"])
@pytest.mark.parametrize("targets", ["live", "cache"])
def test_a_name_that_is_no_loss_is_one_sentence(tmp_path, job, targets):
    """Rules that look up the loss have nothing to say of it."""
    needs = (
        [f"teacher.from={tmp_path}" if targets == "live" else f"cache.dir={tmp_path}"] if job[4:] == "student" else []
    )
    (line,) = problems(job, *needs, "data=stdlib", f"student.targets={targets}", "student.loss=tv")
    assert line == f"student.loss is tv; allowed: {', '.join(LOSSES.names)}"


def test_hidden_states_are_in_no_cache():
    (line,) = problems("job=student", "cache.dir=/x", "student.hidden_match=1")
    assert line == (
        "student.hidden_match is 1 with student.targets=cache; a cache holds no hidden states: allowed is 0, or "
        "student.targets=live"
    )


def test_all_of_it_comes_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve(["job=codistill", "student.loss=reverse_kl", "student.loss_options.skew=0.5", "student.hidden_match=2"])
    assert len(caught.value.problems) == 3
