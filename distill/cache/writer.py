"""Publishes soft targets, shard by shard, from a thread of its own, while the teacher goes on training."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.cache import cataloging, record
from distill.cache.codecs import make_codec
from distill.cache.format import check_writer, writer_lock
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.origins import SOURCES, Origin
from distill.cache.pending import Pending
from distill.cache.publish import create, publish_mark, publish_shard, remove_leftovers
from distill.cache.put_check import PutCheck
from distill.cache.ranks import invert, load_ranks
from distill.cache.shard import Array, Columns
from distill.cache.snapshot import StreamState, newest_snapshot
from distill.cache.tail import next_seq
from distill.cache.targets import Atoms
from distill.cache.view import Records, View, asked, open_view, refreshed
from distill.config.errors import CacheError
from distill.config.schema import OnFull

log = logging.getLogger(__name__)


class WriterStats(NamedTuple):
    """Counts of one writer since it was opened."""

    samples: int
    """Samples published."""
    tokens: int
    """Tokens published that have a target."""
    bytes: int
    """Bytes published."""
    skipped: int
    """Samples left out because the queue was full."""
    passed: int
    """Samples passed over, whose targets of this step or a later one had been published already."""


class _Request(NamedTuple):
    """A request of the caller's to the thread."""

    kind: str
    """flush, finish, hand over, close or stop."""
    done: threading.Event


