"""Reads a checkpoint by slice: any range of elements of any parameter, from the bytes that hold them and no others.

Files are mapped, so each number is copied once, from the page to its place. Only experts that are stored one by one are
put together in memory, and then one at a time.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.config.errors import CheckpointError
from distill.config.paths import home
from distill.model.finite import is_finite
from distill.model.hf.file_headers import FLOATS, FP8, Stored, contents, read_json
from distill.model.hf.parameter_names import TEXT, VISION, hf_name, is_fused, unfused
from distill.model.hf.text_config import config_from_json, is_quantized
from distill.model.transformer import Transformer

_SCALE = "_scale"
"""Suffix of a weight in FP8: the key of its scale, for the whole matrix or for each row."""
_BLOCK = 1 << 20
"""Elements of a matrix in FP8 that are scaled at a time."""


class _Matrix(NamedTuple):
    """A stored tensor, and its scale where it is in FP8."""

    stored: Stored
    scale: Stored | None


class Reader:
    """A Hugging Face folder, open for reading; a context manager, which closes its files.

    A rank that keeps a part of a parameter reads that part alone:

        with Reader(folder) as reader:
            share = reader.read("head.weight", torch.empty(share_size), start=rank * share_size)

    Args:
        vision: False takes the text model alone of a folder that has both.

    Attributes:
        config: of the whole model.
        shapes: of every parameter, by the model's own names.

    Raises:
        CheckpointError: naming every file, key and shape that does not fit. Only headers are read for it.
    """

    def __init__(self, folder: str | Path, vision: bool = True):
        self.folder = Path(home(str(folder)))
        data = read_json(self.folder / "config.json")
        self.config = config_from_json(data, str(self.folder / "config.json"), vision)
        with torch.device("meta"):
            model = Transformer(self.config)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        finder = _Finder(self.folder, is_quantized(data))
        self._sources = {name: finder.find(hf_name(name), list(shape)) for name, shape in self.shapes.items()}
        left_out = VISION if "text_config" in data and not vision else ()
        unknown = [tensor for key, tensor in finder.unread.items() if not key.startswith(left_out)]
        problems = [*finder.problems, *(f"{tensor.file}: {tensor.key} is unknown to the model" for tensor in unknown)]
        if problems:
            raise CheckpointError("\n".join(problems))
        self._block = torch.empty(0)
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def read(self, name: str, out_N: Tensor, start: int = 0) -> Tensor:
        """Fills `out_N` with the elements [start, start + N) of a parameter laid out row after row; returns it.

        Args:
            name: the model's own.
            out_N: of any floating dtype, to which values are converted; contiguous.
        """
        stop, whole = start + out_N.numel(), self.shapes[name]
        assert out_N.ndim == 1 and 0 <= start <= stop <= whole.numel(), "a range of the parameter's elements"
        if start == stop:
            return out_N
        matrix = self._sources[name][0]
        apart = len(matrix.stored.shape) != len(whole)  # an expert's share of a fused parameter
        if not apart and matrix.scale is None:
            return out_N.copy_(self._mapped(matrix.stored).view(-1)[start:stop])
        # What is made in memory is one piece: an expert, or a block of rows.
        pieces = self._experts(name, out_N, start) if apart else self._scaled(matrix, start, stop)
        for first, piece in pieces:
            begin, end = max(start, first), min(stop, first + piece.numel())
            out_N[begin - start : end - start].copy_(piece.view(-1)[begin - first : end - first])
        return out_N

    def not_finite(self, name: str) -> str:
        """File and key of the first stored tensor of a parameter that is not finite."""
        stored = [part for matrix in self._sources[name] for part in matrix if part is not None]
        # None is where a value overflows as it is scaled or converted.
        first = next((part for part in stored if not is_finite(self._mapped(part))), stored[0])
        return f"{self.folder / first.file}: {first.key}"

    def _experts(self, name: str, out_N: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
        """The experts that hold the elements, each [in, out] of the fused parameter, with its first element."""
        experts, *shape = self.shapes[name]
        size, parts = math.prod(shape), len(self._sources[name]) // experts
        expert = torch.empty(shape, dtype=out_N.dtype, device="cpu")
        for e in range(start // size, -(-(start + out_N.numel()) // size)):
            for place, matrix in zip(expert.chunk(parts, 1), self._sources[name][e * parts :]):
                columns = matrix.stored.shape[1]
                for first, block in self._scaled(matrix, 0, math.prod(matrix.stored.shape)):
                    place[:, first // columns :][:, : len(block)] = block.T
            yield e * size, expert

    def _scaled(self, matrix: _Matrix, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows that cover the elements, each with its first one; a scaled block overwrites the one before."""
        weight_RC = self._mapped(matrix.stored)
        if matrix.scale is None:
            yield 0, weight_RC
            return
        columns = weight_RC.shape[1]
        scale_R = self._mapped(matrix.scale).float().reshape(-1).expand(len(weight_RC))
        first, last = start // columns, -(-stop // columns)
        step = max(1, _BLOCK // columns)
        if self._block.numel() < step * columns:
            self._block = torch.empty(step * columns, dtype=torch.float32, device="cpu")
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            block = self._block[: (rows.stop - row) * columns].view(-1, columns)
            yield row * columns, block.copy_(weight_RC[rows]).mul_(scale_R[rows, None])

    def _mapped(self, stored: Stored) -> Tensor:
        """A tensor whose bytes are the file's: nothing is read before it is touched."""
        try:
            if stored.file not in self._files:
                self._files[stored.file] = safe_open(self.folder / stored.file, framework="pt")
            tensor: Tensor = self._files[stored.file].get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / stored.file} is damaged or no safetensors file: {error}") from None
        return tensor


