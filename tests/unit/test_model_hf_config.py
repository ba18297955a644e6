"""`config.json`: the released files and their traps, spelling by spelling, and what is refused."""

import dataclasses
import json

import pytest

from distill.config.errors import CheckpointError
from distill.config.model import moe_layers, rope_layers
from distill.config.schema import RopeScaling, VisionConfig
from distill.model import hf
from tests.unit.test_model_attention import config_of
from tests.unit.test_model_transformer import SIZED, preset

# What the released files say (transformers 4.51), key by key.
TEXT = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 262144,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 202048,
}
SCALING = {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
SCOUT = TEXT | {
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "cache_implementation": "hybrid",
    "floor_scale": 8192,
    "interleave_moe_layer_step": 1,
    "moe_layers": list(range(48)),
    "num_local_experts": 16,
    "rope_scaling": SCALING | {"rope_type": "llama3"},
    "use_qk_norm": True,
}
MAVERICK = TEXT | {
    "interleave_moe_layer_step": 2,
    "num_local_experts": 128,
    "rope_scaling": None,
    "use_qk_norm": False,
}
VISION = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}
EOS = [200001, 200007, 200008]


def released(text, **changes):
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0.dev0",
        "vision_config": VISION,
    } | changes


def faults(data, **options):
    with pytest.raises(CheckpointError) as error:
        hf.config_from_json(data, **options)
    return str(error.value).splitlines()


def the_fault(data, **options):
    (line,) = faults(data, **options)
    return line


# ---------------------------------------------------------------- released files


@pytest.mark.parametrize("name, text", [("scout", SCOUT), ("maverick", MAVERICK)])
def test_released_files_give_the_presets(name, text):
    config = hf.config_from_json(released(text))
    assert config.vision == VisionConfig()
    expected = dataclasses.replace(preset(name), eos_ids=EOS)
    assert dataclasses.replace(config, vision=None) == expected
    assert hf.config_from_json(released(text), vision=False) == expected
    assert hf.config_from_json(text) == expected  # as a text-only save spells it


@pytest.mark.parametrize("vision", [None, VisionConfig()])
@pytest.mark.parametrize("name", SIZED)
def test_what_we_write_we_read(name, vision):
    config = dataclasses.replace(preset(name), vision=vision)
    assert hf.config_from_json(json.loads(json.dumps(hf.config_to_json(config)))) == config


NULL = """
    attention_bias attention_dropout tie_word_embeddings rope_parameters quantization_config layer_types moe_layers
    no_rope_layers pad_token_id torch_dtype dtype _name_or_path"""


@pytest.mark.parametrize("key", NULL.split())
def test_null_is_as_if_a_key_were_not_there(key):
    without = {name: value for name, value in SCOUT.items() if name != key}
    want = hf.config_from_json(without)
    assert hf.config_from_json(without | {key: None}) == want
    assert hf.config_from_json(released(without | {key: None}), vision=False) == want


def test_null_above_and_in_vision():
    want = hf.config_from_json(released(SCOUT))
    assert hf.config_from_json(released(SCOUT, tie_word_embeddings=None, dtype=None, quantization_config=None)) == want
    for key in ("attention_dropout", "projector_dropout", "multi_modal_projector_bias", "rope_scaling"):
        assert hf.config_from_json(released(SCOUT, vision_config=VISION | {key: None})) == want
    heads = hf.config_from_json(SCOUT | {"num_key_value_heads": None, "head_dim": None})
    assert (heads.kv_heads, heads.head_dim) == (40, 128)
    plain = hf.config_from_json(SCOUT | {"rope_scaling": None})
    assert plain.rope_scaling is None
    assert hf.config_from_json(SCOUT | {"rope_scaling": {"rope_type": None, "type": None}}) == plain
    one, none = (hf.config_from_json(SCOUT | {"eos_token_id": eos}) for eos in (7, None))
    assert (one.eos_ids, none.eos_ids) == ([7], [])
    assert hf.config_from_json(SCOUT | {"attention_chunk_size": None}).chunk_size is None


def test_llama_guard_is_dense_and_has_no_chunks():
    guard = TEXT | {
        "attention_chunk_size": None,
        "interleave_moe_layer_step": 0,
        "moe_layers": [],
        "intermediate_size_mlp": 8192,
        "no_rope_layers": [1] * 48,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "use_qk_norm": False,
    }
    config = hf.config_from_json(released(guard))
    assert moe_layers(config) == [] and all(rope_layers(config)) and config.chunk_size is None
    back = hf.config_from_json(json.loads(json.dumps(hf.config_to_json(config))))
    # transformers takes no null: one chunk of all positions is the same model.
    assert back.chunk_size == back.max_positions and moe_layers(back) == [] and all(rope_layers(back))


# ---------------------------------------------------------------- spellings, trap by trap


