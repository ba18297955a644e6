"""A folder of a user's own configuration, beside the installation's."""

import json

import pytest

from distill.config.errors import ConfigError
from distill.config.load import resolve
from distill.tools.commands import main

HEADER = "# @package _global_\n"
OWN = """\
defaults:
  - override /cache: topk
teacher:
  train: {steps: 3, batch: 5}
data:
  sample_tokens: 64
"""


@pytest.fixture
def own(tmp_path):
    """Its name has what Hydra's grammar would take apart."""
    folder = tmp_path / "my own, 'folder' [1]" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(HEADER + OWN)
    return folder.parent


def test_its_experiments_stand_beside_ours(own):
    for experiment, steps in (("mine", 3), ("smoke", 2000)):
        assert resolve([f"experiment={experiment}", "job=teacher"], str(own)).teacher.train.steps == steps
    with pytest.raises(ConfigError, match="experiment is nothing; allowed: demo, digits, mine, needle, smoke"):
        resolve(["experiment=nothing", "job=teacher"], str(own))


def test_an_experiment_needs_its_first_line(own):
    (own / "experiment" / "mine.yaml").write_text(OWN)
    with pytest.raises(ConfigError):
        resolve(["experiment=mine", "job=teacher"], str(own))


def test_the_tools_take_it_too(own, capsys):
    assert main(["estimate", "--config", "mine", "--config-dir", str(own), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 15
    assert main(["estimate", "--tokens", "1e6", "--config-dir", str(own)]) == 2
    assert capsys.readouterr().err == f"error: --config-dir is {own}; it needs --config\n"
