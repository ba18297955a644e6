"""Soft targets taken out of the forward passes of a teacher in training.

Per chunk of the head: probabilities -> atoms of the codec and the entropy; per micro-batch: one `put` into the writer
of its corpus. Probabilities are normalized over all of V at temperature 1.

The targets of a step wait on the host until the next step begins. Whether the step was finite on all ranks is on the
host by then, at no wait beyond that for the targets themselves. If it was not, neither these targets nor any later ones
are published.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.cache import Atoms, CacheWriter, Codec, Picks
from distill.cache.pending import Pending
from distill.data.join import Batch
from distill.engine.watch import Watch
from distill.model.transfer import sent
from losses.mixed import Select


class MicroTargets(NamedTuple):
    """What a forward pass over a micro-batch gives for the cache."""

    batch: Batch
    hard_T: Tensor
    """Cross entropy against the labels, nats."""
    selections: list[Picks]
    """Of the head's chunks, in order."""


class _StepTargets(NamedTuple):
    """Targets of one micro-batch, on the CPU."""

    batch: Batch
    atoms: Atoms
    hard_T: Tensor
    entropy_T: Tensor
    valid_T: Tensor
    step: int


class Capture:
    """Selects targets and hands them to the writers; takes `seconds` of the training thread for `puts` micro-batches.

    Args:
        writers: one per corpus, in the stream's order of corpora.
        seed: of the codec's counter-based randomness.
        teacher: identity that goes into every shard.
        tokens_seen: by the teacher, as a function of its step.
        watch: of the teacher in training; None: the teacher is frozen, and its targets do not wait.

    Attributes:
        broken: the first sample on which the teacher's loss or entropy was not finite; None: there was none. No targets
            that are selected after it are published.
    """

    def __init__(
        self,
        codec: Codec,
        writers: list[CacheWriter],
        seed: int,
        teacher: str,
        tokens_seen: Callable[[int], int],
        watch: Watch | None = None,
    ):
        self.codec, self.writers, self.seed = codec, writers, seed
        self.teacher, self.tokens_seen = teacher, tokens_seen
        self.seconds = 0.0
        self.puts = 0
        self.watch = watch
        self.broken: int | None = None
        self._held: list[_StepTargets] = []

    def selector(self, batch: Batch) -> Select:
        """Selects the targets of one micro-batch, chunk by chunk of its pass over the head."""
        batch_size, length = batch.ids_BS.shape
        device = batch.ids_BS.device
        sample_ids_T = sent(torch.as_tensor(batch.sample_ids_B), device).repeat_interleave(length)
        positions_T = torch.arange(length, device=device).repeat(batch_size)

        @torch.no_grad()
        def select(rows: slice, logits_tV: Tensor, lse_t: Tensor) -> Picks:
            began = time.perf_counter()
            where = {"sample_ids_T": sample_ids_T[rows], "positions_T": positions_T[rows]}
            picks = self.codec.pick(logits_tV, lse_t, seed=self.seed, **where)
            self.seconds += time.perf_counter() - began
            return picks

        return select

    def put(self, targets: MicroTargets, step: int) -> None:
        """Hands a micro-batch's targets to the writers; waits or skips when their queue is full."""
        began = time.perf_counter()
        batch = targets.batch
        picks, hard_T, valid_T = _on_host(Picks.cat(targets.selections), targets.hard_T, batch.valid_BS.flatten())
        held = _StepTargets(batch, self.codec.atoms(picks), hard_T, picks.entropy_T, valid_T, step)
        finite_T = held.hard_T.isfinite() & held.entropy_T.isfinite()
        if self._held and self._held[0].step != step:
            self._release()
        if self.broken is None and not finite_T.all():
            self.broken = int(batch.sample_ids_B[int(finite_T.int().argmin()) // batch.ids_BS.shape[1]])
        if self.broken is None:
            self._held.append(held)
        if self.watch is None:
            self._release()
        self.seconds += time.perf_counter() - began
        self.puts += 1

    def _release(self) -> None:
        """Hands the waiting targets to the writers, or drops them where their step was not finite."""
        held, self._held = self._held, []
        if self.watch is not None and not self.watch.good:
            return
        for targets in held:
            batch = targets.batch
            for corpus, writer in enumerate(self.writers):
                rows_B = torch.as_tensor(batch.corpus_B == corpus)
                if not rows_B.any():
                    continue
                rows_T = rows_B.repeat_interleave(batch.ids_BS.shape[1])
                writer.put(
                    batch.sample_ids_B[rows_B.numpy()],
                    batch.digests_B[rows_B.numpy()],
                    targets.atoms if rows_B.all() else targets.atoms.select(rows_T),
                    -targets.hard_T[rows_T],
                    targets.entropy_T[rows_T],
                    targets.valid_T[rows_T],
                    step=targets.step,
                    tokens_seen=self.tokens_seen(targets.step),
                    teacher=self.teacher,
                )

    def metrics(self) -> dict[str, float]:
        stats = [writer.stats for writer in self.writers]
        metrics = {"skipped_samples": float(sum(s.skipped for s in stats))}
        if passed := sum(s.passed for s in stats):
            metrics["passed_samples"] = float(passed)
        if self.puts:
            metrics["capture_seconds"] = self.seconds / self.puts
        tokens = sum(s.tokens for s in stats)
        if tokens:
            metrics["bytes_per_token"] = sum(s.bytes for s in stats) / tokens
        return metrics

    def flush(self) -> None:
        """Publishes everything; at the end of a step."""
        self._release()
        for writer in self.writers:
            writer.flush()

    def hand_over(self) -> dict[str, Tensor]:
        """Takes away what is captured and not published, by name, at the end of a step; for `take_back` in a later
        process."""
        self._release()
        return {
            f"{corpus}/{index:08d}/{name}": tensor
            for corpus, writer in enumerate(self.writers)
            for index, batch in enumerate(writer.hand_over())
            for name, tensor in batch.tensors().items()
        }

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        """Gives the writers what `hand_over` took away; before the first `put`."""
        batches: list[dict[str, dict[str, Tensor]]] = [{} for _ in self.writers]
        for key, tensor in tensors.items():
            corpus, index, name = key.split("/")
            batches[int(corpus)].setdefault(index, {})[name] = tensor
        for writer, pending in zip(self.writers, batches, strict=True):
            writer.take_back([Pending.of(pending[index]) for index in sorted(pending)])

    def finish(self) -> None:
        """Publishes everything and ends the writers' streams; at the end of a step."""
        self._release()
        for writer in self.writers:
            writer.finish()

    def close(self) -> None:
        """Closes the writers; after `flush`."""
        for writer in self.writers:
            writer.close()


def _on_host(picks: Picks, hard_T: Tensor, valid_T: Tensor) -> tuple[Picks, Tensor, Tensor]:
    return picks.cpu(), hard_T.cpu(), valid_T.cpu()