def test_the_spellings_of_transformers_4_and_5():
    v5 = {k: v for k, v in SCOUT.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    v5 |= {"rope_parameters": SCALING | {"rope_type": "llama3", "rope_theta": 500000.0}, "dtype": "bfloat16"}
    vision = {k: v for k, v in VISION.items() if k != "rope_theta"}
    vision |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "bfloat16"}
    expected = hf.config_from_json(released(SCOUT))
    # Each part in its own spelling: text new and vision old, and the other way round.
    assert hf.config_from_json(released(v5)) == expected
    assert hf.config_from_json(released(SCOUT, vision_config=vision)) == expected
    assert hf.config_from_json(released(v5, vision_config=vision, dtype="bfloat16")) == expected
    old = SCALING | {"type": "llama3"}  # as the oldest files call it
    assert hf.config_from_json(released(SCOUT | {"rope_scaling": old})) == expected


def test_both_spellings_may_stand_together_if_they_agree():
    both = SCOUT | {"rope_parameters": SCALING | {"rope_type": "llama3"}}
    assert hf.config_from_json(both) == hf.config_from_json(SCOUT)
    line = the_fault(SCOUT | {"rope_parameters": SCALING | {"rope_type": "llama3", "factor": 8.0}})
    assert "rope_parameters and rope_scaling are both there and disagree" in line
    assert "both there" in the_fault(MAVERICK | {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": SCALING})


@pytest.mark.parametrize("value, meant", [(4, True), (1, True), (0, False), (True, True), (False, False)])
def test_temperature_tuning_may_be_a_number(value, meant):
    assert hf.config_from_json(SCOUT | {"attn_temperature_tuning": value}).temperature_tuning is meant
    assert hf.config_from_json(MAVERICK).temperature_tuning is True  # absent


def test_only_a_written_null_means_no_chunks():
    assert hf.config_from_json({k: v for k, v in SCOUT.items() if k != "attention_chunk_size"}).chunk_size == 8192
    assert hf.config_from_json(SCOUT | {"attention_chunk_size": None}).chunk_size is None


def test_layers_that_are_derived():
    config = hf.config_from_json(SCOUT)  # an empty list of rope layers, and a full one of MoE layers
    assert config.rope_layers is None and config.moe_layers is None
    assert [i for i, rope in enumerate(rope_layers(config)) if not rope] == list(range(3, 48, 4))
    assert moe_layers(hf.config_from_json(MAVERICK)) == list(range(1, 48, 2))
    explicit = hf.config_from_json(SCOUT | {"no_rope_layers": [0] * 47 + [1], "moe_layers": [5]})
    assert rope_layers(explicit) == [False] * 47 + [True] and moe_layers(explicit) == [5]
    assert hf.config_from_json(SCOUT | {"no_rope_layers": None}).rope_layers is None


def test_class_defaults_are_never_taken_for_sizes():
    for key in ("vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok",
                "max_position_embeddings", "rms_norm_eps", "rope_theta"):  # fmt: skip
        line = the_fault({k: v for k, v in MAVERICK.items() if k != key})
        assert line == f"config.json: {key} is missing"
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                "patch_size", "pixel_shuffle_ratio", "projector_input_dim", "projector_output_dim",
                "vision_output_dim", "rope_theta"):  # fmt: skip
        data = released(MAVERICK, vision_config={k: v for k, v in VISION.items() if k != key})
        assert the_fault(data) == f"config.json: vision_config.{key} is missing"
    data = released(MAVERICK)
    del data["image_token_index"]
    assert the_fault(data) == "config.json: image_token_index is missing"
    # Special tokens that a file does not name are none: not 1 and 2, as in the class.
    bare = hf.config_from_json({k: v for k, v in MAVERICK.items() if "token_id" not in k})
    assert (bare.bos_id, bare.eos_ids, bare.pad_id) == (None, [], None)


def test_null_heads_are_derived_as_transformers_does():
    config = hf.config_from_json(MAVERICK | {"num_key_value_heads": None, "head_dim": None})
    assert (config.kv_heads, config.head_dim) == (40, 128)


def test_scaling_with_one_frequency_factor_is_a_step():
    assert hf.config_from_json(SCOUT).rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)


def test_image_and_patch_sizes_may_be_pairs():
    pairs = VISION | {"image_size": [336, 336], "patch_size": [14, 14]}
    assert hf.config_from_json(released(SCOUT, vision_config=pairs)).vision == VisionConfig()
    line = the_fault(released(SCOUT, vision_config=VISION | {"image_size": [336, 224]}))
    assert "vision_config.image_size is [336, 224]; it must be an integer" in line