class _Finder:
    """Finds the stored tensors of each parameter.

    Attributes:
        unread: tensors that belong to no parameter that was looked for so far, by key.
        problems: a sentence for each tensor that is missing or does not fit.
    """

    def __init__(self, folder: Path, quantized: bool):
        self.folder, self.quantized = folder, quantized
        tensors, lost, self.problems = contents(folder)
        self.unread: dict[str, Stored] = {}
        for tensor in tensors:
            key = tensor.key.removeprefix(TEXT)
            if key in self.unread:
                self.problems.append(f"{tensor.key} is in {self.unread[key].file} and in {tensor.file}")
            self.unread[key] = tensor
        self.lost = None if lost is None else {key.removeprefix(TEXT) for key in lost}
        self.there = self.unread.keys() | (self.lost or set())

    def find(self, key: str, shape: list[int]) -> list[_Matrix]:
        """The tensor that holds a parameter, or of a fused one those of all experts in order."""
        parts = [name for expert in range(shape[0]) for name in unfused(key, expert)] if is_fused(key) else []
        if key not in self.there and any(name in self.there for name in parts):
            experts, inputs, outputs = shape
            matrices = [self._matrix(name, [outputs * experts // len(parts), inputs]) for name in parts]
        else:
            matrices = [self._matrix(key, shape)]
        return [matrix for matrix in matrices if matrix is not None]

    def _matrix(self, key: str, shape: list[int]) -> _Matrix | None:
        tensor = self.unread.pop(key, None)
        if tensor is None:
            self._missing(key, f"{self.folder}: {key} {shape} is in no file")
            return None
        what = f"{tensor.file}: {tensor.key}"
        if tensor.shape != shape:
            self.problems.append(f"{what} has shape {tensor.shape}; the model's is {shape}")
        if tensor.dtype == FP8 and self.quantized and len(shape) == 2:
            return _Matrix(tensor, self._scale(key, tensor, what))
        if tensor.dtype not in FLOATS:
            self.problems.append(f"{what} is stored as {tensor.dtype}; allowed: {', '.join(FLOATS)}")
        return _Matrix(tensor, None)

    def _missing(self, key: str, what: str) -> None:
        # The damaged file that may have held it is a problem already.
        if self.lost is not None and key not in self.lost:
            self.problems.append(what)

    def _scale(self, key: str, tensor: Stored, what: str) -> Stored | None:
        # The scale of activations, which are not quantized here.
        self.unread.pop(key.removesuffix("weight") + "input_scale", None)
        scale = self.unread.pop(key + _SCALE, None)
        if scale is None:
            self._missing(key + _SCALE, f"{what} is stored as {FP8}; {tensor.key}{_SCALE} is in no file")
            return None
        rows = tensor.shape[0]
        if scale.shape not in ([], [1], [1, 1], [rows], [rows, 1]):
            self.problems.append(
                f"{scale.file}: {scale.key} has shape {scale.shape}; allowed: [1] or one for each row, [{rows}, 1]"
            )
        if scale.dtype not in FLOATS:
            self.problems.append(f"{scale.file}: {scale.key} is stored as {scale.dtype}; allowed: {', '.join(FLOATS)}")
        return scale
