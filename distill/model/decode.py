"""Cached decoding: a prompt goes through the model once, then every new token costs one token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.config.errors import ConfigError, DataError
from distill.config.model import rope_layers
from distill.config.schema import ModelConfig
from distill.model.attention import AttentionPlan, Plans
from distill.model.images import Images
from distill.model.kv import KV, Slots
from distill.model.segments import Block, SegmentPlan, Segments
from distill.model.transfer import sent
from distill.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    images: Images | None = None,
) -> list[Tensor]:
    """Continues prompts of any lengths together; without gradient.

    Args:
        prompts: 1-D ids, one tensor each.
        temperature: of the sampling; 0 takes the likeliest id.
        top_p: sample among the fewest likeliest ids that have this much probability together.
        eos_ids: ids that end a row; None: the configuration's.
        generator: of the draws, on the model's device; None: torch's global one.
        images: of all prompts; their `patch_BS` has one row, the prompts one after another.

    Returns:
        The new ids of each prompt, 1-D, at most `max_new_tokens`; the id that ended a row is its last.

    Raises:
        ConfigError: an argument out of its range.
        DataError: an empty prompt, one that would grow beyond `max_positions`, or images that do not fit.
    """
    _check(model.config, prompts, max_new_tokens, temperature, top_p)
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    logits_BV = decoder.prefill(prompts, images)
    ends = model.config.eos_ids if eos_ids is None else eos_ids
    eos_N = sent(torch.tensor(list(ends), dtype=torch.int64), logits_BV.device)
    new: list[Tensor] = []
    ended: list[Tensor] = []
    while True:
        ids_B = sample(logits_BV, temperature, top_p, generator)
        new.append(ids_B)
        ended.append(torch.isin(ids_B, eos_N) | (ended[-1] if ended else False))
        if len(new) == max_new_tokens or (len(eos_N) and _all(ended[-1])):
            break
        logits_BV = decoder.extend(ids_B[:, None])[:, -1]
    return _cut(torch.stack(new, 1), torch.stack(ended))


def _all(ended_B: Tensor) -> bool:
    return bool(ended_B.all())


def _cut(ids_Bn: Tensor, ended_nB: Tensor) -> list[Tensor]:
    """The ids of each row up to its end; a row that has ended goes on beside the others."""
    kept_B = (~ended_nB).sum(0) + 1
    return [row_n[:kept] for row_n, kept in zip(ids_Bn, kept_B.tolist())]


class Decoder:
    """B rows that grow token by token; each has its own length, and none is padded.

    Args:
        rows: B.
        positions: tokens of the longest row at the end, prompt included.

    Attributes:
        caches: keys and values of each layer, in layer order.
        lengths: tokens of each row so far.
    """

    def __init__(self, model: Transformer, rows: int, positions: int):
        config, weight = model.config, model.embed.weight
        self.model, self.positions, self.lengths = model, positions, [0] * rows
        self.device = weight.device
        self.chunk = min(config.chunk_size or positions, positions)
        self.caches = [
            KV(rows, config.kv_heads, self.chunk if rope else positions, config.head_dim, weight)
            for rope in rope_layers(config)
        ]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], images: Images | None = None) -> Tensor:
        """Takes one prompt (1-D ids, not empty) for each row; logits [B, V] of what follows. Once, and first.

        Args:
            images: of all prompts; their `patch_BS` has one row, the prompts one after another.
        """
        assert not any(self.lengths) and len(prompts) == len(self.lengths), "one prompt for each empty row"
        self.lengths = [len(prompt) for prompt in prompts]
        assert min(self.lengths) > 0 and max(self.lengths) <= self.positions, (self.lengths, self.positions)
        length_B = torch.tensor(self.lengths)
        row_T = torch.arange(len(prompts)).repeat_interleave(length_B)
        position_T = torch.cat([torch.arange(length) for length in self.lengths])
        # The prompts are packed documents of one row: no padding, and attention as in training.
        rope, nope = self.model.plans(Segments.build(row_T[None], self.model.config.chunk_size).to(self.device))
        tail_N = (position_T >= (length_B // self.chunk * self.chunk)[row_T]).nonzero().squeeze(1)
        rope = rope._replace(slots=self._kept(tail_N, row_T, position_T % self.chunk, rope))
        nope = nope._replace(slots=self._kept(torch.arange(len(row_T)), row_T, position_T, nope))
        last_B = sent(length_B.cumsum(0) - 1, self.device)
        ids_1T = torch.cat([sent(prompt, self.device) for prompt in prompts])[None]
        hidden_TD = self.model.embedded(ids_1T, images)
        logits_BV, _ = self.model.through_layers(
            hidden_TD, Plans(rope, nope), lambda h_TD, w_VD: self.model.linear(h_TD[last_B], w_VD), self.caches
        )
        return logits_BV

    def _kept(self, token_N: Tensor, row_T: Tensor, slot_T: Tensor, plan: AttentionPlan) -> Slots:
        """Slots of the tokens (indices, CPU) whose keys are kept."""
        source_N, scatter_T = sent(token_N, self.device), plan.segments.scatter_T
        if scatter_T is not None:
            source_N = scatter_T[source_N]
        return Slots(sent(row_T[token_N], self.device), sent(slot_T[token_N], self.device), source_N, None)

    @torch.no_grad()
    def extend(self, ids_Bn: Tensor) -> Tensor:
        """Takes n more tokens for every row; logits [B, n, V] of what follows each."""
        pieces = []
        while ids_Bn.shape[1]:
            # Up to where the first row would write over keys that its earlier tokens of this call still need.
            fits = min(self.chunk - length % self.chunk for length in self.lengths)
            pieces.append(self._step(ids_Bn[:, :fits]))
            ids_Bn = ids_Bn[:, fits:]
        return torch.cat(pieces, 1)

    def _step(self, ids_Bn: Tensor) -> Tensor:
        rows, new = ids_Bn.shape
        assert max(self.lengths) + new <= self.positions, (self.lengths, new, self.positions)
        offset_n = torch.arange(new, device=self.device)
        row_P = torch.arange(rows, device=self.device).repeat_interleave(new)

        def plan(starts: list[int]) -> tuple[SegmentPlan, Slots]:
            position_Bn = sent(torch.tensor(starts), self.device)[:, None] + offset_n
            longest = max(starts) + new
            visible_BnS = torch.arange(longest, device=self.device) <= position_Bn[..., None]
            slots = Slots(row_P, position_Bn.flatten(), None, visible_BnS)
            return SegmentPlan(position_Bn.flatten(), None, None, (Block(rows, new),), longest), slots

        full, everything = plan(self.lengths)
        chunked, chunk = plan([length % self.chunk for length in self.lengths])
        rope, nope = self.model.plans(Segments(full, chunked))
        plans = Plans(rope._replace(slots=chunk), nope._replace(slots=everything))
        logits_PV, _ = self.model.through_layers(self.model.embedded(ids_Bn), plans, self.model.linear, self.caches)
        self.lengths = [length + new for length in self.lengths]
        return logits_PV.unflatten(0, (rows, new))


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One id [B] for each row: the likeliest at temperature 0, else drawn from the nucleus (arXiv 1904.09751).

    The nucleus is the fewest ids whose probabilities, taken from the largest down, reach top_p.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    sorted_BV, ids_BV = (logits_BV.float() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = torch.where(before_BV < top_p, sorted_BV, 0.0)
    kept_BV[:, 0] = sorted_BV[:, 0]
    return ids_BV.gather(-1, torch.multinomial(kept_BV, 1, generator=generator)).squeeze(-1)


def _check(config: ModelConfig, prompts: Sequence[Tensor], new: int, temperature: float, top_p: float) -> None:
    problems = []
    if new < 1:
        problems.append(f"max_new_tokens is {new}; at least 1")
    if not temperature >= 0:
        problems.append(f"temperature is {temperature}; at least 0 (0: the likeliest id)")
    if not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}; allowed: above 0, to 1")
    if problems:
        raise ConfigError(*problems)
    if not len(prompts):
        raise DataError("there is no prompt; at least one is needed")
    for row, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not len(prompt):
            raise DataError(
                f"prompt {row} has shape {list(prompt.shape)}; one dimension and at least one id are needed"
            )
        if len(prompt) + new > config.max_positions:
            raise DataError(
                f"prompt {row} has {len(prompt)} tokens and {new} are to follow; the model's max_positions is "
                f"{config.max_positions}"
            )
