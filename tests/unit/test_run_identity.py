"""A teacher's identity: what decides its weights changes it, and nothing else does."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from distill.config.checks import check
from distill.config.errors import CheckpointError
from distill.config.load import resolve, to_dict
from distill.config.schema import ModelConfig, RunConfig
from distill.engine.dist import Dist
from distill.model import Transformer, hf
from distill.run import build, identity
from distill.run.identity import Lineage
from distill.run.models import first_model
from distill.run.run import Run
from tests.cli import TINY, write_corpus
from tests.unit.test_model_attention import config_of

ALONE = Dist(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(overrides...) -> base of the teacher of such a run, which is started and not trained."""
    home = tmp_path_factory.mktemp("identity")
    main, other = write_corpus(home / "main"), home / "other"
    other.mkdir()
    (other / "corpus.jsonl").write_text((home / "main" / "corpus.jsonl").read_text())
    usual = to_dict(resolve(["job=teacher", *TINY, main, f"data.dir={home}/data", "teacher.train.steps=12"]))
    count = iter(range(10**6))

    def of(*overrides):
        wanted = OmegaConf.merge(OmegaConf.structured(RunConfig), usual, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(wanted)
        assert not list(check(config))
        with Run(config, home / f"run-{next(count)}", ALONE) as run:
            build.prepare(run)
            model, source = first_model(run, "teacher")
            stream = build.own_stream(run)
            return build.lineage_of(run, model, source is not None, build.steps_of(run, "teacher"), stream).base

    of.home, of.usual = home, usual
    return of


SAME = [
    ["teacher.train.keep_checkpoints=5", "teacher.train.checkpoint_every=4"],
    ["teacher.train.log_every=1", "teacher.train.eval_every=3", "teacher.train.eval_samples=2"],
    ["teacher.train.accumulation=2", "teacher.train.head_chunk=8", "teacher.train.activation_checkpointing=true"],
    ["teacher.capture=false"],
    ["engine.zero=1", "engine.threads=2", "engine.timeout=9"],
    ["tracking.console=lines", "tracking.report=false", "evaluate.batch=3", "evaluate.samples=2"],
    ["cache.codec.name=topk", "cache.codec.k=3", "cache.shard_samples=2", "cache.queue=1"],
    ["data.dir={home}/elsewhere"],
    ["data.corpora.main.files=[{home}/other/../other/corpus.jsonl]"],
    ["data.corpora.main.weight=7"],
    ["teacher.model.moe_step=0", "teacher.model.moe_layers=[0,1]"],
    ["teacher.model.bos_id=3", "teacher.model.base.hidden_size=8"],
    ["student.model.layers=1", "student.optim.lr=1", "student.train.steps=5"],
    ["teacher.optim.lr=0.001", "teacher.optim.clip=1"],
]
OTHER = [
    ["seed=1"],
    ["teacher.model.init_std=0.5"],
    ["teacher.model.layers=1", "teacher.model.nope_step=0"],
    ["teacher.model.rope_theta=100"],
    ["teacher.model.parametrization=transfer"],
    ["teacher.model.parametrization=transfer", "teacher.model.base.hidden_size=8"],
    ["teacher.optim.lr=0.002"],
    ["teacher.optim.schedule=cosine"],
    ["teacher.optim.weight_decay.head=0.2"],
    ["teacher.optim.clip=2"],
    ["teacher.train.steps=13"],
    ["teacher.train.batch=2"],
    ["teacher.train.balance_rate=0"],
    ["teacher.train.balance_loss=0.1"],
    ["teacher.train.z_loss=0.1"],
    ["precision.name=bf16"],
    ["precision.name=bf16", "precision.native=true"],
    ["data.seed=1"],
    ["data.sample_tokens=8"],
    ["data.corpora.main.held_out=0.3"],
    ["data.tokenizer.vocab_size=266"],
    ["data.tokenizer.eos=null"],
]


@pytest.mark.parametrize("change", SAME, ids=" ".join)
def test_what_decides_no_weight_changes_nothing(base, change):
    assert base(*(text.format(home=base.home) for text in change)) == base()


def test_whatever_decides_weights_makes_another_teacher(base):
    found = [base(), *(base(*change) for change in OTHER)]
    assert len(set(found)) == len(found)
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in found)


