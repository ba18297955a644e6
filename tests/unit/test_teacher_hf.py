"""A foreign teacher's targets of packed documents are those of each document alone, as transformers itself has them."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PhiConfig,
)

from distill.config.errors import ConfigError
from distill.data.join import Batch, Joined
from teacher import foreign as hf
from tests.closeness import worst

V, D, S = 61, 16, 24
DOCUMENTS = [[0] * 24, [0] * 5 + [1] * 1 + [2] * 18, [0] * 10 + [1] * 10 + [2] * 4]
SMALL = dict(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
             pad_token_id=2)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),  # caps its logits
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),  # scales them
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),  # divides
    "phi": PhiConfig(**SMALL | {"num_key_value_heads": 2}),  # adds a bias
    "mamba": MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=4),  # has no positions at all
}
PLAIN = {"llama": True, "gpt2": True, "mixtral": True, "gemma2": False, "cohere": False, "granite": False,
         "phi": False, "mamba": True}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()  # a model changes its configuration
    model.config._experts_implementation = "eager"  # the one by groups has no fp64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)  # logits that differ, so that a document's neighbors would show
        if name == "phi":
            model.lm_head.bias.normal_()
    return model


def batch_of():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (len(DOCUMENTS), S + 1), generator=generator)
    rows = len(DOCUMENTS)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], torch.ones(rows, S, dtype=torch.bool),
        torch.tensor(DOCUMENTS, dtype=torch.int32), np.arange(rows), np.zeros(rows, np.int64),
        np.zeros(rows, np.uint64), *Joined.none(rows),
    )  # fmt: skip


def alone(model, batch):
    """Logits [T, V] of every document run by itself, by the library."""
    parts = []
    for ids_S, documents_S in zip(batch.ids_BS, batch.documents_BS):
        for ordinal in documents_S.unique():
            parts.append(model(input_ids=ids_S[documents_S == ordinal][None]).logits[0].double())
    return torch.cat(parts)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [7, 4096])
def test_packed_documents_get_the_logits_of_each_alone(name, chunk):
    model, batch = model_of(name).double(), batch_of()
    teacher = hf.Foreign(model)
    rows_seen = []

    def select(rows, logits_TV, lse_T):
        assert rows.start == sum(rows_seen), "in order, without gaps"
        assert worst(logits_TV.logsumexp(-1), lse_T) < 1e-5
        rows_seen.append(len(logits_TV))
        return logits_TV.log_softmax(-1)

    with torch.inference_mode():
        _, hard_T, selections = teacher.label(batch, select, chunk)
        want_TV = alone(model, batch)
    assert teacher._plain_head is PLAIN[name]
    assert want_TV.std() > 0.05
    assert worst(torch.cat(selections), want_TV.log_softmax(-1)) < 1e-5
    want_T = torch.nn.functional.cross_entropy(want_TV, batch.labels_BS.flatten(), reduction="none")
    assert worst(hard_T, want_T) < 1e-5
    assert teacher.vocab_size == V


@pytest.mark.parametrize("name", CONFIGS)
def test_live_targets_take_a_plain_head_and_no_other(name):
    model, batch = model_of(name).double(), batch_of()
    teacher = hf.Foreign(model)
    if not PLAIN[name]:
        for ask in (lambda: teacher.unembedding, lambda: teacher.hidden(batch)):
            with pytest.raises(ConfigError, match="not its last hidden states times its unembedding"):
                ask()
        return
    with torch.no_grad():
        assert worst(teacher.hidden(batch) @ teacher.unembedding.T, alone(model, batch)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_flops_are_those_that_torch_counts(name):
    """Torch counts products as they are made, scores above the diagonal among them; those are known and taken off."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of(name)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, S, dtype=torch.long))
    above = S * (S - 1) // 2 * 2 * 2 * D * 2  # pairs, multiply and add, scores and mixing, channels, layers
    assert hf.Foreign(model).flops_per_token(S) == pytest.approx((counter.get_total_flops() - above) / S, rel=1e-3)


def test_a_folder_without_a_model_or_with_half_of_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"hf:.*transformers cannot load it"):
        hf.load(tmp_path, torch.float32)
    from safetensors.torch import load_file, save_file

    model_of("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 tensors of the model: model\.layers\.1\.mlp\.up_proj\.weight"):
        hf.load(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ConfigError, match=r"transformers cannot load it: .*header"):
        hf.load(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a pointer of Git LFS"):
        hf.load(tmp_path, torch.float32)


def test_a_saved_model_comes_back(tmp_path):
    model, batch = model_of("gpt2"), batch_of()
    model.save_pretrained(tmp_path)
    teacher = hf.load(tmp_path, torch.float32)
    with torch.inference_mode():
        hard_T = teacher.label(batch, None, 4096).hard_T
        want_T = torch.nn.functional.cross_entropy(alone(model, batch), batch.labels_BS.flatten(), reduction="none")
    assert worst(hard_T, want_T) < 1e-5
    assert teacher.max_positions == 32 and math.isfinite(teacher.flops_per_token(S))
