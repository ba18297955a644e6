"""Peak of anonymous memory while a checkpoint is read or written, in a process of its own; prints JSON in bytes.

python -m tests.workers.hf_memory load FOLDER DTYPE
python -m tests.workers.hf_memory save FOLDER DTYPE SHARD_BYTES OUT
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from distill.model import Transformer, hf
from tests.unit.test_model_attention import config_of


def anonymous():
    """Memory of this process that no file backs; mapped pages are the file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """Highest anonymous memory over that at the start, looked at every half millisecond."""

    def __enter__(self):
        self.before = self.most = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.0005)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, anonymous())


def main(what, folder, dtype, shard_bytes="0", out=""):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder_of_nothing:  # what is imported and compiled at first use
        hf.save(Transformer(config_of()), Path(folder_of_nothing) / "tiny")
        hf.load(Path(folder_of_nothing) / "tiny")
    dtype = getattr(torch, dtype)
    if what == "load":
        with Peak() as peak:
            model = hf.load(folder, dtype)
    else:
        model = hf.load(folder)
        with Peak() as peak:
            hf.save(model, out, dtype=dtype, max_shard_bytes=int(shard_bytes))
    held = sum(p.nbytes for p in model.parameters())
    print(json.dumps({"peak": peak.most - peak.before, "model": held}))


if __name__ == "__main__":
    main(*sys.argv[1:])
