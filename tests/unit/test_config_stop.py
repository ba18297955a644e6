"""Signals as notes; real ones, sent to processes of their own where they would end this one."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from distill.config import stop
from distill.engine.dist import Dist
from distill.engine.halt import Halt
from tests.cli import default_signals


def script(text):
    return subprocess.run(
        [sys.executable, "-c", "import os, signal, time\nfrom distill.config import stop\n" + text],
        capture_output=True, text=True, timeout=60, preexec_fn=default_signals,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def heard():
    """A shell's `&` starts this process with Ctrl-C ignored, which would stay so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_is_a_note_until_someone_looks(number, code):
    before = signal.getsignal(number)
    with stop.signals():
        stop.check()
        signal.raise_signal(number)
        assert stop.asked() is number
        with pytest.raises(stop.Stopped) as stopped:
            list(stop.checked(range(3)))
        assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    assert stop.asked() is None


def test_ctrl_c_counts_more_than_sigterm():
    with stop.signals():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.asked() is signal.SIGINT


def test_a_second_ctrl_c_does_not_wait():
    text = (
        "with stop.signals():\n    for _ in range(2): os.kill(os.getpid(), signal.SIGINT); print('still', flush=True)"
    )
    done = script(text)
    assert (done.returncode, done.stdout, done.stderr) == (130, "still\n", "")


def test_what_is_ignored_stays_ignored():
    done = script(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with stop.signals():\n    os.kill(os.getpid(), signal.SIGINT); print(stop.asked())"
    )
    assert (done.returncode, done.stdout) == (0, "None\n")


def test_all_ranks_stop_at_the_step_at_which_one_was_asked(monkeypatch):
    """Two ranks in turns; the sum over ranks is that of what both gave."""
    given = []

    class Ranks(Dist):
        def sum(self, tensor):
            given.append(tensor.clone())
            return tensor.copy_(torch.stack(given).sum(0)) if len(given) == 2 else tensor

    first, second = (Halt(Ranks(rank, 2, torch.device("cpu"))) for rank in (0, 1))
    with stop.signals():
        assert first.sum(torch.tensor(5)).item() == 5 and first.asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        given[0][1:] = 0  # what the first had given before
        assert second.sum(torch.tensor(7)).item() == 12
        assert second.asked() is signal.SIGTERM
