import io
import re

import pytest

from distill.config.schema import ConsoleMode
from distill.config.units import duration, short
from distill.tracking.console import Console


class Terminal(io.StringIO):
    """Keeps what a terminal would show: the lines done, and the one under the cursor."""

    def isatty(self):
        return True

    def screen(self):
        lines = [""]
        written = self.getvalue().replace("\r\x1b[2K", "\0")
        for part in re.sub("\x1b\\[[0-9;]*m", "", written).splitlines(keepends=True):
            text = part.rstrip("\n")
            lines[-1] = text.rsplit("\0", 1)[1] if "\0" in text else lines[-1] + text
            if part.endswith("\n"):
                lines.append("")
        return lines


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Clock()


def test_one_live_line_with_rate_share_time_left_and_text(clock):
    terminal = Terminal()
    console = Console(ConsoleMode.auto, live=terminal, out=terminal, clock=clock)
    for step in range(0, 51, 10):
        console.progress("teacher", step, 100, tokens=10_000, text=f"loss {4 - step / 100:.2f}")
        clock.now += 2.0
    (line,) = terminal.screen()
    assert line.startswith("teacher  50 %") and line.count("━") == 10
    # 10 steps and 10,000 tokens take 2 s; 50 steps remain.
    assert all(part in line for part in ("50/100", "5k tokens/s", "10 s left", "loss 3.50"))


def test_messages_do_not_tear_the_live_line_and_the_last_line_stays(clock):
    terminal = Terminal()
    console = Console(ConsoleMode.bar, live=terminal, out=terminal, clock=clock)
    console.progress("teacher", 1, 2, tokens=8, text="loss 3.0")
    console.message("a message")
    assert terminal.screen()[0] == "a message" and terminal.screen()[1].startswith("teacher  50 %")
    clock.now = 0.01
    console.progress("teacher", 2, 2, tokens=8, text="loss 2.0")
    console.close()
    message, done, rest = terminal.screen()
    assert message == "a message" and "100 %" in done and "loss 2.0" in done and rest == ""


def test_a_narrow_terminal_is_never_wrapped(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    console = Console(ConsoleMode.bar, live=terminal, out=terminal, clock=clock)
    console.progress("teacher", 1, 1000, tokens=8, text="loss " + "3" * 50)
    assert len(terminal.screen()[-1]) == 39


def test_redraws_are_rare_however_often_progress_is_called(clock):
    terminal = Terminal()
    console = Console(ConsoleMode.bar, live=terminal, out=terminal, clock=clock)
    for step in range(1000):
        console.progress("teacher", step, 10_000, tokens=1)
        clock.now += 0.001
    assert 8 <= terminal.getvalue().count("\r") <= 11


def test_elsewhere_a_plain_line_every_ten_seconds_and_the_last(clock):
    stream = io.StringIO()
    console = Console(ConsoleMode.auto, live=stream, out=stream, clock=clock)
    for step in range(1, 36):
        clock.now += 1.0
        console.progress("student", step, 35, tokens=100, text="loss 1.0")
    lines = stream.getvalue().splitlines()
    assert ["11/35" in lines[0], "21/35" in lines[1], "31/35" in lines[2], "35/35" in lines[3]] == [True] * 4
    assert len(lines) == 4 and "100 tokens/s" in lines[0] and "━" not in lines[0] and "\r" not in stream.getvalue()


def test_a_resumed_run_does_not_count_what_was_done_before(clock):
    terminal = Terminal()
    console = Console(ConsoleMode.bar, live=terminal, out=terminal, clock=clock)
    clock.now = 100.0  # what preparing took
    console.progress("teacher", 900, 1000, tokens=100, text="")
    assert "left" not in terminal.screen()[-1] and "tokens/s" not in terminal.screen()[-1]
    clock.now += 5.0
    console.progress("teacher", 910, 1000, tokens=500, text="")
    assert "100 tokens/s" in terminal.screen()[-1] and "45 s left" in terminal.screen()[-1]


def test_jobs_that_take_turns_have_their_own_rates(clock):
    terminal = Terminal()
    console = Console(ConsoleMode.bar, live=terminal, out=terminal, clock=clock)
    for round in range(3):
        for step in range(1, 11):
            clock.now += 4.0
            console.progress("teacher", 10 * round + step, 100, tokens=400)
        for step in range(1, 11):
            clock.now += 1.0
            console.progress("student", 10 * round + step, 100, tokens=400)
    line = terminal.screen()[-1]
    assert line.startswith("student  30 %") and "400 tokens/s" in line
    # 70 steps of 4 s and 70 of 1 s.
    assert "5:50 min left" in line


def test_off_is_silent_but_for_warnings(clock):
    terminal = Terminal()
    console = Console(ConsoleMode.off, live=terminal, out=terminal, clock=clock)
    console.progress("teacher", 1, 1, tokens=1)
    console.message("hello")
    assert terminal.getvalue() == ""
    console.warn("loss is nan")
    assert terminal.getvalue() == "warning: loss is nan\n"


def test_results_can_be_redirected_while_progress_shows(capsys):
    console = Console(ConsoleMode.lines)
    console.progress("teacher", 1, 1, tokens=1)
    console.message("the table")
    captured = capsys.readouterr()
    assert captured.out == "the table\n" and "100 %" in captured.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1:00 min"), (187, "3:07 min"), (3600, "1:00 h"), (18_720, "5:12 h"), (273_600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.7, "1k"), (38_210, "38.2k"), (999_600, "1M"), (2e7, "20M"), (3.5e12, "3.5T")],
)
def test_short_numbers(value, text):
    assert short(value) == text
