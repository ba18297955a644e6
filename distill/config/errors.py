"""Errors that a user can cause and remedy, by kind.

Each message names the key or file, the value, and what is allowed. The command lines print it without a traceback and
exit with the error's code; invariants of the program itself use `assert`.
"""

import errno
import os
import sys

_FULL_OR_FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class UserError(Exception):
    """Base of all errors that a user can remedy."""

    exit_code = 2
    """Of the process that ends with it."""


class ConfigError(UserError):
    """A configuration that cannot run; holds every problem, not only the first."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class CacheError(UserError):
    """A cache of soft targets that is damaged, foreign, or does not fit the run."""


class DataError(UserError):
    """A corpus or tokenizer that cannot be read, or does not fit the run."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is damaged, missing, or does not fit the model."""


class DivergenceError(UserError):
    """A loss, gradient or weight that is not finite: going on would overwrite good checkpoints with worse ones."""

    exit_code = 3


def print_error(error: UserError | OSError) -> int:
    """Prints a line for each problem on standard error, and returns the exit code.

    Raises:
        OSError: the error itself, where no person can act on it: it names no file, and no disk is full or fails.
    """
    text, code = str(error), 2
    if isinstance(error, UserError):
        code = error.exit_code
    elif error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif error.errno not in _FULL_OR_FAILING:
        raise error
    if isinstance(error, DivergenceError) and int(os.environ.get("RANK", "0")) > 0:
        return code  # raised on all ranks alike, and printed by the main one
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code
