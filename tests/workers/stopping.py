"""The command line, with real signals at places that no clock could hit.

    python -m tests.workers.stopping MODULE:NAME CALL SIGNAL OVERRIDE...

sends SIGNAL to the process at the start of the CALL-th call of a function (CALL from 1).
"""

import functools
import os
import signal
import sys
from importlib import import_module


def main() -> int:
    place, call, name, *overrides = sys.argv[1:]
    module, _, path = place.partition(":")
    home = import_module(module)
    *classes, function = path.split(".")
    for each in classes:
        home = getattr(home, each)
    original, calls = getattr(home, function), [0]

    @functools.wraps(original)
    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == int(call):
            os.kill(os.getpid(), signal.Signals[name])
        return original(*arguments, **keywords)

    setattr(home, function, counted)
    sys.argv[1:] = overrides
    from distill.__main__ import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
