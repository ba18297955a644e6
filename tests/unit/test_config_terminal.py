"""Tables and progress: plain text where stderr is not a terminal, nothing that tears or stays where it is."""

import io
import re
import subprocess
import sys

import pytest

from distill.config import units
from distill.config.schema import ConsoleMode
from distill.config.terminal import Progress, advancing, text_table


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


def test_a_table_is_aligned_and_its_cells_stay_as_they_are():
    rows = [["[red]a[/red]", "1"], ["b" * 200, "1,000"], [":smile:", ""]]
    lines = text_table(rows, ["name", "size\nbytes"])
    assert lines[0] == f"{'name':<200}   size" and lines[1] == " " * 202 + "bytes"
    assert lines[2] == "─" * 207
    assert lines[3] == "[red]a[/red]" + " " * 194 + "1" and lines[4] == "b" * 200 + "  1,000"
    assert lines[5] == ":smile:"
    assert text_table([["a", "1"], ["bb", "22"]]) == ["a    1", "bb  22"]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"])
def test_a_table_does_not_depend_on_the_environment(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert text_table([["a b", "1"]], ["name", "size"]) == ["name  size", "─" * 10, "a b      1"]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Clock()


def test_one_live_line_with_rate_share_time_left_and_text(clock):
    terminal = Terminal()
    progress = Progress(units.tokens, stream=terminal, clock=clock)
    for step in range(0, 51, 10):
        progress.update("teacher", step, 100, amount=10_000, text=f"loss {4 - step / 100:.2f}")
        clock.now += 2.0
    (line,) = terminal.screen()
    assert line.startswith("teacher  50 %") and line.count("━") == 10
    # 10 steps and 10,000 tokens take 2 s; 50 steps remain.
    assert all(part in line for part in ("50/100", "5k tokens/s", "10 s left", "loss 3.50"))


def test_messages_do_not_tear_the_live_line_and_the_last_line_stays(clock):
    terminal = Terminal()
    progress = Progress(units.tokens, mode=ConsoleMode.bar, stream=terminal, clock=clock)
    progress.update("teacher", 1, 2, amount=8, text="loss 3.0")
    progress.print("a message", terminal)
    assert terminal.screen()[0] == "a message" and terminal.screen()[1].startswith("teacher  50 %")
    clock.now = 0.01
    progress.update("teacher", 2, 2, amount=8, text="loss 2.0")
    progress.close()
    message, done, rest = terminal.screen()
    assert message == "a message" and "100 %" in done and "loss 2.0" in done and rest == ""


def test_a_narrow_terminal_is_never_wrapped(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    progress = Progress(units.tokens, mode=ConsoleMode.bar, stream=terminal, clock=clock)
    progress.update("teacher", 1, 1000, amount=8, text="loss " + "3" * 50)
    assert len(terminal.screen()[-1]) == 39


def test_redraws_are_rare_however_often_progress_is_called(clock):
    terminal = Terminal()
    progress = Progress(units.tokens, mode=ConsoleMode.bar, stream=terminal, clock=clock)
    for step in range(1000):
        progress.update("teacher", step, 10_000, amount=1)
        clock.now += 0.001
    assert 8 <= terminal.getvalue().count("\r") <= 11


def test_elsewhere_a_plain_line_every_ten_seconds_and_the_last(clock):
    stream = io.StringIO()
    progress = Progress(units.tokens, stream=stream, clock=clock)
    for step in range(1, 36):
        clock.now += 1.0
        progress.update("student", step, 35, amount=100, text="loss 1.0")
    lines = stream.getvalue().splitlines()
    assert ["11/35" in lines[0], "21/35" in lines[1], "31/35" in lines[2], "35/35" in lines[3]] == [True] * 4
    assert len(lines) == 4 and "100 tokens/s" in lines[0] and "━" not in lines[0] and "\r" not in stream.getvalue()


def test_a_resumed_run_does_not_count_what_was_done_before(clock):
    terminal = Terminal()
    progress = Progress(units.tokens, mode=ConsoleMode.bar, stream=terminal, clock=clock)
    clock.now = 100.0  # what preparing took
    progress.update("teacher", 900, 1000, amount=100)
    assert "left" not in terminal.screen()[-1] and "tokens/s" not in terminal.screen()[-1]
    clock.now += 5.0
    progress.update("teacher", 910, 1000, amount=500)
    assert "100 tokens/s" in terminal.screen()[-1] and "45 s left" in terminal.screen()[-1]


def test_jobs_that_take_turns_have_their_own_rates(clock):
    terminal = Terminal()
    progress = Progress(units.tokens, mode=ConsoleMode.bar, stream=terminal, clock=clock)
    for round in range(3):
        for step in range(1, 11):
            clock.now += 4.0
            progress.update("teacher", 10 * round + step, 100, amount=400)
        for step in range(1, 11):
            clock.now += 1.0
            progress.update("student", 10 * round + step, 100, amount=400)
    line = terminal.screen()[-1]
    assert line.startswith("student  30 %") and "400 tokens/s" in line
    # 70 steps of 4 s and 70 of 1 s.
    assert "5:50 min left" in line


def test_a_transient_line_is_erased_at_the_end(clock):
    terminal = Terminal()
    with Progress(units.file_size, count=units.file_size, transient=True, stream=terminal, clock=clock) as progress:
        progress.update("verify", 0, 4e6, amount=0)
        clock.now += 2.0
        progress.update("verify", 1e6, 4e6, amount=1e6)
        assert terminal.screen()[-1] == f"verify   25 %  {'━' * 5}{'╌' * 15}  1.00 MB/4.00 MB  500.00 kB/s  6 s left"
    assert terminal.screen() == [""]


def test_a_total_that_is_unknown_has_no_share_and_no_time_left(clock):
    stream = io.StringIO()
    progress = Progress(units.tokens, count=None, stream=stream, clock=clock)
    for step in range(3):
        progress.update("packing", step, None, amount=5000, text=f"{step} files")
        clock.now += 10.0
    assert stream.getvalue() == "packing  500 tokens/s  1 files\npacking  500 tokens/s  2 files\n"


def test_a_short_task_of_a_tool_prints_nothing_where_nobody_looks(capsys):
    with advancing("verify", 10) as advance:
        advance(4)
        advance(6)
    assert capsys.readouterr().err == ""


def test_off_is_silent(clock):
    terminal = Terminal()
    with Progress(units.tokens, mode=ConsoleMode.off, stream=terminal, clock=clock) as progress:
        progress.update("a", 1, 1, amount=1)
    assert terminal.getvalue() == ""


def test_rich_is_loaded_by_what_prints_and_not_before():
    code = "import sys; import distill.config.terminal, distill.tracking.tracker; print('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1250, "1.25 kB"), (3.1e9, "3.10 GB")])
def test_sizes(count, text):
    assert units.file_size(count) == text


@pytest.mark.parametrize(("share", "text"), [(0.0, "0 %"), (0.0123, "1.2 %"), (0.62, "62 %"), (-1.14, "−114 %")])
def test_shares(share, text):
    assert units.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1:00 min"), (187, "3:07 min"), (3600, "1:00 h"), (18_720, "5:12 h"), (273_600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.7, "1k"), (38_210, "38.2k"), (999_600, "1M"), (2e7, "20M"), (3.5e12, "3.5T")],
)
def test_short_numbers(value, text):
    assert units.short(value) == text


def test_counted_things():
    assert [units.counted(count, "unit") for count in (0, 1, 1200)] == ["0 units", "1 unit", "1,200 units"]
