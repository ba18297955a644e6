"""The precision of a run: a group on the command line, settled when the run starts, kept when it is resumed."""

import pytest
import torch
from omegaconf import OmegaConf

from distill.config.errors import ConfigError
from distill.config.load import resolve
from distill.config.schema import PrecisionConfig
from distill.engine.dist import Dist
from distill.run import folder as run_folder
from distill.run.chosen_precision import decisive, settled

CPU = Dist(0, 1, torch.device("cpu"))


@pytest.fixture
def gpu(monkeypatch):
    def of(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        return Dist(0, 1, torch.device("cuda", 0))

    return of


def test_a_choice_of_the_group_by_command_line_file_and_study(tmp_path):
    assert resolve(["job=teacher"]).precision == PrecisionConfig("auto", False)
    for job in ("job=teacher", "job=codistill"):
        assert resolve([job, "precision=bf16"]).precision.name == "bf16"
    assert resolve(["job=teacher", "precision=bf16", "precision.native=true"]).precision.native
    assert resolve(["job=teacher", "precision.name=fp32"]).precision.name == "fp32"
    folder = tmp_path / "experiment"
    folder.mkdir()
    head = "# @package _global_\n"
    (folder / "chosen.yaml").write_text(f"{head}defaults:\n  - override /precision: bf16\n")
    (folder / "set.yaml").write_text(f"{head}precision:\n  name: bf16\n")
    (folder / "old.yaml").write_text(f"{head}precision: bf16\n")
    for name in ("chosen", "set"):
        assert resolve(["job=teacher", f"experiment={name}"], str(tmp_path)).precision.name == "bf16"
        assert (
            resolve(["job=teacher", f"experiment={name}", "precision.name=fp32"], str(tmp_path)).precision.name
            == "fp32"
        )
    with pytest.raises(
        ConfigError, match=r"precision is bf16; it has keys of its own: precision\.name, .*old\.yaml, line 2"
    ):
        resolve(["job=teacher", "experiment=old"], str(tmp_path))
    assert resolve(["job=lab", "study=quick"]).precision.name == "fp32"  # a study is measured in one, on any machine


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("precision=fp7", "precision is fp7; allowed: auto, bf16, fp"),
        ("precision.name=fp7", "precision.name is fp7; allowed: auto, fp32, bf16"),
        ("precision.native=true", "precision.native is true with precision.name auto; of the precisions only bf16"),
    ],
)
def test_what_does_not_exist_or_does_nothing_is_refused_by_name(override, problem):
    with pytest.raises(ConfigError) as refused:
        resolve(["job=teacher", override])
    assert problem in str(refused.value)


def test_auto_is_settled_at_the_start_and_kept_by_a_resume(tmp_path, gpu):
    config = resolve(["job=teacher"])
    assert settled(config, tmp_path, CPU).precision.name == "fp32"
    assert settled(config, tmp_path, gpu(9, 0)).precision.name == "bf16"
    again = resolve(["job=teacher", "resume=true"])
    assert settled(again, tmp_path, gpu(9, 0)).precision.name == "bf16"  # there is no run yet
    run_folder.record(tmp_path, settled(config, tmp_path, CPU))
    assert OmegaConf.load(tmp_path / "config.yaml").precision.name == "fp32"
    assert settled(again, tmp_path, gpu(9, 0)).precision.name == "fp32"
    assert not list(run_folder.problems(tmp_path, settled(again, tmp_path, gpu(9, 0))))
    other = settled(resolve(["job=teacher", "resume=true", "precision=bf16"]), tmp_path, CPU)
    assert list(run_folder.problems(tmp_path, other)) == [
        f"precision.name is bf16; the run in {tmp_path} was started with fp32"
    ]


@pytest.mark.parametrize(
    "chosen", [("precision=fp8", "precision.recipe=tensor"), ("precision=bf16", "precision.native=true")]
)
def test_auto_keeps_the_options_of_a_resumed_run_too(tmp_path, chosen):
    run_folder.record(tmp_path, settled(resolve(["job=teacher", *chosen]), tmp_path, CPU))
    again = settled(resolve(["job=teacher", "resume=true"]), tmp_path, CPU)
    assert (
        not list(run_folder.problems(tmp_path, again))
        and again.precision == resolve(["job=teacher", *chosen]).precision
    )


@pytest.mark.parametrize("damaged", [None, {"name": "fp7"}, {"name": "fp8", "recipe": "x"}, [1], {"nam": "fp8"}])
def test_a_damaged_record_of_a_precision_is_compared_not_taken_over(tmp_path, damaged):
    run_folder.record(tmp_path, resolve(["job=teacher", "precision=fp32"]))
    path = tmp_path / "config.yaml"
    text = OmegaConf.load(path)
    text.precision = damaged
    OmegaConf.save(text, path)
    again = settled(resolve(["job=teacher", "resume=true"]), tmp_path, CPU)
    assert again.precision == PrecisionConfig("fp32") and list(run_folder.problems(tmp_path, again))


def test_a_run_of_an_older_version_had_one_key_and_goes_on(tmp_path):
    config = resolve(["job=teacher", "resume=true"])
    run_folder.record(tmp_path, config)
    path = tmp_path / "config.yaml"
    old = OmegaConf.load(path)
    old.precision = "fp32"
    OmegaConf.save(old, path)
    now = settled(config, tmp_path, CPU)
    assert now.precision.name == "fp32" and not list(run_folder.problems(tmp_path, now))


def test_what_the_device_lacks_is_refused(tmp_path, gpu):
    with pytest.raises(ConfigError, match=r"precision\.name is bf16; .* Some GPU has 7\.0; allowed there: auto, fp32"):
        settled(resolve(["job=teacher", "precision=bf16"]), tmp_path, gpu(7, 0))


def test_the_name_alone_decides_a_result_unless_an_option_is_changed():
    assert [decisive(PrecisionConfig(name)) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert decisive(PrecisionConfig("bf16", native=True)) == {"name": "bf16", "native": True}
