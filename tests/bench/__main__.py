"""`make bench` (ONLY=name for one): prints a table and writes runs/bench/<name>.json. LONG ones run by name alone."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path

import torch

from distill.config import json_text

HERE = Path(__file__).parent
LONG = ("busy", "catalog", "lr_transfer", "precision", "previous", "record_bytes", "weighting")


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    places = [*HERE.glob("*.py"), *(path.parent for path in HERE.glob("*/__init__.py"))]
    names = sorted(path.stem for path in places if not path.stem.startswith("_"))
    wanted = sys.argv[1:] or [name for name in names if name not in LONG]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        print(f"error: ONLY is {' '.join(unknown)}; allowed: {', '.join(names)}", file=sys.stderr)
        return 2
    out = Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        results = importlib.import_module(f"tests.bench.{name}").run()
        record = {"results": results, "machine": machine(), "command": f"make bench ONLY={name}"}
        (out / f"{name}.json").write_text(json_text.dumps(record, indent=1) + "\n")
        width = max(map(len, results))
        print(f"\n{name}")
        for key, value in results.items():
            print(f"  {key:<{width}}  {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
