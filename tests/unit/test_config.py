import dataclasses
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from distill.config.errors import ConfigError
from distill.config.load import CONF, load, precheck, resolve, to_dict
from distill.config.schema import Freeze
from distill.config.spelling import spelt
from tests.cli import PATIENCE, environment


def problems(*arguments):
    with pytest.raises(ConfigError) as caught:
        precheck(list(arguments))
    return caught.value.problems


def loaded(*arguments):
    precheck(list(arguments))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("config", overrides=spelt(list(arguments))))


def test_export_needs_a_model_and_a_new_folder(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "empty").mkdir()
    assert problems("job=export", "export.max_shard_gb=0") == [
        "init_from is null; job=export needs the run, checkpoint or folder of the model to export",
        "export.dir is null; job=export needs the folder to write",
        "export.max_shard_gb is 0.0; it must be positive",
    ]
    model = f"init_from={tmp_path}/used"
    for used in ("used", "used/file"):
        (line,) = problems("job=export", model, f"export.dir={tmp_path}/{used}")
        assert line == f"export.dir is {tmp_path}/{used}; it exists and is not empty: choose a new folder"
    for new in ("empty", "nowhere"):
        run = loaded("job=export", model, f"export.dir={tmp_path}/{new}", "export.role=teacher", "export.dtype=bf16")
        assert run.export.role.value == "teacher" and run.export.dtype.value == "bf16"


def test_a_backfill_needs_one_frozen_teacher(tmp_path):
    (line,) = problems("job=backfill")
    assert line.startswith("init_from is null; job=backfill takes one frozen teacher")
    text = "\n".join(
        problems(
            "job=backfill",
            "teacher.from=hf:/nowhere",
            f"init_from={tmp_path}",
            "cache.dirs.mian=/x",
            "backfill.corpora=[main,other,main]",
            "backfill.batch=0",
            "backfill.unit_samples=0",
            "backfill.head_chunk=0",
            "backfill.max_samples=0",
            "backfill.min_lag=0",
            "backfill.max_tflops=-1",
        )
    )
    for part in (
        f"teacher.from is hf:/nowhere and init_from is {tmp_path}; job=backfill takes one frozen teacher",
        "teacher.from is /nowhere; no such folder",
        "cache.dirs has mian; allowed: main",
        "backfill.corpora has other; allowed: main",
        "backfill.corpora is ['main', 'other', 'main']; each once",
        "backfill.batch is 0; at least 1",
        "backfill.unit_samples is 0; at least 1",
        "backfill.head_chunk is 0; at least 1",
        "backfill.max_samples is 0; at least 1",
        "backfill.min_lag is 0.0; it must be positive",
        "backfill.max_tflops is -1.0; it must be positive",
    ):
        assert part in text, (part, text)
    vision = ["vision@teacher.model.vision=tiny", "data.corpora.main.image_key=image", "data=files"]
    (line,) = problems("job=backfill", f"teacher.from=hf:{tmp_path}", "data.corpora.main.files=[x]", *vision)
    assert "data.corpora have images" in line
    # What the run's models would not take is no concern of a backfill: it takes its teacher as it was saved.
    run = loaded(
        "job=backfill", f"teacher.from=hf:{tmp_path}", "data.sample_tokens=100000", "data.tokenizer.vocab_size=5000",
        "precision=bf16", "cache.dirs={main:/x/y}",
    )  # fmt: skip
    assert run.teacher.from_ == f"hf:{tmp_path}" and run.cache.dirs == {"main": "/x/y"}


def test_a_frozen_teacher_and_an_order_of_its_own_stay_where_they_belong(tmp_path):
    assert problems("job=teacher", f"teacher.from=hf:{tmp_path}") == [
        f"teacher.from is hf:{tmp_path} with job=teacher; only job=backfill labels with a frozen teacher, and "
        "job=student with student.targets=live"
    ]
    (line,) = problems("job=codistill", "student.replay.order=own")
    assert line.startswith("student.replay.order is own with job=codistill")
    (line,) = problems("job=student", "student.replay.order=own", "cache.follow=true", "cache.dir=/x")
    assert line.startswith("student.replay.order is own with cache.follow")
    assert loaded("job=student", "cache.dirs.main=/x").cache.dirs == {"main": "/x"}


