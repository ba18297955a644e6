"""Caps, scales and biases of foreign logits: seen however small the logits are, applied, or refused by name."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from distill.config.errors import ConfigError
from teacher import foreign as hf
from teacher.probe import probe
from tests.unit.test_teacher_hf import SMALL, V, alone, batch_of

GEMMA = SMALL | {"head_dim": 8}
HYBRID = dict(mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=4, mamba_chunk_size=8)
APPLIED = {
    "llama": (LlamaConfig(**SMALL), True),
    "opt": (OPTConfig(vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2), False),
    "gemma2": (Gemma2Config(**GEMMA, final_logit_softcapping=30.0), False),
    "gemma2 capped far away": (Gemma2Config(**GEMMA, final_logit_softcapping=50_000.0), False),
    "gemma2 without caps": (Gemma2Config(**GEMMA, final_logit_softcapping=None, attn_logit_softcapping=None), True),
    "recurrent_gemma": (RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, lru_width=16), False),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.0625), False),
    "cohere of scale 1": (CohereConfig(**SMALL, logit_scale=1.0), True),
    "granite": (GraniteConfig(**SMALL, logits_scaling=8.0, residual_multiplier=0.2), False),
    "hyperclovax": (HyperCLOVAXConfig(**SMALL, logits_scaling=0.25), False),
    "falcon_h1": (FalconH1Config(**SMALL, **HYBRID, lm_head_multiplier=0.04), False),
    "phi": (PhiConfig(**SMALL | {"num_key_value_heads": 2}), False),
}
REFUSED = {
    "final_logit_softcapping 30.0": LlamaConfig(**SMALL, final_logit_softcapping=30.0),
    "final_logit_softcapping 20000.0": LlamaConfig(**SMALL, final_logit_softcapping=20_000.0),
    "logit_scale 0.5": LlamaConfig(**SMALL, logit_scale=0.5),
    "logits_scaling 8": LlamaConfig(**SMALL, logits_scaling=8),
    "scale_emb 12": LlamaConfig(**SMALL, scale_emb=12),
    "residual_multiplier 0.2": LlamaConfig(**SMALL, residual_multiplier=0.2),
    "logit_scale 0.3": Gemma2Config(**GEMMA, logit_scale=0.3),
    "attn_logit_softcapping 50.0": Gemma3TextConfig(**GEMMA, attn_logit_softcapping=50.0),  # keeps it, never reads it
    "logit_scale 'inv_sqrt_d_model'": MptConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, max_seq_len=32,
                                                logit_scale="inv_sqrt_d_model"),
    "final_logit_softcapping 9.0": OPTConfig(vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=1,
                                             num_attention_heads=2, final_logit_softcapping=9.0),
}  # fmt: skip


def model_of(config, size=1.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(size)
        if head.bias is not None:
            head.bias.normal_().mul_(size)
    return model


@pytest.mark.parametrize("name", APPLIED)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_whatever_is_done_to_logits_is_in_the_targets(name, size):
    """Logits of all sizes, in fp64: as the library gives them for each document alone, and the head is seen through."""
    config, plain = APPLIED[name]
    model, batch = model_of(config, size).double(), batch_of()
    assert probe(model, "x") == (plain, V)
    teacher, seen = hf.Foreign(model), []
    with torch.inference_mode():
        teacher.label(batch, lambda start, logits_TV, lse_T: seen.append(logits_TV - lse_T[:, None]), 64)
        logits_TV = alone(model, batch)
    assert teacher._plain_head is plain
    # Softmax and norms are fp32 in some of these, whatever the weights.
    bound = 3e-6 * max(1.0, float(logits_TV.abs().max()))
    torch.testing.assert_close(torch.cat(seen), logits_TV.log_softmax(-1), atol=bound, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_seen_in_every_precision(dtype):
    for config, plain in APPLIED.values():
        assert probe(model_of(config).to(dtype), "x").plain is plain


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_configuration_names_and_the_model_does_not_do_is_refused(what):
    config = REFUSED[what]
    with pytest.raises(ConfigError) as caught:
        _ = hf.Foreign(model_of(config), "teacher.from is hf:/m").vocab_size
    (line,) = caught.value.problems
    assert line.startswith(
        f"teacher.from is hf:/m; its config.json (model_type {config.model_type}) has {what}, which "
    )


def test_every_refusal_has_a_line():
    with pytest.raises(ConfigError) as caught:
        probe(model_of(LlamaConfig(**SMALL, final_logit_softcapping=30.0, logit_scale=0.5, scale_depth=1.4)), "x")
    assert len(caught.value.problems) == 3


def test_values_that_change_nothing_are_no_reason():
    named = dict(final_logit_softcapping=None, logit_scale=1.0, residual_multiplier=1, scale_emb=None)
    assert probe(model_of(LlamaConfig(**SMALL, **named)), "x") == (True, V)


def test_logits_narrower_than_the_unembedding_give_the_vocabulary():
    model = model_of(LlamaConfig(**SMALL))
    whole = model.forward

    def narrow(input_ids=None, attention_mask=None, use_cache=None):
        out = whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        out.logits = out.logits[..., : V - 4]
        return out

    model.forward = narrow
    assert probe(model, "x") == (False, V - 4)

    def masked(input_ids=None, attention_mask=None, use_cache=None):
        out = whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        out.logits[..., V - 4 :] = -torch.inf
        return out

    model.forward = masked
    assert probe(model, "x") == (False, V)
