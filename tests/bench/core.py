"""The core against transformers and against a dense model, and its memory by length: forward and backward, fp32.

Speed: one layer, hidden 512, expert and shared hidden 1,024, 8 query and 2 key/value heads of 64, V = 512, top-1; the
same weights and 2 x 1,024 tokens for both sides, taken in turns on 2 threads. The dense model has one feed-forward of
2,048: the same active FLOPs. Memory: MiB of one row of 8,192 to 32,768 tokens, see `_memory`.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from distill.config.schema import ModelConfig
from distill.model import Transformer, hf
from tests.bench._memory import peak_mb
from tests.bench._timing import in_turns, ratio

LONG = 16_384
PARTS = {
    "aten::_grouped_mm": "experts",
    "aten::mm": "other_products",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    **dict.fromkeys(("aten::sort", "aten::topk", "aten::index_select", "aten::index_add_"), "dispatch"),
}


def config(experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=512, hidden_size=512, layers=1, heads=8, kv_heads=2, head_dim=64, expert_hidden=1024,
        dense_hidden=2048, experts=max(experts, 1), moe_step=1 if experts else 0, nope_step=0, max_positions=LONG,
        bos_id=None, eos_ids=[], pad_id=None,
    )  # fmt: skip


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(0))


def ours(model: Transformer, ids_BS: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss, _ = model(ids_BS, None, lambda h, w: F.cross_entropy(F.linear(h, w), ids_BS.flatten()))
    loss.backward()


def theirs(model: torch.nn.Module, ids_BS: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    logits = model(ids_BS, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), ids_BS.flatten()).backward()


def against_transformers(experts: int, rounds: int) -> float:
    import transformers

    torch.manual_seed(0)
    model = Transformer(config(experts))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, f"{folder}/model")
        other = transformers.Llama4ForCausalLM.from_pretrained(f"{folder}/model")
    ids_BS = tokens(2, 1024)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids_BS), other(ids_BS, use_cache=False).logits, atol=1e-4, rtol=0)
    functions = {"ours": partial(ours, model, ids_BS), "theirs": partial(theirs, other.train(), ids_BS)}
    seconds = in_turns(functions, rounds)
    return ratio(seconds, "theirs", "ours")


def against_dense(rounds: int) -> float:
    ids_BS = tokens(LONG // 1024, 1024)
    torch.manual_seed(0)
    functions = {
        name: partial(ours, Transformer(config(experts)), ids_BS) for name, experts in (("moe", 128), ("dense", 0))
    }
    return ratio(in_turns(functions, rounds), "dense", "moe")


def shares(experts: int) -> dict[str, float]:
    """Where the time of a forward and backward pass goes, as shares of it."""
    torch.manual_seed(0)
    step = partial(ours, Transformer(config(experts)), tokens(2, 1024))
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds: dict[str, float] = {}
    for event in profiler.events():
        part, above = "rest", event
        while above is not None:  # the outermost operator in PARTS decides where a piece of time is counted
            part, above = PARTS.get(above.name, part), above.cpu_parent
        seconds[part] = seconds.get(part, 0.0) + event.self_cpu_time_total
    return {f"share_{part}_{experts}": time / sum(seconds.values()) for part, time in sorted(seconds.items())}


def run() -> dict[str, float]:
    torch.set_num_threads(2)
    return {
        "speedup_vs_hf_16": against_transformers(16, rounds=5),
        "speedup_vs_hf_128": against_transformers(128, rounds=3),
        "tokens_vs_dense_128": against_dense(rounds=3),
        **{f"peak_mb_{thousands}k": peak_mb(1024 * thousands) for thousands in (8, 16, 32)},
        **shares(16),
        **shares(128),
    }
