"""job=export: from a run to a folder that transformers loads, tokenizes and generates with, and back into a run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from tokenizers import AddedToken

from distill.config import owner
from distill.config.errors import CheckpointError, ConfigError
from distill.config.load import CONF, load
from distill.config.schema import ImageConfig, ModelConfig, Role, TokenizerConfig, VisionConfig, WeightDtype
from distill.data.tokenizer import load_tokenizer, train_tokenizer
from distill.engine.dist import Dist
from distill.model import Transformer, hf
from distill.run import export
from distill.run.models import load_model
from tests.cli import TINY, run, write_corpus
from tests.closeness import worst

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SIZES = dict(vocab_size=272, hidden_size=16, heads=2, kv_heads=1, head_dim=8, expert_hidden=16, dense_hidden=16)
VISION = VisionConfig(hidden_size=16, layers=1, heads=2, mlp_hidden=64, tile_size=8, patch_size=2, adapter_hidden=8,
                      adapter_out=8, image_token_id=271)  # fmt: skip


def released(folder, **changes):
    """A folder with vision, as it could be downloaded, of the sizes that TINY trains."""
    torch.manual_seed(3)
    config = ModelConfig(**SIZES, layers=2, experts=4, chunk_size=8, nope_step=2, qk_norm=False, rope_theta=1e4)
    config = dataclasses.replace(config, floor_scale=32.0, max_positions=4096, vision=VISION, init_std=0.1, **changes)
    model = Transformer(config)
    hf.save(model, folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A codistilled run whose models both start from a folder with vision; its corpus is gone afterwards."""
    root = tmp_path_factory.mktemp("export")
    corpus = write_corpus(root / "corpus")
    released(root / "released")
    run(
        "experiment=smoke", "tracking=off", "~codistill.arms.constant", *TINY, corpus, "job=codistill",
        "teacher.train.steps=8", "student.train.steps=8", "codistill.rounds=2", "model@teacher.model=tiny_maverick",
        *(f"{role}.init_from={root}/released" for role in ("teacher", "student")),
        "student.train.balance_rate=0.05", f"hydra.run.dir={root}/run",
    )  # fmt: skip
    shutil.move(root / "corpus", root / "gone")
    return root


