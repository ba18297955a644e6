"""Documents and their chunks as segments of tokens: attention over segments needs no mask.

A document border and a chunk border mean the same to attention, so a layer gets a list of segments, each plainly
causal. Segments of like length share one attention call. A segment may be padded at its end up to its call's length:
causality hides the padding from every real query, and the results of padded queries are dropped.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distill.model.transfer import sent

CALL, ROW = 4096, 64
"""What one more attention call, and one padded row to project, cost in query-key pairs (measured on CPU, small)."""


class Block(NamedTuple):
    """One attention call over segments that are, with padding, equally long."""

    segments: int
    length: int


class SegmentPlan(NamedTuple):
    """How layers of one kind arrange T tokens: P >= T rows, in blocks of equally long segments."""

    position_P: Tensor
    """int64, position within the segment."""
    gather_P: Tensor | None
    """int64, token of each row; None: the tokens in their order."""
    scatter_T: Tensor | None
    """int64, row of each token."""
    blocks: tuple[Block, ...]
    """In row order."""
    longest: int
    """Tokens of the longest segment."""

    def to(self, device: torch.device) -> SegmentPlan:
        gather_P, scatter_T = (index if index is None else sent(index, device) for index in self[1:3])
        return self._replace(position_P=sent(self.position_P, device), gather_P=gather_P, scatter_T=scatter_T)


def document_starts(documents_BS: Tensor) -> Tensor:
    """Whether each token is the first of its document in its row; bool [B, S].

    Args:
        documents_BS: ordinal of each token's document, non-decreasing along a row.
    """
    first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    first_BS[:, 1:] = documents_BS.diff(dim=1) != 0
    return first_BS


class Segments(NamedTuple):
    """The two plans of a batch; made once, shared by all layers."""

    full: SegmentPlan
    """Segments are documents."""
    chunked: SegmentPlan
    """Segments are chunks of documents, counted from each document's start."""

    @staticmethod
    def build(documents_BS: Tensor, chunk_size: int | None) -> Segments:
        """Plans for packed rows.

        Args:
            documents_BS: ordinal of each token's document in its row, on the CPU, non-decreasing along the row.
            chunk_size: positions per chunk; None: chunks are documents.
        """
        assert documents_BS.device.type == "cpu", "segments are planned on the CPU"
        assert (documents_BS.diff(dim=1) >= 0).all(), "document ordinals must not decrease along a row"
        start_N = document_starts(documents_BS).flatten().nonzero().squeeze(1)
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


def _plan(start_N: Tensor, tokens: int) -> SegmentPlan:
    """The plan of segments that begin at `start_N` (ascending, the first at 0) and cover all tokens."""
    length_N = torch.diff(start_N, append=start_N.new_tensor([tokens]))
    length_N, order_N = length_N.sort(descending=True, stable=True)
    blocks = _blocks(length_N)
    longest = blocks[0].length
    if len(blocks) == 1 and longest * len(start_N) == tokens:  # one length, no padding: nothing moves
        return SegmentPlan(_positions(start_N, tokens), None, None, blocks, longest)
    start_N = start_N[order_N]
    position: list[Tensor] = []
    gather: list[Tensor] = []
    scatter_T = torch.empty(tokens, dtype=torch.int64, device="cpu")
    first = rows = 0
    for count, length in blocks:
        start_n1, length_n1 = start_N[first : first + count, None], length_N[first : first + count, None]
        offset_L = torch.arange(length, device="cpu")
        position_nL = torch.minimum(offset_L, length_n1 - 1)  # padding repeats the segment's last token
        gather_nL = start_n1 + position_nL
        real_nL = offset_L < length_n1
        scatter_T[gather_nL[real_nL]] = real_nL.flatten().nonzero().squeeze(1) + rows
        position.append(position_nL.flatten())
        gather.append(gather_nL.flatten())
        first, rows = first + count, rows + count * length
    return SegmentPlan(torch.cat(position), torch.cat(gather), scatter_T, blocks, longest)


def _blocks(length_N: Tensor) -> tuple[Block, ...]:
    """Attention calls, longest first; a length joins the next longer one where padding costs less than a call."""
    blocks: list[Block] = []
    wasted = 0
    for length, count in zip(*(t.tolist() for t in torch.unique_consecutive(length_N, return_counts=True))):
        if blocks:
            segments, longest = blocks[-1]
            wasted += count * (longest - length) * (longest + length + ROW)
            if wasted <= CALL:
                blocks[-1] = Block(segments + count, longest)
                continue
        blocks.append(Block(count, length))
        wasted = 0
    return tuple(blocks)
