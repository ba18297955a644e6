"""Checkpoint folders: round trips, refusals and what they say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config.errors import CheckpointError
from distill.model import Transformer, hf
from tests.unit.test_model_attention import config_of
from tests.unit.test_model_transformer import SIZED, preset


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(config_of(eos_ids=[3, 4], bos_id=1, pad_id=None))


@pytest.fixture
def folder(model, tmp_path):
    hf.save(model, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    """Changes keys of config.json; ... removes one."""
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        hf.load(folder)
    return str(error.value)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_round_trip_is_bitwise(model, tmp_path, shard_bytes):
    hf.save(model, tmp_path / "out", max_shard_bytes=shard_bytes)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes == 10**9)
    loaded = hf.load(tmp_path / "out")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    if shard_bytes != 10**9:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        largest = max(p.nbytes for p in model.parameters())
        for file in files:
            tensors = load_file(tmp_path / "out" / file)
            assert sum(t.nbytes for t in tensors.values()) <= max(largest, shard_bytes)


@pytest.mark.parametrize("name", SIZED)
def test_presets_survive_their_json(name):
    data = json.loads(json.dumps(hf.config_to_json(preset(name))))
    assert hf.config_from_json(data) == preset(name)


def test_explicit_layers_survive_their_json():
    config = config_of(moe_layers=[0, 3], rope_layers=[True, False, False, True])
    back = hf.config_from_json(hf.config_to_json(config))
    assert back.moe_layers == [0, 3] and back.rope_layers == [True, False, False, True]


def test_text_model_of_an_image_and_text_checkpoint(model, folder):
    text = json.loads((folder / "config.json").read_text())
    nested = {
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(nested))
    tensors = {f"language_model.{k}": v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    tensors["vision_model.class_embedding"] = torch.zeros(8)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(8, 8)
    save_file(tensors, folder / "model.safetensors")
    loaded = hf.load(folder, vision=False)
    assert loaded.config == model.config
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters()):
        assert theirs.dtype == torch.float32 and torch.equal(theirs, ours.bfloat16().float()), name


def test_config_traps(folder):
    plain = json.loads((folder / "config.json").read_text())
    config = hf.config_from_json(plain)
    assert hf.config_from_json(plain | {"attn_temperature_tuning": 4}).temperature_tuning is True
    assert hf.config_from_json(plain | {"no_rope_layers": []}).rope_layers is None
    assert hf.config_from_json(plain | {"attention_chunk_size": None}).chunk_size is None
    assert hf.config_from_json(plain | {"interleave_moe_layer_step": 0, "moe_layers": []}).moe_step == 0
    v4 = plain | {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert hf.config_from_json(v4) == config
    assert hf.config_from_json(plain | {"eos_token_id": 7}).eos_ids == [7]


def test_old_scout_scaling_warns_and_is_followed():
    data = hf.config_to_json(preset("scout"))
    data["rope_parameters"] |= {"factor": 8.0, "high_freq_factor": 4.0}
    with pytest.warns(UserWarning, match="8 / 4"):
        config = hf.config_from_json(data)
    assert config.rope_scaling.factor == 8.0 and config.rope_scaling.high_freq_factor == 4.0


# ---------------------------------------------------------------- bad input


def test_every_fault_of_a_config_is_named_at_once(folder):
    edit(
        folder,
        hidden_act="gelu",
        attention_bias=True,
        tie_word_embeddings=True,
        quantization_config={"quant_method": "fbgemm_fp8"},
        vocab_size=...,
        num_hidden_layers="four",
        moe_layers=[0.5],
        rope_parameters={"rope_type": "yarn"},
    )
    said = refusal(folder)
    for part in (
        "hidden_act is 'gelu'; only 'silu' is supported",
        "attention_bias is True",
        "tie_word_embeddings is True",
        "quantization_config.quant_method is 'fbgemm_fp8'; only 'compressed-tensors' is supported",
        "vocab_size is missing",
        "num_hidden_layers is 'four'; it must be an integer",
        "moe_layers is [0.5]; it must be a list of integers or null",
        "rope_theta is missing",
        "rope_parameters.rope_type is 'yarn'; allowed: 'default', 'llama3'",
    ):
        assert part in said, part
    assert str(folder / "config.json") in said
    assert len(said.splitlines()) == 9


def test_sizes_that_do_not_go_together(folder):
    edit(folder, num_key_value_heads=3, head_dim=7, num_experts_per_tok=5, no_rope_layers=[1, 0], moe_layers=[9])
    said = refusal(folder)
    for part in (
        "num_attention_heads is 4; it must be a multiple of num_key_value_heads, 3",
        "head_dim is 7",
        "num_experts_per_tok is 5; allowed: 1 to num_local_experts, 4",
        "no_rope_layers has 2 entries; one for each of num_hidden_layers, 4",
        "moe_layers has 9; allowed: 0 to 3",
    ):
        assert part in said, part


def test_llama3_without_its_numbers(folder):
    edit(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    assert "rope_parameters.low_freq_factor is missing" in refusal(folder)


def test_layer_types_that_disagree(folder):
    edit(folder, layer_types=["full_attention"] * 4)
    assert "layer_types disagrees with no_rope_layers" in refusal(folder)


def test_every_tensor_that_does_not_fit_is_named_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 5)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(8)
    key = "model.layers.1.feed_forward.experts.down_proj"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    said = refusal(folder)
    assert "model.norm.weight [32] is in no file" in said
    assert "model.safetensors: lm_head.weight has shape [3, 5]; the model's is [64, 32]" in said
    assert "model.safetensors: model.layers.0.self_attn.q_norm.weight is unknown to the model" in said
    assert f"{key} is stored as F8_E4M3; allowed: F64, F32, F16, BF16" in said


def test_damaged_or_absent_files(folder, model, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for size in (4, 200, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors is damaged" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)
    assert "config.json is missing" in refusal(tmp_path / "nowhere")

    hf.save(model, tmp_path / "sharded", max_shard_bytes=20_000)
    first, second, *_ = sorted((tmp_path / "sharded").glob("*.safetensors"))
    first.unlink()
    moved = load_file(second)
    gone = sorted(moved)[0]
    save_file({k: v for k, v in moved.items() if k != gone}, second)
    said = refusal(tmp_path / "sharded")
    assert f"{first} is named by model.safetensors.index.json but is no file" in said
    assert f"{second.name}: {gone} is in model.safetensors.index.json but not in the file" in said


def test_an_index_may_not_point_out_of_the_folder(folder, tmp_path):
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../model.safetensors is named by" in refusal(folder)


# ---------------------------------------------------------------- saving


def test_a_used_folder_is_refused_and_untouched(model, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        hf.save(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(hf.write_checkpoint, "_dump", full_disk)  # after the weights, before config.json
    with pytest.raises(OSError, match="no space"):
        hf.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nonzero_router_bias_is_refused(model, tmp_path):
    model.routers[1].bias[2] = 0.01
    with pytest.raises(CheckpointError, match=r"drop_router_bias is false; the router bias of layers \[3\]"):
        hf.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_dropping_the_router_bias_says_what_it_costs(model, tmp_path, capsys):
    model.routers[0].bias.copy_(torch.tensor([0.5, 0.0, 0.0, 0.0]))
    seen = []

    def heldout_loss(m):
        seen.append(m.routers[0].bias.tolist())
        return 2.0 if m.routers[0].bias.any() else 2.5

    report = hf.save(model, tmp_path / "a", drop_router_bias=True, heldout_loss=heldout_loss)
    assert report == (2.0, 2.5) and seen == [[0.5, 0, 0, 0], [0, 0, 0, 0]]
    assert model.routers[0].bias.tolist() == [0.5, 0, 0, 0]
    assert capsys.readouterr().out == ("router bias dropped; held-out loss 2.0000 -> 2.5000 nats per token (+0.5000)\n")
    assert not hf.load(tmp_path / "a").routers[0].bias.any()
    assert hf.save(model, tmp_path / "b", drop_router_bias=True) == (None, None)
    assert "was not measured" in capsys.readouterr().out


def test_the_bias_comes_back_when_the_loss_raises(model, tmp_path):
    model.routers[0].bias.fill_(0.5)
    calls = []

    def heldout_loss(m):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of data")
        return 1.0

    with pytest.raises(RuntimeError, match="out of data"):
        hf.save(model, tmp_path / "out", drop_router_bias=True, heldout_loss=heldout_loss)
    assert (model.routers[0].bias == 0.5).all()
