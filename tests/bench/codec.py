"""Fidelity per byte: what each codec loses on the yardstick, and what its records take on disk, every byte counted.

2,048 rows are tokens of two samples, captured, published by the writer and read back. Bytes are those of shards and
ledger, per-token statistics included; the table of ranks, once for a whole cache, is not. Errors are expected squared
distances to the true rows. Angles and norms are those of the gradient of the forward KL with respect to the logits, for
a student whose logits are off by noise of size 0.5: mean over tokens, and of the sum over all tokens (`batch_`), in
which what is unbiased averages out. Sizes of the peers are what they store at this vocabulary. SEED= and ROWS= (200 or
more; fewer than 2,048 are sampled several times) measure it anew.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.cache import Atoms, CacheHeader, CacheReader, CacheWriter, make_codec
from distill.config.schema import CodecConfig
from distill.tracking import charts
from tests.bench._chart import draw
from tests.bench._yardstick import VOCAB, rows

ROWS, SAMPLE = 2048, 1024
GOAL_BYTES = 31.0
"""What 50 draws take in records of three bytes: arXiv 2503.16870, at this vocabulary."""
SWEEPS = {
    "systematic": ("draws", (12, 17, 20, 32, 128, 200)),
    "threshold": ("tau", (0.12, 0.07, 0.05, 0.01)),
    "multinomial": ("draws", (20, 50, 200)),
    "topk": ("k", (4, 12, 50)),
}
SHOWN = {"systematic": 20, "threshold": 0.05, "multinomial": 50, "topk": 12}
PEERS = {
    "Megatron-LM, k = 16": (16, 80.0),
    "DistillKit budget, k = 50": (50, 127.0),
    "DistillKit, k = 128": (128, 344.0),
    "MaxText, k = 128": (128, 896.0),
}
"""The k largest that each keeps, and its bytes a token."""


class Found(NamedTuple):
    """Means over all rows."""

    bytes: float
    mse: float
    angle_deg: float
    norm_ratio: float
    batch_angle_deg: float
    atoms: float


def run() -> dict[str, float]:
    seed, count = int(os.environ.get("SEED", 0)), int(os.environ.get("ROWS", ROWS))
    settings = [(name, value) for name, (_, values) in SWEEPS.items() for value in values]
    measured = measure(settings, seed, count)
    default = [found for (name, _), found in measured.items() if name is CodecConfig().name]
    peers = {"RS-KD, 50 draws": (3 * measured["multinomial", 50].atoms, measured["multinomial", 50].mse)}
    peers |= zip(PEERS, zip((size for _, size in PEERS.values()), topk_errors(seed, min(count, 256)), strict=True))
    goal = measured["multinomial", 50].mse
    figures = {
        "bytes_at_rs50_error": between([f.mse for f in default], [f.bytes for f in default], goal),
        "error_at_31_bytes": between([f.bytes for f in default], [f.mse for f in default], GOAL_BYTES) / goal,
        "rs50_error": goal,
    }
    for name, value in SHOWN.items():
        found = measured[name, value]
        parts = ("bytes", "mse", "angle_deg", "norm_ratio", "batch_angle_deg", "atoms")
        figures |= {f"{name}_{part}": getattr(found, part) for part in parts}
    for label, (size, error) in peers.items():
        figures |= {f"{label}: bytes": size, f"{label}: mse": error}
    draw_charts(measured, peers)
    return figures


def measure(settings: list[tuple[str, float]], seed: int, count: int) -> dict[tuple[str, float], Found]:
    """Every setting on the same rows; few of them are sampled several times."""
    passes = -(-ROWS // count)
    meters = {key: _Meter(*key, seed, count * passes, SAMPLE if count % SAMPLE == 0 else count) for key in settings}
    g = torch.Generator().manual_seed(seed + 1)
    first = 0
    for p_TV in (block_TV for _ in range(passes) for block_TV in rows(count, seed)):
        student_TV = (p_TV.log() + 0.5 * torch.randn(p_TV.shape, generator=g)).softmax(-1)
        labels_T = torch.multinomial(p_TV.float(), 1, generator=g)[:, 0]
        for meter in meters.values():
            meter.add(p_TV, student_TV, labels_T, first)
        first += len(p_TV)
        print(f"\r  {first} of {count * passes} tokens", end="", flush=True)
    print("\r", end="")
    return {key: meter.found() for key, meter in meters.items()}


class _Meter:
    """One codec at one setting."""

    def __init__(self, name: str, value: float, seed: int, tokens: int, sample_tokens: int):
        self.seed, self.tokens, self.sample_tokens = seed, tokens, sample_tokens
        self.config = CodecConfig(name, **{SWEEPS[name][0]: value})
        self.codec = make_codec(self.config, VOCAB)
        self.parts: list[tuple[Atoms, Tensor, Tensor]] = []
        self.errors, self.angles, self.ratios = [], [], []
        self.sums = torch.zeros(2, VOCAB, dtype=torch.float64)

    def add(self, p_TV: Tensor, student_TV: Tensor, labels_T: Tensor, first: int) -> None:
        place_T = torch.arange(first, first + len(p_TV))
        logits_TV = p_TV.log().float()
        where = {"sample_ids_T": place_T // self.sample_tokens, "positions_T": place_T % self.sample_tokens}
        atoms, entropy_T = self.codec.select(logits_TV, torch.zeros(len(p_TV)), seed=self.seed, **where)
        self.parts.append((atoms, logits_TV.gather(1, labels_T[:, None])[:, 0], entropy_T))
        ids_TK, probs_TK = self.codec.decode(atoms)
        sparse_TV = torch.zeros_like(p_TV).scatter_add_(1, ids_TK, probs_TK.double())
        # Of topk the loss sees the k alone; its residual mass has no id.
        true_TV = student_TV - p_TV
        got_TV = student_TV * sparse_TV.sum(1, keepdim=True) - sparse_TV
        self.errors.append((sparse_TV - p_TV).square().sum(1))
        cosine_T = torch.cosine_similarity(true_TV, got_TV)
        self.angles.append(cosine_T.clamp(-1, 1).arccos().rad2deg())
        self.ratios.append(got_TV.norm(dim=1) / true_TV.norm(dim=1))
        self.sums += torch.stack([true_TV.sum(0), got_TV.sum(0)])

    def found(self) -> Found:
        cosine = torch.cosine_similarity(self.sums[0], self.sums[1], dim=0).clamp(-1, 1)
        atoms = Atoms.cat([part[0] for part in self.parts])
        return Found(
            bytes=self._bytes(atoms),
            mse=float(torch.cat(self.errors).mean()),
            angle_deg=float(torch.cat(self.angles).mean()),
            norm_ratio=float(torch.cat(self.ratios).mean()),
            batch_angle_deg=math.degrees(math.acos(cosine)),
            atoms=float(atoms.counts_T.float().mean()),
        )

    def _bytes(self, atoms: Atoms) -> float:
        """Through the writer; what it wrote is read back and compared."""
        samples = self.tokens // self.sample_tokens
        ids, digests = np.arange(samples), np.arange(samples, dtype=np.uint64)
        header = CacheHeader(VOCAB, "yardstick", "yardstick", self.sample_tokens, samples, self.config, 0)
        label_T, entropy_T = (torch.cat([part[i] for part in self.parts]) for i in (1, 2))
        with tempfile.TemporaryDirectory() as folder:
            with CacheWriter(folder, header, writer="teacher-00000") as writer:
                writer.put(
                    ids, digests, atoms, label_T, entropy_T, torch.ones(self.tokens, dtype=torch.bool),
                    step=0, tokens_seen=0, teacher="yardstick",
                )  # fmt: skip
            targets = CacheReader(folder).read(ids, digests).targets
            want = self.codec.decode(atoms)
            for t in range(0, self.tokens, 97):
                pairs = [dict(zip(i[t].tolist(), p[t].tolist())) for i, p in (targets[:2], want)]
                assert all(
                    {i: p for i, p in pair.items() if p} == {i: p for i, p in pairs[1].items() if p} for pair in pairs
                )
            files = [*Path(folder).glob("shards/*.safetensors"), *Path(folder).glob("ledger/*.jsonl")]
            return sum(path.stat().st_size for path in files) / self.tokens


def topk_errors(seed: int, count: int) -> list[float]:
    """Expected squared error of keeping the k largest exactly, for each of the peers."""
    totals = torch.zeros(len(PEERS), dtype=torch.float64)
    for p_TV in rows(count, seed):
        square_TV = p_TV.topk(max(k for k, _ in PEERS.values())).values.square()
        rest_T = p_TV.square().sum(1)
        totals += torch.stack([(rest_T - square_TV[:, :k].sum(1)).sum() for k, _ in PEERS.values()])
    return (totals / count).tolist()


def between(x: list[float], y: list[float], at: float) -> float:
    """y at x = `at` on straight lines between logarithms."""
    order = np.argsort(x)
    x_log, y_log = np.log(np.array(x)[order]), np.log(np.array(y)[order])
    assert x_log[0] <= math.log(at) <= x_log[-1], f"{at} lies outside of what was measured, {min(x)} to {max(x)}"
    return float(np.exp(np.interp(math.log(at), x_log, y_log)))


def draw_charts(measured: dict[tuple[str, float], Found], peers: dict[str, tuple[float, float]]) -> None:
    def curve(label: str, style: int, points: list[tuple[float, float]]) -> charts.Curve:
        points = sorted(points)
        return charts.Curve(label, style, np.array([b for b, _ in points]), np.array([e for _, e in points]))

    curves = [
        curve(name, style, [(f.bytes, f.mse) for (n, _), f in measured.items() if n == name])
        for style, name in enumerate(SWEEPS)
    ]
    curves += [curve(label, 4 + i, [point, point]) for i, (label, point) in enumerate(peers.items())]
    note = f"Rows of the yardstick, V = {VOCAB:,}. The error of topk is bias: it does not average out over tokens."
    frame = charts.Frame("Error over bytes", "expected squared error", "bytes a token", note, wide=True)
    body = charts.line_chart(frame, curves, smoothed=False, zero=False, log_x=True, log_y=True)
    angles = [
        curve(name, style, [(f.bytes, f.batch_angle_deg) for (n, _), f in measured.items() if n == name])
        for style, name in enumerate(SWEEPS)
    ]
    note = "Of the gradient summed over all tokens, to that of dense targets."
    frame = charts.Frame("Angle of the gradient", "degrees", "bytes a token", note, wide=True)
    body += charts.line_chart(frame, angles, smoothed=False, zero=True, log_x=True)
    draw("codec", "Fidelity per byte", f'<div class="grid">\n{body}</div>\n')