def test_what_transformers_does_not_read_changes_nothing():
    inert = {"router_jitter_noise": 0.3, "output_router_logits": True, "router_aux_loss_coef": 1.0, "use_cache": False,
             "id2label": {"0": "a"}, "temperature": 0.6, "top_p": 0.9, "_name_or_path": "x", "max_length": 20,
             "unsloth_fixed": True}  # fmt: skip
    assert hf.config_from_json(released(SCOUT | inert)) == hf.config_from_json(released(SCOUT))
    vision = VISION | {"vision_feature_layer": 7, "vision_feature_select_strategy": "full", "norm_eps": 1e-3}
    # The tower's eps is 1e-5 in transformers, whatever the file says.
    assert hf.config_from_json(released(SCOUT, vision_config=vision)).vision == VisionConfig()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"model_type": "llama"}, "model_type is 'llama'; only 'llama4_text' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False is supported"),
        ({"hidden_sise": 3}, "hidden_sise is no key of Llama 4; did you mean hidden_size"),
        ({"sliding_window": 4096}, "sliding_window is no key of Llama 4"),
        ({"per_layer_config": {}}, "per_layer_config is no key of Llama 4"),
        ({"vocab_size": 12.5}, "vocab_size is 12.5; it must be an integer"),
        ({"vocab_size": True}, "vocab_size is True; it must be an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be positive"),
        ({"use_qk_norm": "yes"}, "use_qk_norm is 'yes'; it must be true or false"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0; at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; at least 1"),
        ({"num_hidden_layers": 10**14}, "num_hidden_layers is 100000000000000; at most 10000"),  # no list is that long
        ({"interleave_moe_layer_step": -1}, "interleave_moe_layer_step is -1; at least 0"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; it must be an object or null"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'; allowed: 'default', 'llama3'"),
        ({"rope_scaling": SCALING | {"rope_type": "llama3", "factr": 1}}, "rope_scaling.factr is no key of Llama 4"),
        ({"rope_scaling": SCALING | {"rope_type": "llama3", "low_freq_factor": 2}},
         "rope_scaling.low_freq_factor is 2.0; at most high_freq_factor, 1.0"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "quant_method is 'fbgemm_fp8'; only"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
         "quantization_config.format is 'pack-quantized'; only 'float-quantized' is supported"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_one_clear_error_for_a_fault_of_the_text_model(change, said, nested):
    data = released(MAVERICK | change) if nested else MAVERICK | change
    line = the_fault(data, file="a/config.json")
    assert said in line and line.startswith("a/config.json: text_config." if nested else "a/config.json: ")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; only 'gelu' is supported"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "only 'gelu' is supported"),
        ({"num_channels": 1}, "num_channels is 1; only 3 is supported"),
        ({"multi_modal_projector_bias": True}, "multi_modal_projector_bias is True; only False"),
        ({"projector_dropout": 0.1}, "projector_dropout is 0.1; only 0.0"),
        ({"num_layers": 2}, "num_layers is no key of Llama 4"),
        ({"pixel_shuffle_ratio": 0.3}, "pixel_shuffle_ratio is 0.3; allowed: 1 / n for a whole n"),
        ({"vision_output_dim": 7680}, "vision_output_dim is 7680; it must be projector_output_dim, 4096"),
        ({"projector_input_dim": 64}, "projector_output_dim is 4096; it must equal projector_input_dim, 64"),
        (
            {"intermediate_size": 64},
            "intermediate_size is 64; it must be hidden_size x (1 / pixel_shuffle_ratio)^2, 5632",
        ),
        ({"num_attention_heads": 3}, "hidden_size is 1408; it must be a multiple of 4 x num_attention_heads"),
        (
            {"image_size": 350},
            "image_size is 350; it must be a multiple of patch_size x (1 / pixel_shuffle_ratio), 14 x 2",
        ),
        ({"patch_size": 0}, "patch_size is 0; at least 1"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters.rope_type is 'linear'"),
    ],
)
def test_one_clear_error_for_a_fault_of_vision(change, said):
    line = the_fault(released(MAVERICK, vision_config=VISION | change))
    assert said in line and line.startswith("config.json: vision_config.")
    hf.config_from_json(released(MAVERICK, vision_config=VISION | change), vision=False)  # not looked at


@pytest.mark.parametrize(
    "change, said",
    [
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": 3}, "text_config is 3; it must be an object"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"model_type": "llava"}, "model_type is 'llava'; only 'llama4' is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"image_tokn_index": 3}, "image_tokn_index is no key of Llama 4; did you mean image_token_index"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
    ],
)
def test_one_clear_error_for_a_fault_above_both(change, said):
    assert said in the_fault(released(MAVERICK, **change))


def test_faults_of_every_level_come_at_once():
    data = released(MAVERICK | {"hidden_act": "relu"}, vision_config=VISION | {"hidden_act": "relu"}, colour="blue")
    assert [line.split(" ")[1] for line in faults(data)] == [
        "text_config.hidden_act",
        "vision_config.hidden_act",
        "colour",
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"floor_scale": 2.5}, "floor_scale is 2.5; whole only"),
        ({"vision": VisionConfig(norm_eps=1e-6)}, "norm_eps is 1e-06; transformers computes with 1e-05"),
        ({"vision": VisionConfig(mlp_hidden=8)}, "intermediate_size is 8"),
        ({"vision": VisionConfig(adapter_out=8)}, "projector_output_dim is 8; it must equal projector_input_dim, 4096"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(change, said):
    with pytest.raises(CheckpointError, match="does not fit the Hugging Face format") as error:
        hf.config_to_json(config_of(**change))
    assert said in str(error.value)
