"""Soft targets taken out of the forward passes of a teacher in training.

Per chunk of the head: probabilities -> atoms of the codec and the entropy; per micro-batch: one
`put` into the writer of its corpus. Probabilities are normalised over all of V at temperature 1.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from distill.cache import Atoms, CacheWriter, Codec
from distill.cache.pending import Pending
from distill.data.join import Batch
from losses.mixed import Tap


class Capture:
    """Selects and hands on; `seconds` is what the training thread spent on it, in `puts` micro-batches.

    Args:
        writers: one per corpus, in the stream's order of corpora.
        seed: of the codec's counter-based randomness.
        teacher: identity that goes into every shard.
        tokens_per_step: of the whole optimizer step, for the shards' tokens_seen.
    """

    def __init__(self, codec: Codec, writers: list[CacheWriter], seed: int, teacher: str, tokens_per_step: int):
        self.codec, self.writers, self.seed = codec, writers, seed
        self.teacher, self.tokens_per_step = teacher, tokens_per_step
        self.seconds = 0.0
        self.puts = 0

    def begin(self, batch: Batch) -> Tap:
        """The tap for one micro-batch's pass over the head."""
        batch_size, length = batch.ids_BS.shape
        sample_ids_T = torch.as_tensor(batch.sample_ids_B).repeat_interleave(length)
        positions_T = torch.arange(length).repeat(batch_size)
        self._atoms: list[Atoms] = []
        self._entropy: list[Tensor] = []

        @torch.no_grad()
        def tap(start: int, probs_TV: Tensor, logprobs_TV: Tensor) -> None:
            began = time.perf_counter()
            rows = slice(start, start + len(probs_TV))
            device = probs_TV.device
            found = self.codec.select_probs(
                probs_TV,
                logprobs_TV,
                seed=self.seed,
                sample_ids_T=sample_ids_T[rows].to(device),
                positions_T=positions_T[rows].to(device),
            )
            self._atoms.append(found.atoms)
            self._entropy.append(found.entropy_T)
            self.seconds += time.perf_counter() - began

        return tap

    def put(self, batch: Batch, hard_T: Tensor, step: int, tokens_seen: int | None = None) -> None:
        """Hands the micro-batch's targets to the writers; waits or skips when their queue is full.

        tokens_seen: by the teacher; None: those of its steps so far.
        """
        seen = step * self.tokens_per_step if tokens_seen is None else tokens_seen
        began = time.perf_counter()
        atoms, entropy_T = Atoms.cat(self._atoms), torch.cat(self._entropy)
        length = batch.ids_BS.shape[1]
        for corpus, writer in enumerate(self.writers):
            rows_B = torch.as_tensor(batch.corpus_B == corpus)
            if not rows_B.any():
                continue
            whole = bool(rows_B.all())
            rows_T = rows_B.repeat_interleave(length).to(hard_T.device)
            writer.put(
                batch.sample_ids_B[rows_B.numpy()],
                batch.digests_B[rows_B.numpy()],
                atoms if whole else atoms.select(rows_T),
                -hard_T[rows_T],
                entropy_T[rows_T],
                batch.valid_BS.flatten()[rows_T],
                step=step,
                tokens_seen=seen,
                teacher=self.teacher,
            )
        self.seconds += time.perf_counter() - began
        self.puts += 1

    def figures(self) -> dict[str, float]:
        stats = [writer.stats for writer in self.writers]
        found = {"skipped_samples": float(sum(s.skipped for s in stats))}
        if self.puts:
            found["capture_seconds"] = self.seconds / self.puts
        tokens = sum(s.tokens for s in stats)
        if tokens:
            found["bytes_per_token"] = sum(s.bytes for s in stats) / tokens
        return found

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def hand_over(self) -> dict[str, Tensor]:
        """What is captured and not published, taken away, by name; for `take_back` in a later process."""
        return {
            f"{corpus}/{index:08d}/{name}": tensor
            for corpus, writer in enumerate(self.writers)
            for index, batch in enumerate(writer.hand_over())
            for name, tensor in batch.tensors().items()
        }

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        """Before the first `put`."""
        batches: list[dict[str, dict[str, Tensor]]] = [{} for _ in self.writers]
        for key, tensor in tensors.items():
            corpus, index, name = key.split("/")
            batches[int(corpus)].setdefault(index, {})[name] = tensor
        for writer, found in zip(self.writers, batches, strict=True):
            writer.take_back([Pending.of(found[index]) for index in sorted(found)])

    def finish(self) -> None:
        """Publishes everything and says that nothing more will come."""
        for writer in self.writers:
            writer.finish()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
