"""Random search: `make fuzz MINUTES=5` runs the tests that draw their input, with new input until the time is up.

These are the tests of hypothesis, and those with a parameter `seed`. SEED=N is the seed of the first round (default:
any), every round takes the next one; ONLY=x is an expression for pytest's -k. Exits non-zero if any test fails.
"""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import sys
import time
from typing import Any

import hypothesis
import pytest

OPTIONS = ["-p", "no:terminal", "-p", "no:xdist", "-o", "addopts=--strict-markers -p no:cacheprovider",
           "-o", "tmp_path_retention_policy=failed"]  # fmt: skip
SECONDS_A_TEST = 600


class Search:
    """A plugin that collects what draws its input, and runs it again and again."""

    def __init__(self, minutes: float, seed: int):
        self._seconds, self._seed = 60 * minutes, seed
        self._began = self._shown = 0.0
        self._rounds = self._examples = 0
        self.failed: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kept: dict[tuple[Any, ...], Any] = {}
        for item in items:
            parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
            if item.get_closest_marker("hypothesis") or "seed" in parameters:
                parameters.pop("seed", None)
                kept.setdefault((item.nodeid.split("[")[0], repr(sorted(parameters.items()))), item)
        items[:] = kept.values()
        for handle in {id(h): h for item in items if (h := getattr(item.obj, "hypothesis", None))}.values():
            handle.inner_test = self._counted(handle.inner_test)

    def _counted(self, test: Any) -> Any:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            self._examples += 1
            test(*args, **kwargs)

        return counted

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            print(report.longreprtext)

    def pytest_runtestloop(self, session: Any) -> bool:
        if session.testsfailed:
            raise session.Interrupted("not all tests can be collected")
        self._began, left = time.monotonic(), list(session.items)
        print(f"{len(left)} tests, {self._seconds / 60:g} minutes, SEED={self._seed}", flush=True)
        while left and not self._late():
            for item in list(left):
                before = len(self.failed)
                self._draw(item)
                following = left[(left.index(item) + 1) % len(left)]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if len(self.failed) > before:
                    left.remove(item)
                self._show()
                if self._late():
                    break
            self._rounds += 1
        session._setupstate.teardown_exact(None)
        self._show(last=True)
        return True

    def _draw(self, item: Any) -> None:
        """The item's next run takes the seed of this round."""
        if hasattr(item, "callspec") and "seed" in item.callspec.params:
            item.callspec.params["seed"] = self._seed + self._rounds
            self._examples += 1
        if item.get_closest_marker("hypothesis"):
            hypothesis.seed(self._seed + self._rounds)(item.obj)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            name = report.nodeid.split("::")[-1].split("[")[0]
            print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}")
            print(f"Again: make fuzz SEED={self._seed + self._rounds} ONLY={name}", flush=True)

    def _late(self) -> bool:
        return time.monotonic() - self._began >= self._seconds

    def _show(self, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._shown < 5 and not last:
            return
        self._shown, took = now, now - self._began
        rate, left = self._examples / max(took, 1e-9), max(self._seconds - took, 0)
        print(
            f"{self._examples} examples in {self._rounds} rounds, {rate:.0f} a second, "
            f"{len(self.failed)} failed, {left:.0f} s left",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"MINUTES is {options.minutes:g}; it must be above 0")
    if options.seed is not None and not 0 <= options.seed < 2**31:
        parser.error(f"SEED is {options.seed}; it must lie in 0 to {2**31 - 1}")
    search = Search(options.minutes, secrets.randbelow(2**20) if options.seed is None else options.seed)
    os.environ.pop("PYTEST_ADDOPTS", None)
    code = pytest.main([*OPTIONS, f"--timeout={SECONDS_A_TEST}", "-k", options.only], plugins=[search])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        parser.error(f"ONLY is {options.only}; no test that draws its input has this name")
    return int(bool(code) or bool(search.failed))


if __name__ == "__main__":
    sys.exit(main())