class CacheWriter:
    """One writer of a cache; usable as a context manager, which publishes nothing more after an exception."""

    def __init__(
        self, folder: str | Path, header: CacheHeader, *, writer: str, counts_V: Any = None, shard_samples: int = 256,
        queue: int = 64, on_full: OnFull = OnFull.block, source: str = "capture", seen_before: bool = False,
        flops_per_token: float = 0.0, index_every: int = 64, first_step: int = 0, is_restart: bool = False,
    ):  # fmt: skip
        """Opens the cache, or creates it, and resumes this writer's stream.

        folder: a path, or a URL of a file system of fsspec.
        writer: name of the stream of shards; one live process only, and none of the tools'.
        counts_V: corpus frequency of every id (array, tensor or list), for the rank table; None takes the table that
        is there, or none.
        shard_samples: publish as soon as so many samples wait. queue: micro-batches that may wait for the thread.
        source: capture, backfill or import. seen_before: the teacher has trained on these samples (backfill).
        flops_per_token: of a forward pass of the teacher; 0: not known. index_every: shards after which a listing is
        made. first_step: of a capture that begins, the teacher's step. is_restart: it goes on with other writers than
        before, so what this stream had published is no sign of how far all of them are.

        Raises:
            CacheError: another cache is there, another process has this name, a damaged stream, or no permission.
        """
        check_writer(writer)
        counts = {"shard_samples": shard_samples - 1, "queue": queue, "index_every": index_every - 1}
        bad = [name for name, number in (counts | {"first_step": first_step}).items() if number < 0]
        if bad or source not in SOURCES or not 0 <= flops_per_token < math.inf:
            raise CacheError(
                f"source is {source!r}, shard_samples {shard_samples}, queue {queue}, index_every {index_every}, "
                f"first_step {first_step}, flops_per_token {flops_per_token}; allowed are {', '.join(SOURCES)}, and "
                "numbers from 1 on (queue, step and operations: from 0)"
            )
        self.folder, self.writer = folder, writer
        self._store = open_store(folder)
        self.header = create(self._store, header, counts_V)
        self._identity = self.header.identity
        self._codec = make_codec(self.header.codec, self.header.vocab_size)
        self._check = PutCheck(self.header, self._codec)
        self._shard_samples, self._on_full = shard_samples, OnFull(on_full)
        self._source, self._seen_before, self._flops_per_token = source, seen_before, flops_per_token
        self._rank_of_id = invert(load_ranks(self._store, self.header))
        self._index_every = index_every
        self._done: View | None = None
        self._done_to, self._last = -1, (-1, "")
        with contextlib.ExitStack() as stack:
            is_alone = stack.enter_context(self._store.lock(writer_lock(writer), f"the writer's name {writer!r}"))
            listed = newest_snapshot(self._store, self._identity).streams
            self._state = next_seq(self._store, self.header, writer, listed)
            self._listed = self._tried = listed.get(writer, StreamState()).count
            """Up to which number there are listings, and up to which it was tried to make one."""
            if is_alone:
                remove_leftovers(self._store, writer, self._state.count)
            if source == "capture" and (is_restart or self._state.finished or not self._state.count):
                self._mark("begin", first_step)
            self._resources = stack.pop_all()

        # A queue that is full holds the caller back; requests queue up behind the micro-batches put before them.
        self._queue: Queue[Pending | _Request] = Queue(queue)
        self._published = WriterStats(0, 0, 0, 0, 0)
        self._skipped = self._passed = 0
        self._handed: list[Pending] = []
        self._error: BaseException | None = None
        self._error_raised = self._aborted = self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"cache-writer-{writer}", daemon=True)
        self._thread.start()

    def _mark(self, kind: str, step: int) -> None:
        mark = publish_mark(self._store, self._identity, self.writer, self._state.count, kind, self._source, step)
        self._state = self._state.after(mark)

    def _index(self) -> None:
        """Makes a listing of what has been published since the last one, or names in a warning what is in the way: it
        is made of the shards, so that nothing is lost without it."""
        if self._state.count > self._listed:
            self._tried = self._state.count
            try:
                cataloging.update(self._store, self.header, [self.writer])
                self._listed = self._tried
            except CacheError as error:
                log.warning("%s; no listing is made now: codistill-cache index makes one", error)

    @property
    def stats(self) -> WriterStats:
        return self._published._replace(skipped=self._skipped, passed=self._passed)

    def put(
        self, sample_ids_B: Array, digests_B: Array, atoms: Atoms, label_logprob_T: Tensor | Array,
        entropy_T: Tensor | Array, valid_T: Tensor | Array, *, step: int, tokens_seen: int, teacher: str,
    ) -> bool:  # fmt: skip
        """Accepts one micro-batch of T = B * S tokens for the thread; False: skipped, because the queue is full.

        sample_ids_B: ids, or one id; of a sample that comes twice the last targets count. digests_B: uint64 of each
        sample's tokens. label_logprob_T, entropy_T: float nats of the teacher. valid_T: bool, tokens that have a
        label; others are stored as having no target, and what comes for them is not checked. step: the teacher's,
        before its update.

        Raises:
            CacheError: the thread has failed (names file and reason), or these are no targets (names cache, sample and
            position): codes that do not sum to the codec's draws, more atoms than the codec makes, ids or codes out of
            range, an id twice within a token, what is not finite, wrong shapes, another teacher at the same step.
        """
        batch = self._check.batch(
            sample_ids_B, digests_B, atoms, label_logprob_T, entropy_T, valid_T, step, tokens_seen, teacher
        )
        batch = self._undone(batch)
        if not len(batch.sample_ids_B):
            return True
        assert not self._closed, "put after close"
        self._raise_error()
        try:
            self._queue.put(batch, block=self._on_full is OnFull.block)
        except Full:
            self._skipped += len(batch.sample_ids_B)
            return False
        self._raise_error()
        return True

    @torch.no_grad()
    def put_logits(
        self, sample_ids_B: Array, digests_B: Array, logits_TV: Tensor, labels_T: Tensor, valid_T: Tensor, *, step: int,
        tokens_seen: int, teacher: str,
    ) -> bool:  # fmt: skip
        """`put` of atoms that the codec takes from a teacher's logits at temperature 1, on the logits' device.

        logits_TV: any float type, row t predicts labels_T[t]; T = B * S tokens, V = the header's vocab_size. labels_T:
        ids, any number (-100) where not valid. valid_T: bool. CacheError as `put`.
        """
        sample_ids_B = self._check.sample_ids(sample_ids_B)
        device, width = logits_TV.device, self.header.sample_tokens
        labels_T = self._check.labels(sample_ids_B, logits_TV, labels_T, valid_T).to(device)
        lse_T = logits_TV.float().logsumexp(-1)
        selection = self._codec.select(
            logits_TV,
            lse_T,
            seed=self.header.seed,
            sample_ids_T=torch.as_tensor(sample_ids_B, device=device).repeat_interleave(width),
            positions_T=torch.arange(width, device=device).repeat(len(sample_ids_B)),
        )
        label_logprob_T = logits_TV.gather(-1, labels_T[:, None])[:, 0].float() - lse_T
        return self.put(
            sample_ids_B, digests_B, selection.atoms, label_logprob_T, selection.entropy_T, valid_T, step=step,
            tokens_seen=tokens_seen, teacher=teacher,
        )  # fmt: skip

    def flush(self) -> None:
        """Publishes all that was accepted, in a short shard if need be, and returns when it is on disk."""
        self._ask("flush")

    def finish(self) -> None:
        """`flush`, and an end mark: this writer's stream is complete."""
        self._ask("finish")

    def hand_over(self) -> list[Pending]:
        """Takes away what was accepted and is not published, for `take_back` of a later writer of this name."""
        self._ask("hand over")
        handed, self._handed = self._handed, []
        return handed

    def take_back(self, batches: list[Pending]) -> None:
        """Accepts what a writer has handed over; called before the first `put`."""
        for batch in map(self._undone, map(self._check.check, batches)):
            if len(batch.sample_ids_B):
                self._queue.put(batch)

    def close(self) -> None:
        """`flush`, end of the thread, release of the writer's name. Raises the thread's error, if nothing else has."""
        if self._closed:
            return
        try:
            if not self._error_raised:
                self._ask("close")
        finally:
            self._stop()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._aborted = True
            self._stop()

    def _undone(self, batch: Pending) -> Pending:
        """Drops samples whose targets of this step, or of a later one, had been published before the first `put`, and
        those that come once more in the same batch.

        A run that goes on from a checkpoint does some steps again.
        """
        keep_B = self._check.last_of_each(batch)
        step, teacher = self._last
        if self._done is None or batch.step < step or batch.teacher != teacher:
            # What this writer itself has published counts, too, where its caller goes back.
            self._done = open_view(self._store, self.header) if self._done is None else refreshed(self._done)
            self._done_to = max((origin.last_step for origin in self._done.summary), default=-1)
        self._last = batch.step, batch.teacher
        if batch.step <= self._done_to:
            self._done, records = asked(self._done, lambda view: view.find(batch.sample_ids_B))
            self._check_published(batch, self._done, records)
            keep_B &= records.steps < batch.step
        self._passed += int((~keep_B).sum())
        return batch.select(keep_B, self.header.sample_tokens)

    def _check_published(self, batch: Pending, view: View, records: Records) -> None:
        """CacheError where published targets of a sample are of other tokens, or another teacher's of the same step."""
        at = f"cache {self.folder}: sample"
        for i in np.flatnonzero(records.there & (records.entries["digest"] != batch.digests_B)).tolist():
            raise CacheError(
                f"{at} {batch.sample_ids_B[i]} has digest {records.entries['digest'][i]:016x} in the cache, and "
                f"{batch.digests_B[i]:016x} here: the tokens are not the same"
            )
        for i in np.flatnonzero(records.there & (records.steps == batch.step)).tolist():
            teacher = view.names(int(records.tables[i])).origin(records.rows[i]).teacher
            if teacher != batch.teacher:
                raise CacheError(
                    f"{at} {batch.sample_ids_B[i]} has targets of step {batch.step} by teacher {teacher}, and these "
                    f"are of teacher {batch.teacher}"
                )

    def _ask(self, kind: str) -> None:
        """Waits until the thread has handled all that was put before, and this request."""
        assert not self._closed, f"{kind} after close"
        self._raise_error()
        request = _Request(kind, threading.Event())
        self._queue.put(request)
        request.done.wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error:
            self._error_raised = True
            raise self._error
        if not self._thread.is_alive():
            raise CacheError(
                f"cache {self.folder}: the writer {self.writer!r} belongs to the process that has opened it, and not "
                "to a child of its fork"
            )

    def _stop(self) -> None:
        if self._thread.is_alive():  # not so in the child of a fork
            self._queue.put(_Request("stop", threading.Event()))
            self._thread.join()
        self._closed = True
        self._resources.close()

    def _run(self) -> None:
        """The thread, which alone makes shards. After an error it drains the queue."""
        torch.set_num_threads(1)
        pending: list[Pending] = []
        while True:
            item = self._queue.get()
            try:
                if not (self._error or self._aborted):
                    pending = self._handle(item, pending)
            except BaseException as error:
                self._error = error
            if isinstance(item, _Request):
                item.done.set()
                if item.kind == "stop":
                    return

    def _handle(self, item: Pending | _Request, pending: list[Pending]) -> list[Pending]:
        """Publishes what is due of `pending` and `item`; returns what is not."""
        if isinstance(item, _Request):
            if item.kind == "hand over":
                self._handed = pending
            elif pending:
                self._publish(pending)
            if item.kind == "finish" and not self._state.finished:
                self._mark("end", self._state.step)
            if item.kind in ("finish", "close"):
                self._index()
            return []
        if pending and pending[0].teacher != item.teacher:  # a shard has one teacher
            self._publish(pending)
            pending = []
        pending.append(item)
        if sum(len(batch.sample_ids_B) for batch in pending) < self._shard_samples:
            return pending
        self._publish(pending)
        return []

    def _publish(self, batches: list[Pending]) -> None:
        def joined(name: str) -> Array:
            return np.concatenate([getattr(batch, name) for batch in batches])

        sample_ids, valid, label_logprob = joined("sample_ids_B"), joined("valid_T"), joined("label_logprob_T")
        atoms = Atoms.cat([batch.atoms for batch in batches])
        width = self.header.sample_tokens
        encoded = record.encode(atoms, label_logprob, joined("entropy_T"), valid, width, self._rank_of_id, self._codec)
        steps = np.repeat([batch.step for batch in batches], [len(batch.sample_ids_B) for batch in batches])
        tokens = int(valid.sum())
        origin = Origin(
            teacher=batches[0].teacher, source=self._source, first_step=int(steps.min()), last_step=int(steps.max()),
            samples=len(sample_ids), tokens=tokens, tokens_seen=batches[-1].tokens_seen,
            loss=-float(label_logprob[valid].mean(dtype=np.float64)) if tokens else None, seen_before=self._seen_before,
            flops_per_token=self._flops_per_token,
        )  # fmt: skip
        losses = LossSums()
        losses.add_tokens(batches[0].teacher, self._source, np.repeat(steps, width)[valid], -label_logprob[valid])
        columns = Columns(sample_ids, joined("digests_B"), steps, encoded.atoms, np.zeros(len(steps), np.int64))
        header = publish_shard(
            self._store, self._identity, self.writer, self._state.count, self._source, columns, encoded.records,
            encoded.ends, (origin,), losses,
        )  # fmt: skip
        self._state = self._state.after(header)
        done = self._published
        self._published = done._replace(
            samples=done.samples + header.samples, tokens=done.tokens + tokens, bytes=done.bytes + header.bytes
        )
        if self._state.count - self._tried >= self._index_every:
            self._index()
