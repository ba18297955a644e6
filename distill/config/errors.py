"""The kinds of error that people, not programmers, can cause or mend.

Each message names the key or file, the value found and what is allowed. `__main__` prints them
without a traceback and exits with their code; our own invariants use `assert` instead.
"""


class UserError(Exception):
    """Base of everything that a person can mend."""

    exit_code = 2
    """Of the process that ends with it."""


class ConfigError(UserError):
    """A configuration that cannot run; holds every problem found, not only the first."""

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
    """A loss, gradient or weight that is not finite: going on would only spoil what is good."""

    exit_code = 3
