"""The built wheel in an environment of its own, started from a folder that has a `conf/` and packages of our names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from distill import __version__
from tests.cli import TINY, environment, write_corpus

pytestmark = pytest.mark.timeout(300)  # where numba has compiled nothing yet, beside other work

ROOT = Path(__file__).resolve().parents[2]
OWN = """\
# @package _global_
defaults:
  - override /cache: topk

teacher:
  train:
    steps: 6
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as a release is: the sdist from a copy of the tree, the wheel from the sdist."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    aside = shutil.ignore_patterns(".*", "__pycache__", "runs", "outputs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=aside)
    run(sys.executable, "-m", "build", "--no-isolation", copy)
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """An environment with the wheel and what it depends on, but not with the repository."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    # A plain line: the .pth files over there, which name the repository, are not read.
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for machine_code in (ROOT / "distill").rglob("__pycache__/*.nb[ci]"):  # fits by digest; compiling takes 15 s
        copy = packages / machine_code.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(machine_code, copy)
    return folder


@pytest.fixture
def away(tmp_path):
    """A folder whose own files must not be taken for ours."""
    folder = tmp_path / "away"
    for name in ("conf/config.yaml", "conf/experiment/own.yaml", "conf/data/files.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not: ours\n")
    for name in ("distill", "teacher", "losses"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    return folder


def run(*command, cwd=None, **variables):
    env = {k: v for k, v in environment().items() if k not in ("PYTHONPATH", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def test_the_wheel_holds_every_module_and_every_value_and_no_package_named_conf(wheel):
    packages = ("distill", "teacher", "student", "losses")
    modules = {str(p.relative_to(ROOT)) for name in packages for p in (ROOT / name).rglob("*.py")}
    modules |= {"distill/tools/bytes_per_token.json", "distill/tracking/page.css"}
    values = {f"distill/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert files == modules | values
    assert licenses and wheel.name.startswith(f"codistill-{__version__}-")


def test_it_runs_from_anywhere_and_writes_into_its_run_alone(place, away, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(OWN)
    home = {"HOME": str(tmp_path / "home")}
    program = "import distill.config.load as l, losses; print(l.CONF, losses.__file__)"
    for path in run(place / "bin" / "python", "-c", program, cwd=tmp_path).stdout.split():
        assert Path(path).is_relative_to(place)
    before = files_of(place)
    run(
        place / "bin" / "codistill", f"--config-dir={tmp_path}/mine", "job=teacher", "experiment=own", *TINY,
        write_corpus(tmp_path), "tracking=offline", "hydra.run.dir=out", cwd=away, **home,
    )  # fmt: skip
    assert json.loads((away / "out" / "cache" / "cache.json").read_text())["codec"]["name"] == "topk"
    rows = [json.loads(line) for line in (away / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 6
    assert files_of(place) == before and not (tmp_path / "home").exists()
    # Without a place for numba: the installation's folders of compiled code are files now.
    for cached in [*place.rglob("distill/**/__pycache__")]:
        shutil.rmtree(cached)
        cached.touch()
    tool = run(place / "bin" / "codistill-cache", "stats", "out/cache", "--json", cwd=away, HOME="/dev/null")
    assert tool.stderr == "" and json.loads(tool.stdout)["records"] == 24


def files_of(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_every_way_in_gives_one_version_and_one_line_for_a_mistake(place, away, tmp_path):
    ways = [[place / "bin" / "codistill"], [place / "bin" / "python", "-m", "distill"]]
    tools = [[place / "bin" / "codistill-cache"], [place / "bin" / "python", "-m", "distill.tools"]]
    for way in [*ways, *tools]:
        # `python -m` looks into the present folder first.
        assert run(*way, "--version", cwd=tmp_path if "-m" in way else away).stdout == f"codistill {__version__}\n"
    for way, mistake in [(ways[0], ["job=teacher", "experiment=nowhere"]), (tools[0], ["stats", "nowhere"])]:
        done = subprocess.run([*way, *mistake], cwd=away, env=environment(), capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(os.listdir(away)) == ["conf", "distill", "losses", "teacher"]
