"""Processes: rank, world size, device, and sums over all ranks. One process needs no collective."""

import atexit
import datetime
import os
import warnings
from typing import Any

import torch
import torch.distributed as torch_dist

from distill.config.errors import ConfigError
from distill.config.schema import EngineConfig


class Dist:
    """Rank, world size, device, and the few collectives the jobs need."""

    def __init__(self, rank: int, world: int, device: torch.device):
        self.rank, self.world, self.device = rank, world, device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place sum over ranks; returns its argument."""
        if self.world > 1:
            torch_dist.all_reduce(tensor)
        return tensor

    def least(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place minimum over ranks; returns its argument."""
        if self.world > 1:
            torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MIN)
        return tensor

    def from_main(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        torch_dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        if self.world > 1:
            torch_dist.barrier()


def _place() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; ConfigError where a launcher, or the leftovers of a shell, set other values."""
    values: dict[str, int] = {}
    problems = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name, "1")
        if not (text.isascii() and text.isdigit()):
            problems.append(f"{name} is {text!r} in the environment; a whole number, or unset it for one process")
        else:
            values[name] = int(text)
    if not problems:
        for name, least, most in (
            ("WORLD_SIZE", 1, 10**6),
            ("LOCAL_WORLD_SIZE", 1, 10**6),
            ("RANK", 0, max(values["WORLD_SIZE"], 1) - 1),
            ("LOCAL_RANK", 0, max(values["WORLD_SIZE"], 1) - 1),
            ("MASTER_PORT", 0, 65535),
        ):
            if not least <= values[name] <= most:
                problems.append(f"{name} is {values[name]} in the environment; allowed: {least} to {most}")
    if problems:
        raise ConfigError(*problems)
    return values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]


def start(config: EngineConfig) -> Dist:
    """Joins the process group (once per process; later jobs of a sweep find it there) and sets threads and device.

    torchrun and the deepspeed launcher set the five rendezvous variables; a plain run gets those of a world of one.
    """
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any free one: two plain runs side by side must not share one
    }.items():
        os.environ.setdefault(key, value)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rank, world, local = _place()
    torch.set_num_threads(config.threads or _threads(int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    torch.get_num_threads()  # settles this thread: helper threads set their own number, which later ones would inherit
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        # cuDNN plans anew for every shape, 7 to 10 ms on the host, and packed documents have a new one in every call.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not torch_dist.is_initialized():
        # One warning per collective otherwise, at every ZeRO stage on gloo.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        backend = config.backend or ("nccl" if on_gpu else "gloo")
        try:
            torch_dist.init_process_group(
                backend,
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=config.timeout),
                init_method=None if world > 1 else "tcp://127.0.0.1:0",
            )
        except (ValueError, RuntimeError, AssertionError) as error:  # no such backend, or no process at that address
            where = f", MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
            raise ConfigError(
                f"engine.backend is {backend}, rank {rank} of {world}{where * (world > 1)}; the processes cannot join: "
                f"{str(error).splitlines()[0]:.300}"
            ) from error
        if on_gpu:
            atexit.register(torch_dist.destroy_process_group)  # NCCL warns of a leak otherwise
    return Dist(rank, world, device)


def _threads(ranks: int) -> int:
    """CPU threads of a process on a node of so many ranks: the user's OMP_NUM_THREADS, else a share of the
    cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    # torchrun sets 1 where the user has set none.
    if wanted.isdecimal() and int(wanted) > 0 and not (wanted == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return int(wanted)
    return max(1, len(os.sched_getaffinity(0)) // ranks)
