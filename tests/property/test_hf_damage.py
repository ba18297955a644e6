"""Whatever stands in a config or a header: a sound checkpoint, or one CheckpointError; never another exception."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.errors import CheckpointError
from distill.model import Transformer, hf
from tests.unit.test_model_attention import config_of
from tests.unit.test_model_hf_config import SCOUT, VISION, released

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**3), 10**3) | st.sampled_from([10**400, -(10**20), 1e308, -0.0])
    | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
ROPE = ["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"]
INNER = VALUES | st.dictionaries(st.sampled_from(ROPE), VALUES, max_size=6)
SMALL = {"num_hidden_layers": 4, "no_rope_layers": [], "moe_layers": None}


@settings(max_examples=300)
@given(st.data())
def test_any_value_of_any_key(data):
    text, vision = SCOUT | SMALL, dict(VISION)
    keys = [*text, "rope_parameters", "layer_types", "quantization_config", *(f"vision.{key}" for key in VISION)]
    for key in data.draw(st.lists(st.sampled_from([*keys, "vision.rope_parameters"]), min_size=1, max_size=3)):
        place = vision if key.startswith("vision.") else text
        place[key.removeprefix("vision.")] = data.draw(INNER, key)
    config = released(text, vision_config=vision)
    config |= data.draw(st.dictionaries(st.sampled_from([*config, "colour"]), VALUES, max_size=1), "above")
    for vision in (True, False):
        try:
            found = hf.config_from_json(config, vision=vision)
        except CheckpointError:
            continue
        assert hf.config_from_json(json.loads(json.dumps(config)), vision=vision) == found


@pytest.fixture(scope="module")
def raw():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Transformer(config_of(layers=2)), Path(folder) / "hf")
        yield {path.name: path.read_bytes() for path in (Path(folder) / "hf").iterdir()}


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_of_a_header(data, raw):
    whole = bytearray(raw["model.safetensors"])
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, length - 1))
        whole[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b"9", b"0", b"-"])
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (raw | {"model.safetensors": bytes(whole)}).items():
            Path(folder, name).write_bytes(content)
        try:
            model = hf.load(folder)
        except CheckpointError:
            return
        assert bytes(whole[length:]) == raw["model.safetensors"][length:]
        assert all(torch.isfinite(p).all() for p in model.parameters())
