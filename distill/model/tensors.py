"""Tensors into a safetensors file; the only place that calls the library's `save_file`.

It makes files that only their owner can read, and has errors of its own for a full disk.
"""

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distill.config.files import naming, plain_mode, sync


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes `path`, which is on disk when this returns; OSError, with the path, when it cannot be written."""
    with naming(path):
        try:
            save_file(tensors, path, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        plain_mode(path)
        sync(path)
