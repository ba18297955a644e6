"""Tables and progress: plain text where stderr is not a terminal, nothing that tears or stays where it is."""

import io
import subprocess
import sys

import pytest

from distill.config import units
from distill.config.schema import ConsoleMode
from distill.config.terminal import Progress, advancing, text_table
from tests.unit.test_tracking_console import Clock, Terminal


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
