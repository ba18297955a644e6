"""Fidelity per byte: what each codec loses on the yardstick, and what its records take on disk.

Three measurements. Errors are expected squared distances to the true rows.

1. 2,048 rows are tokens of two samples, captured, published by the writer and read back. `bytes` are those of shards
   and listings, per-token statistics included; the table of ranks, once for a whole cache, is not. Angles and norms are
   those of the gradient of the forward KL with respect to the logits, for a student whose logits are off by noise of
   size 0.5: mean over tokens, and of the sum over all tokens (`batch_`), in which what is unbiased averages out. Sizes
   of the peers are what they store at this vocabulary.
2. By entropy: 1,024 rows whose exponents are scaled to each of ENTROPIES. Bytes are those of records and of their
   entries in the shard's index: what a token takes in a shard of many samples.
3. By length: the same bytes of 4,096 rows of 1.9 nats, cut into samples of LENGTHS tokens.

SEED= and ROWS= (200 or more; the first measurement takes fewer than 2,048 several times) measure it anew.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.config.schema import CodecConfig
from distill.tracking import charts
from tests.bench._chart import draw
from tests.bench._codec_meter import CodecMeter, CodecSetting, DecodedRows, on_rows, sweep
from tests.bench._yardstick import VOCAB, rows, scaled

ROWS, SAMPLE = 2048, 1024
GOAL_BYTES = 31.0
"""What 50 draws take in records of three bytes: arXiv 2503.16870, at this vocabulary."""
RSKD = CodecSetting("multinomial", 50)
RSKD_ID_BYTES = 3
"""An id and its count in that paper's own records."""
SWEEPS = {
    "systematic": (12, 17, 20, 32, 128, 200),
    "threshold": (0.12, 0.07, 0.05, 0.01),
    "multinomial": (20, 50, 200),
    "topk": (4, 12, 50),
}
"""Values of each codec's one parameter."""
SHOWN = {"systematic": 20, "threshold": 0.05, "multinomial": 50, "topk": 12}
PEERS = {
    "Megatron-LM, k = 16": (16, 80.0),
    "DistillKit budget, k = 50": (50, 127.0),
    "DistillKit, k = 128": (128, 344.0),
    "MaxText, k = 128": (128, 896.0),
}
"""The k largest that each keeps, and its bytes a token."""
ENTROPIES = (0.6, 1.9, 3.2, 8.0)
"""Mean nats of scaled rows."""
BY_ENTROPY = {
    "systematic": (5, 12, 20, 32, 50),
    "threshold": (0.3, 0.12, 0.05, 0.02, 0.01),
    "multinomial": (50,),
    "topk": (12,),
}
LENGTH_ENTROPY, LENGTHS = 1.9, (128, 1024, 4096)
"""Tokens of a sample, at rows of this entropy."""


class Fidelity(NamedTuple):
    """Means over all rows."""

    bytes: float
    mse: float
    angle_deg: float
    norm_ratio: float
    batch_angle_deg: float
    atoms: float


def run() -> dict[str, float]:
    seed, count = int(os.environ.get("SEED", 0)), int(os.environ.get("ROWS", ROWS))
    measured = measure(sweep(SWEEPS), seed, count)
    default = [row for setting, row in measured.items() if setting.codec == CodecConfig().name]
    goal = measured[RSKD].mse
    peers = {"RS-KD, 50 draws": (RSKD_ID_BYTES * measured[RSKD].atoms, goal)}
    peers |= zip(PEERS, zip((size for _, size in PEERS.values()), topk_errors(seed, min(count, 256)), strict=True))
    results = {
        "bytes_at_rs50_error": between([row.mse for row in default], [row.bytes for row in default], goal),
        "error_at_31_bytes": between([row.bytes for row in default], [row.mse for row in default], GOAL_BYTES) / goal,
        "rs50_error": goal,
    }
    for setting in SHOWN.items():
        row = measured[CodecSetting(*setting)]
        results |= {f"{setting[0]}_{part}": value for part, value in row._asdict().items()}
    for label, (size, error) in peers.items():
        results |= {f"{label}: bytes": size, f"{label}: mse": error}
    draw_charts(measured, peers)
    return results | by_entropy(seed, min(count, SAMPLE)) | by_length(seed, LENGTHS[-1] if count >= ROWS else count)