def test_all_faults_of_a_command_line_come_at_once_each_with_key_value_and_what_is_allowed():
    found = problems(
        "job=techer",
        "student.optim.lrr=3",
        "+foo=1",
        "++loss.alhpa=0.3",
        "cache=mysterious",
        "experiment=nope",
        "student.optim.lr=abc",
        "teacher.train.batch=7.5",
        "cache.codec.name=zip",
        "bad==",
        "data.corpora.main.sorce=files",
        "+student.model.rope_scaling.factr=3",
        "precision=fp9",
        "~seed",
    )
    text = "\n".join(found)
    for part in (
        "job is techer; allowed: teacher, student, codistill, backfill, evaluate, export",
        "student.optim.lrr is no key; allowed there: lr",
        "foo is no key; allowed: backfill,",
        "loss is no key",
        "cache is mysterious; allowed: multinomial, systematic, threshold, topk",
        "experiment is nope; allowed: demo, digits, needle, smoke",
        "student.optim.lr is abc; Value 'abc' of type 'str' could not be converted to Float",
        "teacher.train.batch is 7.5; Value '7.5' of type 'float' could not be converted to Integer",
        "cache.codec.name is zip; allowed: systematic, threshold, multinomial, topk",
        "'bad==' is not an override",
        "data.corpora.main.sorce is no key; allowed there: source",
        "student.model.rope_scaling.factr is no key; allowed there: factor",
        "precision is fp9",
    ):
        assert part in text, (part, text)
    assert len(found) == 14


def test_rules_between_fields_come_at_once_with_both_values():
    text = "\n".join(
        problems(
            "job=codistill",
            "teacher.model.vocab_size=512",
            "student.model.vocab_size=480",
            "student.model.heads=3",
            "teacher.train.batch=6",
            "teacher.train.accumulation=4",
            "student.optim.betas=[0.9]",
            "data.tokenizer.vocab_size=600",
            "cache.follow=true",
            "data.corpora.main.held_out=0",
            "student.train.checkpoint_every=25",
            "init_from=/nowhere",
            "teacher.model.base.layers=0",
            "student.model.parametrization=transfer",
            "student.optim.optimizer=sgd",
        )
    )
    for part in (
        "student.model.vocab_size is 480 and teacher.model.vocab_size is 512",
        "student.model.heads is 3; it must be a multiple of kv_heads, 2",
        "teacher.train.batch is 6; it must be a multiple of accumulation, 4",
        "student.optim.betas is [0.9]; two numbers",
        "data.tokenizer.vocab_size is 600; teacher.model.vocab_size allows 512",
        "cache.follow is true with job=codistill",
        "init_from is /nowhere; no such folder",
        "job=codistill trains two models",
        "data.corpora.*.held_out is 0 for all",
        "student.train.checkpoint_every is 25; it must be a multiple of log_every, 10",
        "teacher.model.base.layers is 0; at least 1",
        "student.optim.optimizer is sgd with student.model.parametrization transfer; its rules are those of adamw",
    ):
        assert part in text, (part, text)


def test_a_missing_value_is_named():
    assert problems() == ["job has no value; set job=..."]


def test_every_value_of_a_sweep_is_checked():
    assert problems("--multirun", "job=teacher", "seed=1,x", "student.optim.lr=0.1,-1") == [
        "seed is x; Value 'x' of type 'str' could not be converted to Integer",
        "student.optim.lr is -1.0; it must be positive",
    ]


@pytest.mark.parametrize("model", ["behemoth", "maverick", "scout", "tiny_behemoth", "tiny_maverick", "tiny_scout"])
def test_every_model_preset_loads(model):
    run = loaded("job=teacher", f"model@teacher.model={model}", "data.tokenizer.vocab_size=300")
    assert run.teacher.model.layers > 0 and run.teacher.model.vocab_size > 0


