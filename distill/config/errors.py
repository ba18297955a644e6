"""Errors that a user can cause and remedy, by kind.

Each message names the key or file, the value, and what is allowed. `__main__` prints it without a traceback and exits
with the error's code; invariants of the program itself use `assert`.
"""


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
