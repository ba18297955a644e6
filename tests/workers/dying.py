"""The command line in a process that kills itself, as `kill -9` does, once enough has been written.

python -m tests.workers.dying PATTERN LEAST ARGUMENTS: at the first file that the process opens, renames or makes a
folder for once at least LEAST files match PATTERN, or the one file that PATTERN names has at least LEAST bytes. No
process beside it has to be quick enough.
"""

import glob
import os
import runpy
import signal
import sys


def written(pattern):
    if glob.has_magic(pattern):
        return len(glob.glob(pattern))
    return os.stat(pattern).st_size if os.path.exists(pattern) else 0


def main():
    pattern, least = sys.argv[1], int(sys.argv[2])
    looking = [False]  # glob opens folders itself

    def look(event, _):
        if event in ("open", "os.rename", "os.mkdir") and not looking[0]:
            looking[0] = True
            if written(pattern) >= least:
                os.kill(os.getpid(), signal.SIGKILL)
            looking[0] = False

    sys.argv[1:3] = []
    sys.addaudithook(look)
    runpy.run_module("distill", run_name="__main__")


if __name__ == "__main__":
    main()
