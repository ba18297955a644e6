"""The core against transformers: logits, gradients, bf16 bits, checkpoints both ways, and that the comparison bites."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from distill.config.schema import RopeScaling
from distill.model import Transformer, hf
from distill.model.hf.parameter_names import hf_name
from tests.closeness import apart, worst

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def llama3(high):
    scaling = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": high}
    return {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **scaling}


def case(qk_norm, step, rope, active):
    features = {"use_qk_norm": qk_norm, "interleave_moe_layer_step": step, "num_experts_per_tok": active}
    return SIZES | features | {"rope_parameters": rope}


CASES = {
    "scout": case(True, 1, llama3(4.0), 1),
    "scout_exact_scaling": case(True, 1, llama3(1.0), 1),
    "maverick": case(False, 2, PLAIN, 1),
    "mixed": case(True, 2, llama3(4.0), 2),
    "all_experts": case(False, 1, PLAIN, 4),
}
MIXED_TOP1 = case(True, 2, llama3(4.0), 1)


def saved(folder, settings):
    """A transformers model with weights that exercise norms and routers, and its folder."""
    torch.manual_seed(1)
    theirs = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1, 0.1) if parameter.ndim == 1 else parameter.normal_(0, 0.08)
    theirs.save_pretrained(folder)
    return theirs.eval()


def ids_of(length=37):
    # 37: no multiple of the chunk, four borders, a tail.
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(tmp_path, name):
    theirs = saved(tmp_path, CASES[name])
    ours = hf.load(tmp_path)
    ids_BS = ids_of()
    logits = ours.logits(ids_BS)
    for attention in ("eager", "sdpa"):
        theirs.set_attn_implementation(attention)
        expected = theirs(ids_BS, use_cache=False).logits
        assert worst(logits, expected) < 1e-5, attention
    for out in (logits, expected):
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()).backward()
    found = {hf_name(n): p.grad for n, p in ours.named_parameters()}
    for key, parameter in theirs.named_parameters():
        assert apart(found[key], parameter.grad) < 2e-5, key


def test_the_comparison_has_teeth(tmp_path):
    theirs = saved(tmp_path, MIXED_TOP1)
    ours = hf.load(tmp_path)
    ids_BS = ids_of()
    with torch.no_grad():
        expected = theirs(ids_BS, use_cache=False).logits
        assert worst(ours.logits(ids_BS), expected) < 1e-5
        wrong = {
            "no chunks": {"chunk_size": None},
            "NoPE layers one early": {"rope_layers": [i % 4 != 2 for i in range(8)]},
            "RoPE everywhere": {"nope_step": 0},
            "no query-key norm": {"qk_norm": False},
            "no frequency scaling": {"rope_scaling": None},
            "hard frequency step": {"rope_scaling": RopeScaling(16.0, 1.0, 1.0, 32)},
            "no temperature": {"temperature_tuning": False},
            "two experts": {"active_experts": 2},
        }
        for what, change in wrong.items():
            other = Transformer(dataclasses.replace(ours.config, **change))
            other.load_state_dict(ours.state_dict())
            assert worst(other.logits(ids_BS), expected) > 1e-3, what


@pytest.mark.parametrize("length, chunk", [(8, 8), (37, 64)])
def test_bf16_is_bitwise_equal_but_for_the_router(tmp_path, monkeypatch, length, chunk):
    fp32_router(monkeypatch)
    # One chunk per row: across borders the two sides sum in different orders, and bf16 routing then flips.
    saved(tmp_path, MIXED_TOP1 | {"attention_chunk_size": chunk})
    theirs = transformers.Llama4ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    ours = hf.load(tmp_path).to(torch.bfloat16)
    ids_BS = ids_of(length)
    with torch.no_grad():
        assert torch.equal(ours.logits(ids_BS), theirs(ids_BS, use_cache=False).logits)


def fp32_router(monkeypatch):
    """Makes the library's router logits fp32, as ours are in every precision."""

    def forward(self, hidden_TD):
        logits_TE = torch.nn.functional.linear(hidden_TD.float(), self.weight.float())
        top_TA, experts_TA = logits_TE.topk(self.top_k, dim=1)
        scores_TE = torch.full_like(logits_TE, -torch.inf).scatter_(1, experts_TA, top_TA)
        return scores_TE.sigmoid().to(hidden_TD.dtype), logits_TE

    monkeypatch.setattr(transformers.models.llama4.modeling_llama4.Llama4Router, "forward", forward)


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("name", ["scout_exact_scaling", "maverick"])
def test_transformers_loads_what_we_save(tmp_path, name, shard_bytes):
    config = hf.config_from_json(CASES[name] | {"model_type": "llama4_text"})
    torch.manual_seed(0)
    ours = Transformer(dataclasses.replace(config, init_std=0.08, eos_ids=[2, 5]))
    hf.save(ours, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors").exists() == (shard_bytes == 10**9)
    theirs, info = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == [2, 5]
    ids_BS = ids_of()
    with torch.no_grad():
        assert worst(ours.logits(ids_BS), theirs(ids_BS, use_cache=False).logits) < 1e-5


def test_odd_configurations_load_in_transformers(tmp_path):
    # No chunks, RoPE everywhere, no MoE layer: each is written in another way than it is spelt here.
    config = hf.config_from_json(CASES["maverick"] | {"model_type": "llama4_text"})
    config = dataclasses.replace(config, chunk_size=None, nope_step=0, moe_step=0, init_std=0.08)
    torch.manual_seed(0)
    ours = Transformer(config)
    hf.save(ours, tmp_path / "out")
    theirs = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "out")
    ids_BS = ids_of()
    with torch.no_grad():
        expected = theirs(ids_BS, use_cache=False).logits
        assert worst(ours.logits(ids_BS), expected) < 1e-5
        assert worst(hf.load(tmp_path / "out").logits(ids_BS), expected) < 1e-5


def test_both_spellings_of_a_config_give_one_model(tmp_path):
    saved(tmp_path, CASES["scout"])
    v5 = json.loads((tmp_path / "config.json").read_text())
    rope = v5["rope_parameters"]
    v4 = {k: v for k, v in v5.items() if k not in ("rope_parameters", "dtype", "layer_types", "moe_layers")}
    v4 |= {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    v4 |= {"torch_dtype": "float32", "attn_temperature_tuning": 4, "no_rope_layers": []}
    assert hf.config_from_json(v4) == hf.config_from_json(v5)