@pytest.mark.parametrize("vision", ["llama4", "tiny"])
def test_every_vision_preset_loads_into_either_model(vision):
    run = loaded(
        "job=codistill",
        f"vision@teacher.model.vision={vision}",
        f"vision@student.model.vision={vision}",
        "student.model.vision.layers=3",
        *(f"{role}.model.vocab_size=202048" for role in ("teacher", "student")),
        "student.train.freeze=vision",
    )
    assert run.teacher.model.vision.layers == {"llama4": 34, "tiny": 2}[vision]
    assert run.student.model.vision == dataclasses.replace(run.teacher.model.vision, layers=3)
    assert (run.student.train.freeze, run.teacher.train.freeze) == (Freeze.vision, Freeze.none)


def test_vision_that_cannot_be_built_is_refused():
    text = "\n".join(
        problems(
            "job=teacher",
            "vision@teacher.model.vision=tiny",
            "teacher.model.vision.heads=5",
            "teacher.model.vision.tile_size=60",
            "teacher.model.vision.mlp_hidden=128",
            "teacher.model.vision.adapter_out=64",
            "teacher.model.vision.image_token_id=512",
            "teacher.model.vision.norm_eps=0",
        )
    )
    for part in (
        "teacher.model.vision.hidden_size is 64; it must be a multiple of 4 x heads, 20",
        "teacher.model.vision.tile_size is 60; it must be a multiple of patch_size x shuffle, 14 x 2",
        "teacher.model.vision.mlp_hidden is 128; it must be hidden_size x shuffle^2, 256",
        "teacher.model.vision.adapter_out is 64; it must equal adapter_hidden, 128",
        "teacher.model.vision.image_token_id is 512; the model's vocab_size allows 0 to 511",
        "teacher.model.vision.norm_eps is 0.0; it must be positive",
    ):
        assert part in text, (part, text)
    assert problems("job=teacher", "vision@teacher.model.vision=tiny", "teacher.model.vision.shuffle=0") == [
        "teacher.model.vision.shuffle is 0; at least 1"
    ]


def test_a_misspelt_vision_and_keys_of_what_is_null_are_named():
    assert problems("job=teacher", "vision@teacher.model.vision=tinny") == ["vision is tinny; allowed: llama4, tiny"]
    assert problems(
        "job=teacher", "teacher.model.vision.layers=3", "student.model.rope_scaling.factor=2", "student.optim.lr=-1"
    ) == [
        "teacher.model.vision.layers is 3; teacher.model.vision is null and has no keys to set",
        "student.model.rope_scaling.factor is 2; student.model.rope_scaling is null and has no keys to set",
        "student.optim.lr is -1.0; it must be positive",
    ]
    assert problems("job=teacher", "student.train.freeze=text") == [
        "student.train.freeze is text and student.model.vision is null; only a model with vision has a half to freeze"
    ]
    assert problems("job=teacher", "student.train.freeze=head") == [
        "student.train.freeze is head; Invalid value 'head', expected one of [none, vision, text]"
    ]


@pytest.mark.parametrize("experiment", ["smoke", "demo", "digits"])
@pytest.mark.parametrize("job", ["teacher", "codistill"])
def test_every_experiment_loads_and_prints(experiment, job):
    run = loaded(f"job={job}", f"experiment={experiment}", "seed=7")
    assert run.job == job and run.data.seed == 7
    assert to_dict(run)["job"] == job


