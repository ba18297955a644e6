"""Runs the command line as a user does, on a corpus of a few kilobytes and models of a few thousand parameters."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

PATIENCE = 600.0
"""Seconds after which something counts as hanging: a hundred times what it takes, for machines that do much else."""
TINY = [
    "data=files",
    "data.sample_tokens=16",
    "data.tokenizer.vocab_size=270",
    "data.corpora.main.held_out=0.2",
    *(
        f"{role}.model.{key}={value}"
        for role in ("teacher", "student")
        for key, value in dict(
            vocab_size=272, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, expert_hidden=16,
            dense_hidden=16, experts=4, moe_step=1, chunk_size=8, nope_step=2,
        ).items()
    ),
    *(f"{role}.train.{key}={value}" for role in ("teacher", "student") for key, value in dict(
        batch=4, log_every=2, eval_every=6, eval_samples=4).items()),
    "cache.shard_samples=8",
    "evaluate.samples=16",
    "engine.threads=1",
]  # fmt: skip


def write_corpus(folder: Path, documents: int = 40) -> str:
    """A jsonl of small programs that differ; returns the override that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.jsonl"
    with path.open("w") as file:
        for n in range(documents):
            lines = [f"def f{n}_{i}(x, y={i}):\n    return x * {n} + y - {i * n % 7}\n" for i in range(1 + n % 5)]
            file.write(json.dumps({"text": "".join(lines)}) + "\n")
    return f"data.corpora.main.files=[{path}]"


def environment(**more: str) -> dict[str, str]:
    # The last is the service of a wandb run of this process, which would outlive the started one.
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR", "LOCAL_WORLD_SIZE", "WANDB_SERVICE")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"} | more


def default_signals() -> None:
    """For `preexec_fn`: a shell that starts tests in the background lets them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*arguments: str, ranks: int = 1, launcher: str = "torchrun") -> list[str]:
    start = [sys.executable, "-m"]
    if ranks > 1 and launcher == "torchrun":
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    elif ranks > 1:
        start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--no_local_rank"]
        start += ["--master_port", str(free_port()), "--module"]
    return [*start, "distill", *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*arguments: str, ranks: int = 1, launcher: str = "torchrun", code: int = 0) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command(*arguments, ranks=ranks, launcher=launcher),
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def kill_once(written: Path, least: int, *arguments: str) -> None:
    """Runs a command line that kills itself once `written` has `least` bytes, or so many files match it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.dying", str(written), str(least), *arguments],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, f"exit code {done.returncode}\n{done.stderr[-4000:]}"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    """Everything of metrics.jsonl that must not depend on when a run was killed: names of losses, exact values."""
    return [
        (r["job"], r["step"], *sorted((k, v) for k, v in r.items() if k.endswith("loss") or k in ("alpha", "lag")))
        for r in rows(folder)
    ]
