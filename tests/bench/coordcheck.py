"""Coordinate check: does a step of training change every module's output alike, whatever the model's size?

A tiny Llama 4 (all layers MoE; RoPE and query-key norm in every second one, neither in the others) takes STEPS Adam
steps on one batch, TOKENS bytes of the standard library's source, at several sizes and from several inits. Of every
kind of module the root mean square of its output's change since init, in log, averaged over its layers and the inits,
is fitted by a line over log size: its slope is 0 where learning does not depend on the size. A result is the slope
farthest from 0 over the steps; `worst_slope_*` the farthest over all kinds, `*_single_layer` with each layer apart.

All outputs are the model's own, routing included, with one exception. The logits' change is that which the head has
learned, (W - W_init) h: the rest, W_init (h - h_init), falls as width^-1/2 under `transfer` as the logits themselves
do at init, and dies out with training. `whole_logits` has both, and does not count for the worst.

Over depth, outputs of residual branches count as they would before the factor 1 / layers of `transfer`. Base sizes,
where `transfer` is `standard`: width 64, 4 layers, experts of 64. LR is a third of what lr_transfer finds best there,
since there is no warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.schema import BaseSizes, ModelConfig, OptimConfig, Parametrization, WeightDecay
from distill.engine import optim
from distill.model import Transformer
from distill.model.linear import grouped_mm
from distill.model.parts import Parts
from distill.tracking import charts
from tests.bench._chart import draw

WIDTHS, DEPTHS, EXPERTS = (64, 128, 256, 512), (2, 4, 8, 16), (64, 128, 256, 512)
BASE = BaseSizes(hidden_size=64, layers=4, expert_hidden=64, dense_hidden=128)
LR, STEPS, TOKENS = 1e-3, 6, 64
BRANCHES = ("attention", "shared_output", "routed_output", "feed_forward")
UNCOUNTED = ("whole_logits",)

Traces = dict[str, np.ndarray]
"""By kind of module: log RMS of its output's change, [steps, layers]; after `sweep` [sizes, steps, layers]."""