def test_the_command_line_tells_faults_without_traceback_or_torch_and_exits_with_2():
    script = (
        "import sys; from distill.__main__ import main; code = main(); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "job=teacher", "student.optim.lrr=1", "seed=x"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "error", "False"], lines


def test_needles_that_cannot_be_made_or_tried_are_named_together():
    text = "\n".join(
        problems(
            "experiment=needle",
            "data.corpora.main.max_documents=null",
            "data.corpora.main.needle.shortest=11",
            "data.corpora.main.needle.longest=10",
            "data.corpora.main.needle.facts=53",
            "data.corpora.main.files=[a.txt]",
            "evaluate.trained_tokens=0",
            "evaluate.needle.lengths=[100000]",
            "evaluate.needle.depths=[1.5]",
            "evaluate.needle.trials=0",
            "evaluate.needle.facts=0",
        )
    )
    for part in (
        "data.corpora.main.max_documents is null; source=needle makes so many documents",
        "data.corpora.main.needle.shortest is 11; at least 12",
        "data.corpora.main.needle.longest is 10; at least 12",
        "data.corpora.main.needle.facts is 53; allowed: 1 to 50",
        "data.corpora.main.files is ['a.txt']; source=needle takes none",
        "evaluate.trained_tokens is 0; at least 1",
        "evaluate.needle.lengths has 100000; the model's max_positions is 4096",
        "evaluate.needle.depths is 1.5; allowed: 0 to 1",
        "evaluate.needle.trials is 0; at least 1",
        "evaluate.needle.facts is 0; allowed: 1 to 50",
    ):
        assert part in text, (part, text)
    assert problems("experiment=needle", "data.corpora.main.needle.longest=20") == [
        "data.corpora.main.needle.longest is 20; at least 24"
    ]


def test_no_attribute_of_a_configuration_can_be_set_or_deleted():
    run = resolve(["job=teacher", "vision@teacher.model.vision=tiny"])
    parts = [run]
    for part in parts:
        for name in vars(part):
            value = getattr(part, name)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, name, value)
            with pytest.raises(dataclasses.FrozenInstanceError):
                delattr(part, name)
            below = value.values() if isinstance(value, dict) else [value]
            parts += [each for each in below if dataclasses.is_dataclass(each)]
    assert len(parts) > 25


def test_fp8_refuses_widths_and_teachers_by_name(tmp_path):
    narrow = ["teacher.model.hidden_size=72", "teacher.model.dense_hidden=24", "student.model.expert_hidden=24",
              "student.model.kv_heads=1", "student.model.head_dim=24", "student.model.heads=2"]  # fmt: skip
    found = problems("job=codistill", "precision=fp8", *narrow)
    take = "products of precision fp8 take multiples of 16"
    assert found == [
        f"teacher.model.hidden_size is 72; {take}",  # the teacher has no dense layer
        f"student.model.expert_hidden is 24; {take}",
        f"student.model.kv_heads is 1, 1 x 24 with head_dim; {take}",
    ]
    assert len(problems("job=teacher", "precision=fp8", *narrow)) == 1
    loaded("job=codistill", "precision=bf16", *narrow)
    fp8 = ["precision=fp8", "precision.recipe=tensor", "precision.grad_weight=fp8"]
    config = loaded("job=codistill", *fp8).precision
    assert (config.recipe.value, config.grad_weight.value) == ("tensor", "fp8")
    (line,) = problems("job=teacher", "precision=bf16", "precision.recipe=tensor")
    assert "of the precisions only fp8 reads it" in line
    (line,) = problems("job=teacher", "precision=fp8", "precision.recipe=blockwise")
    assert "rowwise" in line and "tensor" in line
    (line,) = problems("job=backfill", "precision=fp8", f"teacher.from=hf:{tmp_path}")
    assert line.startswith(f"precision.name is fp8 with teacher.from hf:{tmp_path}; only the project's own models")
    live = ["job=student", "student.targets=live"]
    (line,) = problems(*live, "precision=fp8", f"teacher.from={tmp_path}")
    assert line.startswith(f"precision.name is fp8 with teacher.from {tmp_path}; a frozen teacher's targets")
    (line,) = problems(*live, "precision=fp8", f"teacher.from=hf:{tmp_path}")
    assert "only the project's own models" in line
    loaded("job=backfill", "precision=fp8", f"init_from={tmp_path}")
