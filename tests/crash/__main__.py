"""`make crash`: kills writers of a cache, flips bits, and kills writers, readers and compactions that work at one time;
prints what was lost and what went unnoticed. ONLY=kills, flips or traffic does one of them, ONLY=cache all.

The numbers go to runs/crash/cache.json. Exits non-zero unless every count of failures is 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from distill.config import json_text
from distill.config.terminal import Progress
from tests.bench.__main__ import machine
from tests.crash import _flips, _kills, _traffic


def main() -> int:
    parser = argparse.ArgumentParser(prog="make crash")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic")
    parser.add_argument("--only", default="cache", choices=("cache", "kills", "flips", "traffic"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = Path("runs/crash")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    progress = Progress(lambda rate: f"{rate:.1f}")
    counts, problems = dict[str, Any](), list[str]()
    for name, work in (
        ("kills", lambda: _kills.run(options.kills, options.seed, progress)),
        ("flips", lambda: _flips.run(options.flips, options.seed, progress)),
        ("traffic", lambda: _traffic.run(options.seconds, options.seed, progress)),
    ):
        if options.only in ("cache", name):
            more, bad = work()
            counts, problems = counts | more, problems + bad
    counts["seconds"] = round(time.monotonic() - began, 1)
    command = (
        f"make crash ONLY={options.only} KILLS={options.kills} FLIPS={options.flips} SECONDS={options.seconds:g} "
        f"SEED={options.seed}"
    )
    record = {"counts": counts, "problems": problems, "machine": machine(), "command": command}
    (out / "cache.json").write_text(json_text.dumps(record, indent=1) + "\n")
    width = max(map(len, counts))
    for key, value in counts.items():
        print(f"  {key:<{width}}  {value}")
    for problem in problems[:50]:
        print(f"  ! {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