def test_the_job_and_the_spelling_of_its_length_do_not_count(base):
    assert base("job=codistill") == base()
    in_epochs = base("teacher.train.steps=null", "teacher.train.epochs=1", f"data.dir={base.home}/epochs")
    steps = json.loads(next(base.home.glob("epochs/main-*/train.json")).read_text())["samples"] // 4
    assert in_epochs == base(f"teacher.train.steps={steps}") != base()


def test_a_mixture_counts_by_its_shares(base):
    extra = [f"data.corpora.extra.files=[{base.home}/other/corpus.jsonl]", "data.corpora.extra.source=files"]
    thrice = ["data.corpora.extra.weight=3", "data.corpora.main.weight=1"]
    same = ["data.corpora.extra.weight=1.5", "data.corpora.main.weight=0.5"]
    assert base(*extra, *thrice) == base(*extra, *same)
    assert len({base(*extra, *thrice), base(*extra, "data.corpora.extra.weight=2"), base()}) == 3


def test_loaded_weights_count_by_what_they_are(base, tmp_path):
    config = OmegaConf.merge(OmegaConf.structured(ModelConfig), base.usual["teacher"]["model"])
    torch.manual_seed(0)
    model = Transformer(OmegaConf.to_object(config))
    hf.save(model, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with torch.no_grad():
        model.embed.weight.view(-1)[12345 % model.embed.weight.numel()] += 1e-3
    hf.save(model, tmp_path / "c")
    one = base(f"init_from={tmp_path}/a")
    # Nothing is drawn: neither seed nor width of the draw counts, nor which of two keys names the folder.
    assert one == base(f"teacher.init_from={tmp_path}/b/../b", "seed=3", "teacher.model.init_std=0.5")
    assert len({one, base(f"init_from={tmp_path}/c"), base()}) == 3


def test_weights_are_told_apart_by_any_element_and_not_by_how_they_are_stored(tmp_path):
    torch.manual_seed(0)
    model = Transformer(config_of())
    own = identity.of_weights(model)
    hf.save(model, tmp_path / "hf")
    again = hf.load(tmp_path / "hf")
    assert identity.of_weights(again) == own and identity.of_weights(model.to(torch.float64)) == own
    for parameter in again.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[len(flat) // 3] += 1e-3
            assert identity.of_weights(again) != own
            flat[len(flat) // 3] = model.get_parameter(_name(again, parameter)).view(-1)[len(flat) // 3]
    assert identity.of_weights(again) == own
    again.routers[0].bias[0] += 1.0
    assert identity.of_weights(again) != own


def _name(model, wanted):
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


def test_a_checkpoint_names_its_teacher():
    teacher = Lineage("0123456789abcdef", ["c"], 64)
    state = {"roles": {"teacher": {"step": 7}, "student": {"step": 5}}}
    state[identity.LINEAGES] = {"teacher": dataclasses.asdict(teacher)}
    found = SimpleNamespace(state=json.loads(json.dumps(state)))
    assert identity.stored(found, "teacher") == (teacher, 7) and identity.stored(found, "student") is None


def test_an_exported_teacher_is_known_by_its_files(tmp_path):
    teacher = Lineage("0123456789abcdef", ["c"], 64)
    hf.save(Transformer(config_of()), tmp_path / "hf", also=lambda new: identity.write_exported(new, teacher, 12))
    assert identity.exported(tmp_path / "hf") == (teacher, 12)
    assert teacher.at(12) != teacher.at(13) and teacher.at(12).startswith(teacher.base)
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    assert identity.exported(tmp_path / "moved") == (teacher, 12)
    file = tmp_path / "moved" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert identity.exported(tmp_path / "moved") is None
    (tmp_path / "moved" / identity.EXPORTED).write_text("[]")
    with pytest.raises(CheckpointError, match=r"codistill\.json: cannot be read.*remove it"):
        identity.exported(tmp_path / "moved")
    (tmp_path / "moved" / identity.EXPORTED).unlink()
    assert identity.exported(tmp_path / "moved") is None
