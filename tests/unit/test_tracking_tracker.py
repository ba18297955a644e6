import json
import socket
import subprocess
import sys
import threading

import pytest

from distill.config.errors import UserError
from distill.config.schema import ConsoleMode, TrackingConfig, WandbMode
from distill.tracking.tracker import Tracker

CONFIG = TrackingConfig(console=ConsoleMode.off, histogram_every=2)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(folder, steps, *, resume=None):
    """A run of a teacher and a student over the given steps."""
    with Tracker(folder, CONFIG, {}, resume_steps=resume) as tracker:
        for step in steps:
            tracker.log("teacher", 2 * step, {"loss": 1 / step, "dead_experts": step})
            tracker.log("student", step, {"loss": 2 / step}, {"alpha": [float(step), 1.0]})


def test_rows_are_flat_objects_one_a_line(tmp_path):
    train(tmp_path, range(1, 4))
    found = rows(tmp_path / "metrics.jsonl")
    assert found[:2] == [
        {"job": "teacher", "step": 2, "loss": 1.0, "dead_experts": 1},
        {"job": "student", "step": 1, "loss": 2.0},
    ]
    assert len(found) == 6 and not any(isinstance(value, dict | list) for row in found for value in row.values())


def test_histograms_go_to_their_own_file_every_few_rows(tmp_path):
    train(tmp_path, range(1, 6))
    found = rows(tmp_path / "histograms.jsonl")
    assert found[0] == {"job": "student", "step": 1, "name": "alpha", "low": 0.0, "high": 1.0, "counts": [1.0, 1.0]}
    assert [row["step"] for row in found] == [1, 3, 5]