def measure(settings: list[CodecSetting], seed: int, count: int) -> dict[CodecSetting, Fidelity]:
    """Every setting on the same rows; few of them are sampled several times."""
    passes = -(-ROWS // count)
    width = SAMPLE if count % SAMPLE == 0 else count
    meters = {setting: (CodecMeter(setting, seed, width), _GradientMeter()) for setting in settings}
    g = torch.Generator().manual_seed(seed + 1)
    tokens = 0
    for p_TV in (block_TV for _ in range(passes) for block_TV in rows(count, seed)):
        logp_TV = p_TV.log()
        student_TV = (logp_TV + 0.5 * torch.randn(p_TV.shape, generator=g)).softmax(-1)
        labels_T = torch.multinomial(p_TV.float(), 1, generator=g)[:, 0]
        for meter, gradients in meters.values():
            gradients.add(p_TV, student_TV, meter.add(p_TV, logp_TV.float(), labels_T))
        tokens += len(p_TV)
        print(f"\r  {tokens} of {count * passes} tokens", end="", flush=True)
    print("\r", end="")
    return {
        setting: Fidelity(
            bytes=meter.bytes().all,
            mse=meter.error,
            angle_deg=float(torch.cat(gradients.angles).mean()),
            norm_ratio=float(torch.cat(gradients.ratios).mean()),
            batch_angle_deg=gradients.batch_angle(),
            atoms=meter.atoms_per_token,
        )
        for setting, (meter, gradients) in meters.items()
    }


class _GradientMeter:
    """Compares the gradients of stored and of true rows."""

    def __init__(self) -> None:
        self.angles: list[Tensor] = []
        self.ratios: list[Tensor] = []
        self._sums = torch.zeros(2, VOCAB, dtype=torch.float64)

    def add(self, p_TV: Tensor, student_TV: Tensor, decoded: DecodedRows) -> None:
        sparse_TV = torch.zeros_like(p_TV).scatter_add_(1, *decoded)
        true_TV = student_TV - p_TV
        got_TV = student_TV * sparse_TV.sum(1, keepdim=True) - sparse_TV
        cosine_T = torch.cosine_similarity(true_TV, got_TV)
        self.angles.append(cosine_T.clamp(-1, 1).arccos().rad2deg())
        self.ratios.append(got_TV.norm(dim=1) / true_TV.norm(dim=1))
        self._sums += torch.stack([true_TV.sum(0), got_TV.sum(0)])

    def batch_angle(self) -> float:
        """Degrees between the gradients' sums over all tokens."""
        cosine = torch.cosine_similarity(self._sums[0], self._sums[1], dim=0).clamp(-1, 1)
        return math.degrees(math.acos(cosine))


def by_entropy(seed: int, count: int) -> dict[str, float]:
    """Bytes and errors of BY_ENTROPY at each entropy, and the bytes that reach the error of 50 independent draws."""
    results = {}
    for entropy in ENTROPIES:
        meters = on_rows(sweep(BY_ENTROPY), seed, count, count, scaled(VOCAB, entropy))
        sizes = {setting: meter.bytes() for setting, meter in meters.items()}
        place = f"{entropy:g} nats, "
        results[place + "entropy"] = meters[RSKD].entropy
        results[place + "RS-KD's own records: bytes"] = RSKD_ID_BYTES * meters[RSKD].atoms_per_token
        for codec in ("systematic", "threshold"):
            some = [setting for setting in meters if setting.codec == codec]
            errors = [meters[setting].error for setting in some]
            rest = [sizes[setting].records + sizes[setting].index for setting in some]
            results[place + f"{codec} at RS-KD's error: bytes"] = between(errors, rest, meters[RSKD].error)
            results[place + f"{codec} at RS-KD's error: parameter"] = between(
                errors, [setting.value for setting in some], meters[RSKD].error
            )
        for setting, meter in meters.items():
            label = place + f"{setting.codec} {setting.value:g}: "
            results[label + "bytes"] = sizes[setting].records + sizes[setting].index
            results[label + "mse"] = meter.error
    return results


def by_length(seed: int, count: int) -> dict[str, float]:
    """Bytes of the shown settings when the same rows are cut into samples of each length that divides them."""
    results = {}
    settings = [CodecSetting(*setting) for setting in SHOWN.items()]
    meters = on_rows(settings, seed, count, count, scaled(VOCAB, LENGTH_ENTROPY))
    results["samples by length, entropy"] = meters[settings[0]].entropy
    for length in LENGTHS:
        for setting, meter in meters.items() if count % length == 0 else ():
            size = meter.bytes(length)
            label = f"samples of {length}, {setting.codec} {setting.value:g}: "
            results |= {label + "record bytes": size.records, label + "index bytes": size.index}
    return results


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


def draw_charts(measured: dict[CodecSetting, Fidelity], peers: dict[str, tuple[float, float]]) -> None:
    def curve(label: str, style: int, points: list[tuple[float, float]]) -> charts.Curve:
        points = sorted(points)
        return charts.Curve(label, style, np.array([x for x, _ in points]), np.array([y for _, y in points]))

    rows_of = {codec: [row for setting, row in measured.items() if setting.codec == codec] for codec in SWEEPS}
    curves = [
        curve(codec, style, [(row.bytes, row.mse) for row in some])
        for style, (codec, some) in enumerate(rows_of.items())
    ]
    curves += [curve(label, 4 + i, [point, point]) for i, (label, point) in enumerate(peers.items())]
    note = f"Rows of the yardstick, V = {VOCAB:,}. The error of topk is bias: it does not average out over tokens."
    frame = charts.Frame("Error over bytes", "expected squared error", "bytes a token", note, wide=True)
    body = charts.line_chart(frame, curves, smoothed=False, zero=False, log_x=True, log_y=True)
    angles = [
        curve(codec, style, [(row.bytes, row.batch_angle_deg) for row in some])
        for style, (codec, some) in enumerate(rows_of.items())
    ]
    note = "Of the gradient summed over all tokens, to that of dense targets."
    frame = charts.Frame("Angle of the gradient", "degrees", "bytes a token", note, wide=True)
    body += charts.line_chart(frame, angles, smoothed=False, zero=True, log_x=True)
    draw("codec", "Fidelity per byte", f'<div class="grid">\n{body}</div>\n')
