"""`make crash` (ONLY=name for one): breaks things on purpose, prints what was lost and what went unnoticed, writes
runs/crash/<name>.json, and exits non-zero unless every count of failures is 0.

KILLS=200 FLIPS=10000 SEED=0 are what they say.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from distill.config import json_text
from distill.config.terminal import Progress

HERE = Path(__file__).parent


def main() -> int:
    names = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))
    parser = argparse.ArgumentParser(prog="make crash")
    parser.add_argument("names", nargs="*", default=names, metavar="ONLY", help=", ".join(names))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"ONLY is {' '.join(unknown)}; allowed: {', '.join(names)}")
    from tests.bench.__main__ import machine

    out = Path("runs/crash")
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.names:
        began = time.monotonic()
        figures, problems = importlib.import_module(f"tests.crash.{name}").run(
            kills=options.kills, flips=options.flips, seed=options.seed, progress=Progress("{:.1f}".format)
        )
        figures["seconds"] = round(time.monotonic() - began, 1)
        command = f"make crash ONLY={name} KILLS={options.kills} FLIPS={options.flips} SEED={options.seed}"
        record = {"figures": figures, "problems": problems, "machine": machine(), "command": command}
        (out / f"{name}.json").write_text(json_text.dumps(record, indent=1) + "\n")
        width = max(map(len, figures))
        print(f"\n{name}")
        for key, value in figures.items():
            print(f"  {key:<{width}}  {value}")
        for problem in problems[:50]:
            print(f"  ! {problem}")
        failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