def test_numbers_that_are_not_finite_become_null_and_are_reported_once(tmp_path, capsys):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in (1, 2):
            tracker.log("teacher", step, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert rows(tmp_path / "metrics.jsonl")[1] == {
        "job": "teacher", "step": 2, "loss": None, "grad_norm": None, "lr": 0.5
    }  # fmt: skip
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "teacher step 1: loss is nan" in warnings[0] and "grad_norm is inf" in warnings[1]


def test_off_is_silent_but_for_warnings(tmp_path, capsys):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        tracker.progress("teacher", 1, 1, tokens=1)
        tracker.message("hello")
        assert capsys.readouterr() == ("", "")
        tracker.log("teacher", 1, {"loss": float("nan")})
    assert capsys.readouterr() == ("", "warning: teacher step 1: loss is nan; recorded as null\n")


def test_results_can_be_redirected_while_progress_shows(tmp_path, capsys):
    with Tracker(tmp_path, TrackingConfig(console=ConsoleMode.lines), {}) as tracker:
        tracker.progress("teacher", 1, 1, tokens=1)
        tracker.message("the table")
    captured = capsys.readouterr()
    assert captured.out == "the table\n" and "100 %" in captured.err


def test_a_new_run_replaces_what_was_there(tmp_path):
    train(tmp_path, range(1, 4))
    train(tmp_path, [9])
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [18, 9]


@pytest.mark.parametrize("torn", ["", '{"job": "teacher", "st', "\x00\x00\x00"])
@pytest.mark.parametrize("checkpoint", [0, 1, 3, 6])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, torn, checkpoint):
    train(tmp_path / "whole", range(1, 10))
    train(tmp_path / "cut", range(1, 7))
    for name in ("metrics.jsonl", "histograms.jsonl"):
        with (tmp_path / "cut" / name).open("a") as file:
            file.write(torn)
    train(tmp_path / "cut", range(checkpoint + 1, 10), resume={"teacher": 2 * checkpoint, "student": checkpoint})
    for name in ("metrics.jsonl", "histograms.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not list((tmp_path / "cut").glob("*.new"))


def test_a_job_without_a_checkpoint_starts_again(tmp_path):
    train(tmp_path, range(1, 4))
    with Tracker(tmp_path, CONFIG, {}, resume_steps={"teacher": 4}):
        pass
    assert {(row["job"], row["step"]) for row in rows(tmp_path / "metrics.jsonl")} == {("teacher", 2), ("teacher", 4)}


def test_rows_are_readable_while_the_run_goes_on(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        tracker.log("teacher", 1, {"loss": 1.0})
        assert len(rows(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_do_nothing(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", TrackingConfig(wandb=WandbMode.offline), {}, enabled=False)
    tracker.log("teacher", 1, {"loss": float("nan")})
    tracker.progress("teacher", 1, 1, tokens=1)
    tracker.message("hello")
    tracker.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_close_twice_then_a_last_message(tmp_path, capsys):
    tracker = Tracker(tmp_path, TrackingConfig(console=ConsoleMode.lines), {})
    tracker.close()
    tracker.close()
    tracker.message("report: report.html")
    assert capsys.readouterr().out == "report: report.html\n"


def test_without_wandb_it_is_neither_imported_nor_written(tmp_path):
    script = (
        "import sys; from pathlib import Path; from distill.config.schema import TrackingConfig\n"
        "from distill.tracking.tracker import Tracker\n"
        "with Tracker(Path(sys.argv[1]), TrackingConfig(), {}) as t: t.log('teacher', 1, {'loss': 1.0})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["histograms.jsonl", "metrics.jsonl"]


def test_wandb_offline_writes_a_run_without_a_word_or_a_network_call(tmp_path, monkeypatch, capfd):
    heard = []
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: heard.append(server.accept()), daemon=True).start()
    # Wherever wandb would go, it would come here.
    for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
    config = TrackingConfig(console=ConsoleMode.off, wandb=WandbMode.offline, name="a-name")
    ids = []
    for resume in (None, {"teacher": 1}):
        with Tracker(tmp_path, config, {"seed": 17}, resume_steps=resume) as tracker:
            tracker.log("teacher", 2, {"loss": 1.25}, {"alpha": [1.0, 3.0]})
        ids.append((tmp_path / "wandb" / "run_id").read_text().strip())
    assert ids[0] == ids[1]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))
    assert files
    stored = files[0].read_bytes()
    assert all(
        word in stored for word in (b"teacher/loss", b"1.25", b"teacher/step", b"teacher/alpha_histogram", b"17")
    )
    assert heard == [] and capfd.readouterr() == ("", "")


def test_wandb_that_cannot_start_is_one_message(tmp_path, monkeypatch):
    import wandb

    def init(**_):
        raise wandb.errors.CommError("no such\nhost")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"^tracking.wandb=online: wandb could not start: no such host"):
        Tracker(tmp_path, TrackingConfig(console=ConsoleMode.off, wandb=WandbMode.online), {})


def test_wandb_that_fails_on_the_way_is_one_warning(tmp_path, monkeypatch, capsys):
    import wandb

    class FakeWandbRun:
        id = "abc"

        def define_metric(self, *_, **__): ...

        def log(self, _):
            raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", lambda **_: FakeWandbRun())
    config = TrackingConfig(console=ConsoleMode.off, wandb=WandbMode.online)
    with Tracker(tmp_path, config, {}) as tracker:
        for step in (1, 2, 3):
            tracker.log("teacher", step, {"loss": 1.0})
    assert len(rows(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().err == (
        "warning: wandb stopped at teacher step 1: disk full; the run goes on without it\n"
    )


def test_an_arm_is_named_and_grouped_after_its_run(tmp_path, monkeypatch):
    import wandb

    asked = []

    def init(**arguments):
        asked.append((arguments["name"], arguments["group"]))
        raise OSError

    monkeypatch.setattr(wandb, "init", init)
    for folder in (tmp_path / "big", tmp_path / "big" / "arms" / "hard"):
        with pytest.raises(UserError):
            Tracker(folder, TrackingConfig(console=ConsoleMode.off, wandb=WandbMode.offline), {})
    assert asked == [("big", "big"), ("big/hard", "big")]
