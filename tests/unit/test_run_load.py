"""What a job may start from: runs, checkpoints, Hugging Face folders, with vision or without, however spelt."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from distill.config.errors import ConfigError
from distill.config.load import to_dict
from distill.config.schema import BaseSizes, Parametrization, PrecisionConfig, RopeScaling, VisionConfig
from distill.model import Transformer, hf
from distill.model.balance import degenerate_routers
from distill.model.parts import Parts
from distill.model.precision import numerics_of
from distill.run.models import load_model
from tests.unit.test_model_attention import config_of

VISION = VisionConfig(hidden_size=16, layers=1, heads=2, mlp_hidden=64, tile_size=8, patch_size=2, adapter_hidden=8,
                      adapter_out=8, image_token_id=63)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(config_of(vision=VISION))


@pytest.fixture
def folder(model, tmp_path):
    hf.save(model, tmp_path / "hf")
    return tmp_path / "hf"


def same(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_a_folder_with_vision_starts_models_with_and_without(model, folder):
    seeing = load_model(folder, "student", config_of(vision=VISION))
    assert seeing.vision_model is not None and same(seeing, model) and same(model, seeing)
    text = load_model(folder, "student", config_of())
    assert text.vision_model is None and same(text, model)
    assert load_model(folder, "student", None).vision_model is not None


def test_spelling_and_training_settings_are_no_architecture(folder):
    want = config_of(
        moe_step=0, moe_layers=[1, 3], nope_step=0, rope_layers=[True, True, True, False], bos_id=5, eos_ids=[7],
        pad_id=9, init_std=0.5, max_positions=64, parametrization=Parametrization.transfer,
        base=BaseSizes(hidden_size=8),
    )  # fmt: skip
    loaded = load_model(folder, "student", want)
    assert loaded.config == want


def test_no_chunks_are_no_chunks_in_either_spelling(tmp_path):
    whole = config_of(chunk_size=None, max_positions=64)
    torch.manual_seed(0)
    hf.save(Transformer(whole), tmp_path / "hf")
    # The file says a chunk of 64; the run has room for more, and its model has no borders.
    want = dataclasses.replace(whole, max_positions=128)
    loaded = load_model(tmp_path / "hf", "student", want)
    torch.manual_seed(0)
    fresh = Transformer(want)
    ids_BS = torch.randint(0, 64, (1, 100))
    assert torch.equal(loaded.logits(ids_BS), fresh.logits(ids_BS))
    with pytest.raises(ConfigError, match=r"student\.model\.chunk_size is 32; the model in .* has null"):
        load_model(tmp_path / "hf", "student", dataclasses.replace(whole, chunk_size=32))


def test_every_difference_is_named(folder):
    other = dataclasses.replace(VISION, tile_size=16)
    want = config_of(heads=2, moe_layers=[0], rope_scaling=RopeScaling(), vision=other)
    with pytest.raises(ConfigError) as error:
        load_model(folder, "teacher", want)
    scaling = "factor 16.0, low_freq_factor 1.0, high_freq_factor 1.0, original_positions 8192"
    assert sorted(error.value.problems) == [
        f"teacher.model.heads is 2; the model in {folder} has 4",
        f"teacher.model.moe_layers is [0]; the model in {folder} has [1, 3]",
        f"teacher.model.rope_scaling is {scaling}; the model in {folder} has null",
        f"teacher.model.vision.tile_size is 16; the model in {folder} has 8",
    ]


def test_a_width_that_the_precision_does_not_take_is_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    narrow = config_of(expert_hidden=24)
    hf.save(Transformer(narrow), tmp_path / "hf")
    monkeypatch.setattr(hf.Reader, "read", lambda *_: pytest.fail("a weight was read"))
    state = {"models": {"student": to_dict(narrow)}}
    opened = SimpleNamespace(engines=["student"], state=state, tensors=lambda *_: pytest.fail("weights were read"))
    parts = Parts.of(numerics_of(PrecisionConfig("fp8"), torch.device("cpu")))
    for folder, checkpoint in ((tmp_path / "hf", None), (tmp_path / "run", opened)):
        with pytest.raises(ConfigError) as error:
            load_model(folder, "student", parts=parts, opened=checkpoint)
        assert error.value.problems == [
            f"{folder}: the model's expert_hidden is 24; products of the run's precision take multiples of 16"
        ]


def test_vision_is_not_made_up(tmp_path):
    hf.save(Transformer(config_of()), tmp_path / "text")
    with pytest.raises(ConfigError, match=r"student\.model\.vision is .*; the model in .* has null"):
        load_model(tmp_path / "text", "student", config_of(vision=VISION))


# ---------------------------------------------------------------- routers


def zeroed(model, layers):
    for layer in layers:
        torch.nn.init.zeros_(model.layers[layer].feed_forward.router.weight)
    return model


@pytest.mark.parametrize("active", [1, 2])
def test_the_trap_equal_routers_send_all_tokens_to_the_same_experts(active):
    # What is refused below: every token meets the same experts, and the loss falls as if nothing were wrong.
    torch.manual_seed(0)
    model = zeroed(Transformer(config_of(active_experts=active, init_std=0.05)), [1, 3])
    ids_BS = torch.randint(0, 64, (4, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        logits_BSV = model.logits(ids_BS)
        loss = torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        zeroed(model, [1, 3])  # the tie itself, not what one step's gradient makes of it
        _, routing = model(ids_BS)
        assert (routing.counts_LE.count_nonzero(1) == active).all()
        assert routing.counts_LE.max() == ids_BS.numel()
    assert losses[-1] < losses[0] - 0.05
    assert degenerate_routers(model) == [1, 3]


def test_which_routers_cannot_tell_tokens_apart():
    torch.manual_seed(0)
    model = Transformer(config_of())
    assert degenerate_routers(model) == []
    row = torch.randn(1, 32)
    with torch.no_grad():
        model.layers[3].feed_forward.router.weight.copy_(row.expand(4, -1))  # equal, not zero
    assert degenerate_routers(model) == [3]
    model.routers[1].bias.fill_(0.5)  # equal as well
    assert degenerate_routers(model) == [3]
    model.routers[1].bias[2] = 0.6
    assert degenerate_routers(model) == []
    # Where every expert is taken there is nothing to choose.
    assert degenerate_routers(zeroed(Transformer(config_of(active_experts=4)), [1, 3])) == []
    assert degenerate_routers(zeroed(Transformer(config_of(experts=1)), [1, 3])) == []
    assert degenerate_routers(Transformer(config_of(moe_step=0))) == []
