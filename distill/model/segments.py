"""Documents and chunks as runs of tokens: attention over runs needs no mask.

A document border and a chunk border mean the same to attention, so a layer sees a list of runs, each plainly causal.
Runs of like length share one attention call. A run may be padded at its end up to its call's length: causality hides
the padding from every real query, and the padded queries' results are dropped.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CALL, ROW = 4096, 64
"""What one more attention call, and one padded row to project, cost in query-key pairs (measured on CPU, small)."""


class Plan(NamedTuple):
    """How one kind of layer lays its tokens out: P >= T rows, in blocks of equally long runs."""

    position_P: Tensor
    """int64, position within the run."""
    gather_P: Tensor | None
    """int64, token of each row; None: the tokens as they stand."""
    scatter_T: Tensor | None
    """int64, row of each token."""
    blocks: tuple[tuple[int, int], ...]
    """(runs, length) of each attention call, in row order."""
    longest: int

    def to(self, device: torch.device) -> Plan:
        if self.gather_P is None or self.scatter_T is None:
            return self._replace(position_P=self.position_P.to(device))
        moved = self.position_P.to(device), self.gather_P.to(device), self.scatter_T.to(device)
        return Plan(*moved, self.blocks, self.longest)


class Segments(NamedTuple):
    """The two plans of a batch; made once, shared by all layers."""

    full: Plan
    """Runs are documents."""
    chunked: Plan
    """Runs are chunks of documents, counted from each document's start."""

    @staticmethod
    def build(documents_BS: Tensor, chunk_size: int | None) -> Segments:
        """Plans for packed rows.

        Args:
            documents_BS: ordinal of each token's document in its row, on the CPU, non-decreasing along the row.
            chunk_size: positions per chunk; None: chunks are documents.
        """
        assert documents_BS.device.type == "cpu", "segments are laid out on the CPU"
        step_BS = documents_BS.diff(dim=1)
        assert (step_BS >= 0).all(), "document ordinals must not decrease along a row"
        first_BS = torch.ones(documents_BS.shape, dtype=torch.bool, device="cpu")
        first_BS[:, 1:] = step_BS != 0
        start_N = first_BS.flatten().nonzero().squeeze(1)
        tokens = documents_BS.numel()
        full = _plan(start_N, tokens)
        if chunk_size is None or full.longest <= chunk_size:
            return Segments(full, full)
        position_T = _positions(start_N, tokens)
        return Segments(full, _plan((position_T % chunk_size == 0).nonzero().squeeze(1), tokens))

    @staticmethod
    @lru_cache(maxsize=64)
    def whole_rows(rows: int, length: int, chunk_size: int | None) -> Segments:
        """Plans for rows of one document each."""
        with torch.inference_mode(False):  # kept, and may be saved for a later backward pass
            return Segments.build(torch.zeros(rows, length, dtype=torch.int64, device="cpu"), chunk_size)

    def to(self, device: torch.device) -> Segments:
        """The same plans with their tensors on `device`."""
        full = self.full.to(device)
        return Segments(full, full if self.chunked is self.full else self.chunked.to(device))


def _positions(start_N: Tensor, tokens: int) -> Tensor:
    length_N = torch.diff(start_N, append=start_N.new_tensor([tokens]))
    return torch.arange(tokens, device="cpu") - start_N.repeat_interleave(length_N)


def _plan(start_N: Tensor, tokens: int) -> Plan:
    """The plan of runs that begin at `start_N` (ascending, the first at 0) and fill all tokens."""
    length_N = torch.diff(start_N, append=start_N.new_tensor([tokens]))
    length_N, order_N = length_N.sort(descending=True, stable=True)
    blocks = _blocks(length_N)
    if len(blocks) == 1 and blocks[0][1] * len(start_N) == tokens:  # one length, no padding: nothing moves
        return Plan(_positions(start_N, tokens), None, None, blocks, blocks[0][1])
    start_N = start_N[order_N]
    position: list[Tensor] = []
    gather: list[Tensor] = []
    scatter_T = torch.empty(tokens, dtype=torch.int64, device="cpu")
    run = rows = 0
    for count, length in blocks:
        start_n1, length_n1 = start_N[run : run + count, None], length_N[run : run + count, None]
        offset_L = torch.arange(length, device="cpu")
        position_nL = torch.minimum(offset_L, length_n1 - 1)  # padding repeats the run's last token
        gather_nL = start_n1 + position_nL
        real_nL = offset_L < length_n1
        scatter_T[gather_nL[real_nL]] = real_nL.flatten().nonzero().squeeze(1) + rows
        position.append(position_nL.flatten())
        gather.append(gather_nL.flatten())
        run, rows = run + count, rows + count * length
    return Plan(torch.cat(position), torch.cat(gather), scatter_T, blocks, blocks[0][1])


def _blocks(length_N: Tensor) -> tuple[tuple[int, int], ...]:
    """(runs, padded length) per attention call; a length joins the next longer one where padding costs less."""
    blocks: list[tuple[int, int]] = []
    wasted = 0
    for length, count in zip(*(t.tolist() for t in torch.unique_consecutive(length_N, return_counts=True))):
        if blocks:
            runs, longest = blocks[-1]
            wasted += count * (longest - length) * (longest + length + ROW)
            if wasted <= CALL:
                blocks[-1] = (runs + count, longest)
                continue
        blocks.append((count, length))
        wasted = 0
    return tuple(blocks)