def exported(source, target, **settings):
    """Exports in this process; returns the summary."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load(
            compose(
                "config", overrides=["job=export", f"init_from={source}", f"export.dir={target}", "evaluate.samples=16"]
            )
        )
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, **settings))
    folder = Path(f"{target}-run")
    export.export(config, folder, Dist(0, 1, torch.device("cpu")))
    return json.loads((folder / "summary.json").read_text())


def test_a_run_started_from_a_folder_with_vision(made):
    tuned = load_model(made / "run", "student", None)
    before = hf.load(made / "released", vision=False)
    assert tuned.vision_model is None
    for (name, old), new in zip(before.named_parameters(), tuned.parameters()):
        assert not torch.equal(old, new), name
        assert torch.cosine_similarity(old.flatten(), new.flatten(), dim=0) > 0.7, name


def test_a_router_bias_is_not_dropped_in_silence(made, tmp_path):
    with pytest.raises(CheckpointError, match=r"export\.drop_router_bias is false; the router bias of layers"):
        exported(made / "run", tmp_path / "hf")
    owner.release_all()  # as the command does at its end
    assert list(tmp_path.iterdir()) == []


def test_transformers_loads_tokenizes_and_generates(made, tmp_path, capsys):
    summary = exported(made / "run", tmp_path / "hf", drop_router_bias=True, max_shard_gb=3e-5)
    model = load_model(made / "run", "student", None)
    biased = summary["loss_with_bias"]
    assert biased == pytest.approx(json.loads((made / "run" / "summary.json").read_text())["distilled_loss"], rel=1e-6)
    for router in model.routers:
        assert router.bias.any()
        router.bias.zero_()
    assert summary["loss_without_bias"] != biased
    assert f"held-out loss {biased:.4f} -> {summary['loss_without_bias']:.4f}" in capsys.readouterr().out
    assert len(summary["files"]) > 1 and summary["parameters"] == sum(p.numel() for p in model.parameters())

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(theirs, transformers.Llama4ForCausalLM) and theirs.dtype == torch.float32
    ids_BS = torch.randint(0, 270, (2, 20))
    with torch.no_grad():
        assert worst(theirs(ids_BS).logits, model.logits(ids_BS)) < 1e-5

    own = load_tokenizer(TokenizerConfig(), made / "run" / "tokenizer.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        own.bos_id,
        own.eos_id,
        own.eos_id,
    )
    assert tokenizer.model_max_length == model.config.max_positions
    texts = ["def f(x):\n    return x", "y"]
    assert [tokenizer(text).input_ids for text in texts] == [ids for ids, _ in own.encode_batch(texts)]
    assert tokenizer.decode(tokenizer(texts[0]).input_ids) == texts[0]

    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (0, 1, 1)
    assert theirs.generation_config.eos_token_id == 1 and theirs.generation_config.bos_token_id == 0
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.attention_mask[1].tolist() == [0] * (batch.input_ids.shape[1] - 1) + [1]  # padded before the text
    out = theirs.generate(**batch, max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= batch.input_ids.shape[1] + 5
    alone = theirs.generate(**tokenizer(texts[:1], return_tensors="pt"), max_new_tokens=1, do_sample=False)
    assert alone[0, -1] == model.logits(tokenizer(texts[:1], return_tensors="pt").input_ids)[0, -1].argmax()


def test_either_model_of_a_run_and_a_checkpoint_alone(made, tmp_path):
    exported(made / "run", tmp_path / "teacher", role=Role.teacher, drop_router_bias=True, dtype=WeightDtype.bf16)
    teacher = load_model(made / "run", "teacher", None)
    found = hf.load(tmp_path / "teacher")
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(teacher.parameters(), found.parameters()))
    with safe_open(tmp_path / "teacher" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"
    # A checkpoint within the run, and an arm, know their run's tokenizer and text.
    (step,) = (made / "run" / "checkpoints").iterdir()
    one = exported(step, tmp_path / "step", drop_router_bias=True)
    arm = exported(made / "run" / "arms" / "hard", tmp_path / "arm", drop_router_bias=True)
    assert one["loss_with_bias"] != arm["loss_with_bias"]
    # One that was carried off knows none.
    shutil.copytree(step, tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"neither a run nor a tokenizer\.json is there.*data\.tokenizer\.file"):
        exported(tmp_path / "alone", tmp_path / "x", drop_router_bias=True)


def test_the_command_line_exports_a_folder_again(made, tmp_path):
    exported(made / "run", tmp_path / "one", drop_router_bias=True)
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages }}")
    done = run(
        "job=export", f"init_from={tmp_path}/one", f"export.dir={tmp_path}/two", "export.dtype=bf16",
        f"hydra.run.dir={tmp_path}/r",
    )  # fmt: skip
    assert "in bf16 to" in done.stdout
    one, two = hf.load(tmp_path / "one"), hf.load(tmp_path / "two")
    assert one.config == two.config
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(one.parameters(), two.parameters()))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["loss_with_bias"] is None and summary["dtype"] == "bf16"


def test_a_model_with_vision_comes_with_its_processor(tmp_path):
    plain = train_tokenizer(TokenizerConfig(vocab_size=264), ["images"])
    plain._library.add_special_tokens([AddedToken("<|patch|>", special=True)])
    (tmp_path / "tokenizer.json").write_text(plain._library.to_str())
    tokenizer = load_tokenizer(TokenizerConfig(), tmp_path / "tokenizer.json")
    model = released(tmp_path / "released")
    config = export._with_ids_of(tokenizer, dataclasses.replace(model.config, eos_ids=[9, 1], pad_id=200018))
    assert (config.bos_id, config.eos_ids, config.pad_id) == (0, [9, 1], 1)  # further ends of a turn are kept
    config = export._with_ids_of(tokenizer, dataclasses.replace(model.config, eos_ids=[200001], pad_id=5))
    assert (config.bos_id, config.eos_ids, config.pad_id) == (0, [1], 5)
    export._write_tokenizer(tokenizer, config, ImageConfig(max_tiles=4), tmp_path)
    pixels = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert pixels["size"] == {"height": 8, "width": 8} and pixels["max_patches"] == 4
    assert pixels["image_mean"] == pixels["image_std"] == [0.5] * 3
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    # The processor counts tokens of a tile from these two.
    assert (8 // settings["patch_size"]) ** 2 * settings["pixel_shuffle_ratio"] ** 2 == VISION.tile_tokens


def test_routers_that_cannot_tell_tokens_apart_are_not_trained(made, tmp_path):
    model = released(tmp_path / "released")
    torch.nn.init.zeros_(model.layers[1].feed_forward.router.weight)
    hf.save(model, tmp_path / "zero")
    done = run(
        *TINY, f"data.corpora.main.files=[{made}/gone/corpus.jsonl]", "job=student", "student.cached=false",
        "student.train.steps=2", f"init_from={tmp_path}/zero", f"hydra.run.dir={tmp_path}/run", code=2,
    )  # fmt: skip
    assert f"student.init_from is {tmp_path}/zero; the routers of layers [1] have equal rows" in done.stderr