def config(
    parametrization: Parametrization, width: int = 64, layers: int = 4, expert_hidden: int | None = None
) -> ModelConfig:
    """The channels of a head stay; queries, keys and values get more heads with the width."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=width,
        layers=layers,
        heads=width // 16,
        kv_heads=width // 32,
        head_dim=16,
        expert_hidden=expert_hidden or width,
        dense_hidden=2 * width,
        experts=4,
        nope_step=2,
        chunk_size=32,
        floor_scale=16.0,
        rope_theta=10000.0,
        parametrization=parametrization,
        base=BASE,
    )


def trace(model_config: ModelConfig, seed: int, steps: int = STEPS) -> Traces:
    """Trains one model and follows all outputs."""
    torch.manual_seed(seed)
    outputs: dict[str, list[Tensor]] = {}
    model = _watched(model_config, outputs)
    start_VD = model.head.weight.detach().clone()
    ids_BS, labels_T = _batch(seed)
    optimizer = optim.build(model, OptimConfig(lr=LR, weight_decay=WeightDecay(matrices=0.0, head=0.0)))

    def observe() -> dict[str, list[Tensor]]:
        outputs.clear()
        with torch.no_grad():
            hidden_TD, _ = model(ids_BS)
            head_VD = model.head.weight
            outputs["logits"] = [hidden_TD @ (head_VD - start_VD).T]
            outputs["whole_logits"] = [hidden_TD @ head_VD.T]
        return dict(outputs)

    first, changes = observe(), []
    for _ in range(steps):
        loss, _ = model(ids_BS, None, lambda hidden, weight: F.cross_entropy(hidden @ weight.T, labels_T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = observe()
        changes.append({k: [_log_rms(a - b) for a, b in zip(now[k], first[k], strict=True)] for k in first})
    absorbed = math.log(model_config.layers / BASE.layers) * (model_config.parametrization is Parametrization.transfer)
    return {kind: np.array([change[kind] for change in changes]) + absorbed * (kind in BRANCHES) for kind in first}


def sweep(configs: Sequence[ModelConfig], seeds: int, steps: int = STEPS) -> list[Traces]:
    """Mean over the inits of each size."""
    runs = [[trace(c, seed, steps) for seed in range(seeds)] for c in configs]
    return [{kind: np.mean([run[kind] for run in of_size], axis=0) for kind in of_size[0]} for of_size in runs]


def slopes(by_size: Sequence[Traces], sizes: Sequence[int], single_layer: bool = False) -> dict[str, float]:
    """Of each kind, the slope over log size that is farthest from 0 among the steps (and the layers)."""
    kinds = {}
    for kind in by_size[0]:
        y = [t[kind].ravel() if single_layer else t[kind].mean(1) for t in by_size]
        kinds[kind] = float(max(np.polyfit(np.log(sizes), y, 1)[0], key=abs))
    return kinds


def worst(of_kinds: dict[str, float]) -> float:
    return max(abs(slope) for kind, slope in of_kinds.items() if kind not in UNCOUNTED)


def run() -> dict[str, float]:
    sweeps: dict[str, tuple[Sequence[int], int, Callable[[Parametrization, int], ModelConfig]]] = {
        "width": (WIDTHS, 16, lambda p, size: config(p, width=size)),
        "depth": (DEPTHS, 8, lambda p, size: config(p, layers=size)),
        "expert": (EXPERTS, 8, lambda p, size: config(p, expert_hidden=size)),
    }
    worsts, all_slopes, body = {}, {}, ""
    for axis, (sizes, seeds, at) in sweeps.items():
        traces_of = {p.value: sweep([at(p, size) for size in sizes], seeds) for p in Parametrization}
        of = {name: slopes(traces, sizes) for name, traces in traces_of.items()}
        suffix = "" if axis == "width" else f"_{axis}"
        for name, of_kinds in of.items():
            worsts[f"worst_slope_{name}{suffix}"] = worst(of_kinds)
            all_slopes |= {f"slope_{name}{suffix}_{kind}": slope for kind, slope in of_kinds.items()}
            if axis == "width":
                worsts[f"worst_slope_{name}_single_layer"] = worst(slopes(traces_of[name], sizes, single_layer=True))
        body += _section(axis, sizes, traces_of, of)
    text = (
        f"Over widths of {WIDTHS[0]} to {WIDTHS[-1]} the worst slope is {worsts['worst_slope_transfer']:.2f} under "
        f"transfer and {worsts['worst_slope_standard']:.2f} under standard."
    )
    draw("coordcheck", "Coordinate check", f'<p class="verdict">{text}</p>\n{body}')
    return worsts | all_slopes


def _section(
    axis: str, sizes: Sequence[int], traces_of: dict[str, list[Traces]], of: dict[str, dict[str, float]]
) -> str:
    """One chart per kind of module: the change after the last step over the size, both parametrizations."""
    body = ""
    for kind in traces_of["transfer"][0]:
        note = ", ".join(f"{name} {of[name][kind]:+.2f}".replace("-", "−") for name in ("transfer", "standard"))
        curves = [
            charts.Curve(name, style, np.array(sizes), np.exp([t[kind][-1].mean() for t in traces_of[name]]))
            for name, style in (("transfer", 2), ("standard", 1))
        ]
        frame = charts.Frame(kind.replace("_", " "), "RMS of the change since init", axis, f"Worst slopes: {note}")
        body += charts.line_chart(frame, curves, smoothed=False, zero=False, log_x=True, log_y=True)
    return f'<section><h2>Over {axis}, after step {STEPS}</h2><div class="grid">\n{body}</div></section>\n'


def _log_rms(change: Tensor) -> float:
    return 0.5 * math.log(float(change.double().square().mean()))


@functools.cache
def _corpus() -> Tensor:
    source = "".join(inspect.getsource(module) for module in (argparse, dataclasses, typing))
    return torch.frombuffer(bytearray(source.encode()), dtype=torch.uint8).long()


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    """ids [1, T] and the next bytes [T]."""
    text = _corpus()
    at = int(torch.randint(len(text) - TOKENS, (1,), generator=torch.Generator().manual_seed(seed)))
    return text[None, at : at + TOKENS], text[at + 1 : at + TOKENS + 1]


def _watched(model_config: ModelConfig, outputs: dict[str, list[Tensor]]) -> Transformer:
    """A model that appends every module's output to its kind's list when no gradient is asked for."""

    def keep(kind: str, pick: Callable[[typing.Any], Tensor] = lambda out: out) -> Callable[..., None]:
        def hook(module: typing.Any, args: typing.Any, out: typing.Any) -> None:
            if not torch.is_grad_enabled():
                outputs.setdefault(kind, []).append(pick(out))

        return hook

    rows: list[Tensor] = []

    def grouped(x_RD: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        out_RD = grouped_mm(x_RD, weight, ends_E)
        if not torch.is_grad_enabled():
            rows.append(out_RD)
        return out_RD

    def routed(module: typing.Any, args: typing.Any, out: typing.Any) -> None:
        if torch.is_grad_enabled():
            return
        # Rows are sorted by expert: back to the order of the tokens, which is the same before and after a step.
        order_T = out[1].experts_TA.flatten().sort(stable=True).indices.argsort()
        for kind, rows_RD in zip(("routed_hidden", "routed_output"), rows, strict=True):
            outputs.setdefault(kind, []).append(rows_RD[order_T])
        rows.clear()

    model = Transformer(model_config, Parts(grouped_fn=grouped))
    model.embed.register_forward_hook(keep("embedding"))
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(keep(name))
        layer.self_attn.register_forward_hook(keep("attention"))
        moe = layer.feed_forward
        moe.router.register_forward_hook(keep("router", lambda out: out[0]))
        moe.shared_expert.gate_proj.register_forward_hook(keep("shared_hidden"))
        moe.shared_expert.up_proj.register_forward_hook(keep("shared_hidden"))
        moe.shared_expert.register_forward_hook(keep("shared_output"))
        moe.register_forward_hook(routed)
        moe.register_forward_hook(keep("feed_forward", lambda out: out[0]))
    model.layers[-1].register_forward_hook(keep("residual", lambda out: out[0]))
    model.norm.register_forward_hook(keep("hidden"))
    return model
