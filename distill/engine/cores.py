"""How threads wait on cores that other programs use too; to be settled before torch is loaded, which reads it once.

GNU OpenMP's threads spin at the end of each parallel region. Where another program holds a core, they spin while the
thread that they wait for has none, and training falls to a tenth of its rate; threads that sleep at once lose a third
of it on a quiet machine (LOG.md, busy machines).
"""

import os

import psutil

import distill

SHARED_SPINS = "1000"
SECONDS = 0.3
"""For which the use of the cores is measured."""


def settle(threads: int) -> str | None:
    """Makes threads sleep soon where other programs keep a quarter of this process's cores busy, unless the user has
    set how they wait; returns a message about it.

    Args:
        threads: of this process, 0: as many as the environment sets; a single thread never waits.
    """
    single = threads == 1 or (threads == 0 and os.environ.get("OMP_NUM_THREADS") == "1")
    if single or not distill.OWN_SPINS:
        return None
    own = os.sched_getaffinity(0)
    percent = psutil.cpu_percent(SECONDS, percpu=True)  # this process sleeps meanwhile
    busy = sum(percent[core] for core in own if core < len(percent)) / 100
    if busy < len(own) / 4:
        return None
    os.environ["GOMP_SPINCOUNT"] = SHARED_SPINS
    return (
        f"other programs use {busy:.1f} of {len(own)} cores: threads wait with GOMP_SPINCOUNT={SHARED_SPINS}; "
        "OMP_NUM_THREADS=1 may be faster still (what you set of both counts)"
    )
