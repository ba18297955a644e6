"""Takes soft targets off the teacher's hands and publishes them, shard by shard, from a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.format import SHARDS, TEMPORARY, check_writer, writer_lock
from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerWriter, Origin
from distill.cache.open_store import open_store
from distill.cache.pending import Pending
from distill.cache.publish import create, publish_shard
from distill.cache.ranks import invert, load_ranks
from distill.cache.shard import Array, Columns
from distill.cache.targets import Atoms
from distill.cache.view import Newest, newest_since
from distill.config.errors import CacheError
from distill.config.schema import OnFull


class WriterStats(NamedTuple):
    """What one writer has done since it was opened."""

    samples: int
    """Published."""
    tokens: int
    """Published that have a target."""
    bytes: int
    """Published."""
    skipped: int
    """Samples left out because the queue was full."""


class CacheWriter:
    """One writer of a cache; usable as a context manager, which publishes nothing more after an exception."""

    def __init__(
        self,
        folder: str | Path,
        header: CacheHeader,
        *,
        writer: str,
        counts_V: Array | None = None,
        shard_samples: int = 256,
        queue: int = 64,
        on_full: OnFull = OnFull.block,
        source: str = "capture",
        seen_before: bool = False,
        flops_per_token: float = 0.0,
    ):
        """Opens the cache, or creates it, and resumes this writer's ledger.

        folder: a path, or a URL of a file system that fsspec knows.
        writer: name of the ledger and prefix of the shards; one live process only.
        counts_V: corpus frequency of every id, for the rank table; None takes the table that is there, or none.
        shard_samples: publish as soon as so many samples wait. queue: micro-batches that may wait for the thread.
        source: capture, backfill or import. seen_before: the teacher has trained on these samples (backfill).
        flops_per_token: of a forward pass of the teacher; 0: not known.

        Raises:
            CacheError: another cache is there, another process has this name, a damaged ledger, or no permission.
        """
        check_writer(writer)
        self.folder, self.writer = folder, writer
        self._store = open_store(folder)
        self.header = create(self._store, header, counts_V)
        self._identity = self.header.identity
        self._codec = make_codec(self.header.codec, self.header.vocab_size)
        self._shard_samples, self._queue, self._on_full = shard_samples, queue, OnFull(on_full)
        self._source, self._seen_before, self._flops_per_token = source, seen_before, flops_per_token
        self._rank_of_id = invert(load_ranks(self._store, self.header))
        self._done: Newest | None = None
        with contextlib.ExitStack() as stack:
            is_alone = stack.enter_context(self._store.lock(writer_lock(writer), f"the writer's name {writer!r}"))
            self._ledger = LedgerWriter(self._store, writer, self._identity)
            if is_alone:
                self._remove_leftovers()
            self._resources = stack.pop_all()

        # All below is shared with the thread, under the condition's lock.
        self._change = threading.Condition()
        self._waiting: deque[Pending] = deque()
        self._request: str | None = None
        """What the caller waits for once nothing waits: flush, finish, stop, hand over; or at once: abort."""
        self._handed: list[Pending] = []
        self._error: BaseException | None = None
        self._error_raised = self._closed = False
        self._stats = WriterStats(0, 0, 0, 0)
        self._thread = threading.Thread(target=self._run, name=f"cache-writer-{writer}", daemon=True)
        self._thread.start()

    def _remove_leftovers(self) -> None:
        """What a kill left: temporary files, and the one shard whose row was never written.

        Raises:
            CacheError: there are shards beyond it, so the ledger has lost rows.
        """
        known = {row.shard for row in self._ledger.rows}
        left, next_seq = [], self._ledger.seq
        for name in self._store.names(SHARDS):
            number, _, rest = name.removeprefix(f"{self.writer}-").partition("-")
            if not (name.startswith(f"{self.writer}-") and number.isdigit() and "-" not in rest):
                continue
            if name.endswith(TEMPORARY):
                left.append(name)
            elif name not in known:
                left.append(name)
                if int(number) > next_seq:
                    path = self._store.path(f"{SHARDS}/{name}")
                    raise CacheError(
                        f"{path}: shard {int(number)} is there, but ledger {self.writer} has {next_seq} rows: it was "
                        f"cut; get it back with codistill-cache repair {self._store.root}"
                    )
        for name in left:
            self._store.remove(f"{SHARDS}/{name}")

    @property
    def stats(self) -> WriterStats:
        with self._change:
            return self._stats

    def put(
        self,
        sample_ids_B: Array,
        digests_B: Array,
        atoms: Atoms,
        label_logprob_T: Tensor | Array,
        entropy_T: Tensor | Array,
        valid_T: Tensor | Array,
        *,
        step: int,
        tokens_seen: int,
        teacher: str,
    ) -> bool:
        """Hands over one micro-batch of T = B * S tokens; False if it was skipped because the queue is full.

        digests_B: uint64 of each sample's tokens. label_logprob_T, entropy_T: float nats of the teacher. valid_T:
        bool, tokens that have a label; others are stored as having no target. step: the teacher's, before its update.

        Raises:
            CacheError: the thread has failed (names file and reason), or these targets cannot be stored.
        """
        batch = Pending(
            np.array(sample_ids_B, np.int64),
            np.array(digests_B, np.uint64),
            atoms.cpu(),
            _own(label_logprob_T, np.float32),
            _own(entropy_T, np.float32),
            _own(valid_T, np.bool_),
            step,
            tokens_seen,
            teacher,
        )
        self._validate(batch)
        batch = self._undone(batch)
        if not len(batch.sample_ids_B):
            return True
        with self._change:
            assert not self._closed, "put after close"
            if self._on_full is OnFull.block:
                self._change.wait_for(lambda: self._error or len(self._waiting) < self._queue)
            self._raise_error()
            if len(self._waiting) >= self._queue:
                self._stats = self._stats._replace(skipped=self._stats.skipped + len(batch.sample_ids_B))
                return False
            self._waiting.append(batch)
            self._change.notify_all()
            return True

    @torch.no_grad()
    def put_logits(
        self,
        sample_ids_B: Array,
        digests_B: Array,
        logits_TV: Tensor,
        labels_T: Tensor,
        valid_T: Tensor,
        *,
        step: int,
        tokens_seen: int,
        teacher: str,
    ) -> bool:
        """`put` of what the codec makes of a teacher's logits, taken at temperature 1 on the device that they are on.

        logits_TV: any float type, row t predicts labels_T[t]; T = B * S tokens, V = the header's vocab_size. labels_T:
        int64, any id of the vocabulary where not valid. valid_T: bool.
        """
        vocab, tokens = self.header.vocab_size, len(sample_ids_B) * self.header.sample_tokens
        assert logits_TV.shape == (tokens, vocab), f"logits are {tuple(logits_TV.shape)}, expected {(tokens, vocab)}"
        device = logits_TV.device
        lse_T = logits_TV.float().logsumexp(-1)
        found = self._codec.select(
            logits_TV,
            lse_T,
            seed=self.header.seed,
            sample_ids_T=torch.as_tensor(sample_ids_B, device=device).repeat_interleave(self.header.sample_tokens),
            positions_T=torch.arange(self.header.sample_tokens, device=device).repeat(len(sample_ids_B)),
        )
        label_logprob_T = logits_TV.gather(-1, labels_T.to(device)[:, None])[:, 0].float() - lse_T
        return self.put(
            sample_ids_B,
            digests_B,
            found.atoms,
            label_logprob_T,
            found.entropy_T,
            valid_T,
            step=step,
            tokens_seen=tokens_seen,
            teacher=teacher,
        )

    def flush(self) -> None:
        """Publishes all that was accepted, in a short shard if need be, and returns when it is on disk."""
        self._ask("flush")

    def finish(self) -> None:
        """`flush`, and a closing row: this writer's stream is complete."""
        self._ask("finish")

    def hand_over(self) -> list[Pending]:
        """Takes away what was accepted and is not published, for `take_back` of a later writer of this name."""
        self._ask("hand over")
        handed, self._handed = self._handed, []
        return handed

    def take_back(self, batches: list[Pending]) -> None:
        """Goes on from where a writer has handed over; before the first `put`."""
        left = [batch for batch in map(self._undone, batches) if len(batch.sample_ids_B)]
        with self._change:
            self._waiting.extend(left)
            self._change.notify_all()

    def close(self) -> None:
        """`flush`, stop the thread, give up the writer's name. Raises what the thread met, unless that was raised."""
        if self._closed:
            return
        try:
            if not self._error_raised:
                self._ask("stop")
        finally:
            self._release()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            with self._change:
                self._waiting.clear()
                self._request = "abort"
                self._change.notify_all()
            self._release()

    def _validate(self, batch: Pending) -> None:
        width, ids = self.header.sample_tokens, batch.sample_ids_B
        tokens = len(ids) * width
        lengths = [len(batch.digests_B) * width, len(batch.label_logprob_T), len(batch.entropy_T), len(batch.valid_T)]
        lengths.append(len(batch.atoms.counts_T))
        assert lengths == [tokens] * 5, f"{len(ids)} samples of {width} tokens, but lengths are {lengths}"
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.header.samples:
            raise CacheError(f"cache {self.folder}: sample ids must lie in 0 to {self.header.samples - 1}")
        broken_T = batch.valid_T & ~(np.isfinite(batch.label_logprob_T) & np.isfinite(batch.entropy_T))
        if broken_T.any():
            sample = ids[np.flatnonzero(broken_T)[0] // width]
            raise CacheError(f"cache {self.folder}: the teacher's log-probabilities of sample {sample} are not finite")

    def _undone(self, batch: Pending) -> Pending:
        """Without the samples whose targets of this step, or of a later one, had been published before this writer's
        first `put`: a run that goes on from a checkpoint does some steps again."""
        if self._done is None:
            self._done = newest_since(self._store, self.header, batch.step)
        new_B = self._done.steps(batch.sample_ids_B) < batch.step
        if new_B.all():
            return batch
        new_T = np.repeat(new_B, self.header.sample_tokens)
        return batch._replace(
            sample_ids_B=batch.sample_ids_B[new_B],
            digests_B=batch.digests_B[new_B],
            atoms=batch.atoms.select(torch.from_numpy(new_T)),
            label_logprob_T=batch.label_logprob_T[new_T],
            entropy_T=batch.entropy_T[new_T],
            valid_T=batch.valid_T[new_T],
        )

    def _ask(self, request: str) -> None:
        """Hands a request to the thread and waits until it is done, or the thread has failed."""
        with self._change:
            assert not self._closed, f"{request} after close"
            self._raise_error()
            self._request = request
            self._change.notify_all()
            self._change.wait_for(lambda: self._error or self._request is None)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error:
            self._error_raised = True
            raise self._error

    def _release(self) -> None:
        self._thread.join()
        self._closed = True
        self._resources.close()

    def _run(self) -> None:
        """The thread: alone with the ledger, and the only one who makes shards."""
        torch.set_num_threads(1)
        pending: list[Pending] = []
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._waiting or self._request)
                    batch = self._waiting.popleft() if self._waiting else None
                    request = None if batch else self._request
                    self._change.notify_all()
                if batch:
                    # A shard has one teacher.
                    if pending and pending[0].teacher != batch.teacher:
                        self._publish(pending)
                        pending = []
                    pending.append(batch)
                    if sum(len(b.sample_ids_B) for b in pending) >= self._shard_samples:
                        self._publish(pending)
                        pending = []
                    continue
                if request == "hand over":
                    self._handed, pending = pending, []
                if pending and request != "abort":
                    self._publish(pending)
                    pending = []
                if request == "finish":
                    self._ledger.finish()
                with self._change:
                    self._request = None
                    self._change.notify_all()
                if request in ("stop", "abort"):
                    return
        except BaseException as error:
            with self._change:
                self._error = error
                self._waiting.clear()
                self._change.notify_all()

    def _publish(self, batches: list[Pending]) -> None:
        sample_ids, digests = (np.concatenate([b[i] for b in batches]) for i in (0, 1))
        label_logprob, entropy, valid = (np.concatenate([b[i] for b in batches]) for i in (3, 4, 5))
        atoms = Atoms.cat([b.atoms for b in batches])
        if len(atoms.ids_N) and not 0 <= int(atoms.ids_N.min()) <= (most := int(atoms.ids_N.max())) < len(
            self._rank_of_id
        ):
            raise CacheError(f"cache {self.folder}: id {most} in a vocabulary of {self.header.vocab_size}")
        width = self.header.sample_tokens
        encoded = record.encode(atoms, label_logprob, entropy, valid, width, self._rank_of_id, self._codec)
        steps = np.repeat([b.step for b in batches], [len(b.sample_ids_B) for b in batches])
        tokens = int(valid.sum())
        origin = Origin(
            teacher=batches[0].teacher,
            source=self._source,
            first_step=int(steps.min()),
            last_step=int(steps.max()),
            samples=len(sample_ids),
            tokens=tokens,
            tokens_seen=batches[-1].tokens_seen,
            loss=-float(label_logprob[valid].mean(dtype=np.float64)) if tokens else None,
            seen_before=self._seen_before,
            flops_per_token=self._flops_per_token,
        )
        columns = Columns(sample_ids, digests, steps, encoded.atoms, np.zeros(len(steps), np.int64))
        row = publish_shard(self._store, self._ledger, self._source, columns, encoded.records, encoded.ends, (origin,))
        with self._change:
            s = self._stats
            self._stats = s._replace(
                samples=s.samples + row.samples, tokens=s.tokens + tokens, bytes=s.bytes + row.bytes
            )


def _own(values: Tensor | Array, dtype: Any) -> Array:
    """A copy that the caller cannot change any more."""
    if isinstance(values, Tensor):
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()  # numpy has no bfloat16
    return np.array(values, dtype)
