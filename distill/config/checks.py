"""Rules between fields of the schema; the range of a field is part of its type.

A function of rules yields a sentence for each one that is broken: key, value, what is allowed.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.config import soft_losses
from distill.config.model import model_rules, vision_rules, width_rules
from distill.config.ranges import out_of_range
from distill.config.registry import CODECS, FACTORS, JOBS, PRECISIONS
from distill.config.schema import (
    IMAGE_TOKENS,
    CodecConfig,
    CorpusConfig,
    Freeze,
    ImageConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    Parametrization,
    PrecisionConfig,
    ReplayOrder,
    RunConfig,
    Schedule,
    Source,
    StudentConfig,
    Targets,
    TeacherConfig,
    VisionConfig,
    WeightingConfig,
)
from distill.config.sentences import key_of
from distill.config.values import shown


def check(run: RunConfig) -> Iterator[str]:
    """Every broken rule and range of a complete configuration."""
    out = list(out_of_range(run))
    keys = {*map(key_of, out)}
    yield from (problem for problem in _rules(run) if key_of(problem) not in keys)
    yield from out


def _rules(run: RunConfig) -> Iterator[str]:
    length = 1 if run.job == "backfill" else run.data.sample_tokens  # neither model is part of a backfill
    yield from _model("teacher.model", run.teacher.model, length)
    yield from _model("student.model", run.student.model, length)
    yield from _role("teacher", run.teacher)
    yield from _role("student", run.student)
    yield from _weighting("student.weighting", run.student.weighting)
    yield from soft_losses.option_problems(run.student)
    for name, arm in run.codistill.arms.items():
        yield from _weighting(f"codistill.arms.{name}.weighting", arm.weighting)
    yield from _folder_names("codistill.arms", run.codistill.arms)
    yield from _folder_names("data.corpora", run.data.corpora)
    yield from _data(run)
    yield from _cache(run)
    yield from _evaluation(run)
    yield from _sources(run)
    yield from _precision(run.precision)
    yield from _fp8(run)
    if run.job in JOBS.names:
        yield from JOBS[run.job].problems(run)


# ---------------------------------------------------------------- of one job each


_TAKES_ITS_STREAM = "a student that keeps pace with a teacher takes its stream"


def student_rules(run: RunConfig) -> Iterator[str]:
    live = run.student.targets is Targets.live
    yield from soft_losses.live_problems(run)
    if live:
        if run.teacher.from_ is None:
            yield "teacher.from is null; student.targets=live with job=student takes the frozen teacher of that folder"
        if run.cache.follow:
            yield "cache.follow is true with student.targets=live; no cache is read"
        yield from _foreign_images(run)
    if run.student.cached and not live and run.cache.dir is None:
        lacking = [name for name in run.data.corpora if name not in run.cache.dirs]
        if lacking:
            which = f" and cache.dirs has no {', '.join(lacking)}" if run.cache.dirs else ""
            yield (
                f"cache.dir is null{which}; job=student reads the cache of a teacher's run (or set "
                "student.cached=false)"
            )
    if run.cache.follow and run.student.replay.order is ReplayOrder.own:
        yield f"student.replay.order is own with cache.follow; {_TAKES_ITS_STREAM}"
    if run.cache.follow and run.student.replay.order is ReplayOrder.newest:
        yield "student.replay.order is newest with cache.follow; the newest target is known only when the teacher ends"


def codistill_rules(run: RunConfig) -> Iterator[str]:
    if run.init_from is not None:
        yield f"init_from is {run.init_from}; job=codistill trains two models: set teacher. or student.init_from"
    if run.teacher.model.vocab_size > run.student.model.vocab_size and run.student.targets is Targets.cache:
        yield (
            f"student.model.vocab_size is {run.student.model.vocab_size} and teacher.model.vocab_size is "
            f"{run.teacher.model.vocab_size}; soft targets fall on any id of the teacher: give the student as many, or "
            "more (rows added at the end)"
        )
    live, arms = run.student.targets is Targets.live, run.codistill.arms
    yield from soft_losses.live_problems(run)
    if live and (problem := soft_losses.vocabulary_problem(run.student, run.teacher.model.vocab_size, "teacher.model")):
        yield problem
    cached = ["the student"] if run.student.cached and not live else []
    cached += [f"codistill.arms.{name}" for name, arm in arms.items() if arm.cached]
    if not run.teacher.capture and cached:
        yield (
            f"teacher.capture is false; job=codistill trains {', '.join(cached)} on what the teacher captures "
            "(student.targets=live and arms with cached=false need no capture)"
        )
    if cached and run.cache.codec.name in CODECS.names:
        form, codec = soft_losses.form_of(run.cache.codec.name), f"cache.codec.name={run.cache.codec.name}"
        if live:
            without = f"no arms that read it ({' '.join(f'~{arm}' for arm in cached)})"
            yield from soft_losses.refusal(run.student, form, f"{codec}, which {', '.join(cached)} would read", without)
        else:
            yield from soft_losses.refusal(run.student, form, codec)
    if run.student.replay.order is ReplayOrder.own:
        yield f"student.replay.order is own with job=codistill; {_TAKES_ITS_STREAM}"


def backfill_rules(run: RunConfig) -> Iterator[str]:
    source = run.teacher.from_
    named = {"teacher.from": source, "init_from": run.init_from, "teacher.init_from": run.teacher.init_from}
    given = [f"{key} is {value}" for key, value in named.items() if value is not None]
    if len(given) != 1:
        yield (
            f"{' and '.join(given) or 'init_from is null'}; job=backfill takes one frozen teacher: "
            "init_from=FOLDER or teacher.from=hf:FOLDER"
        )
    yield from _foreign_images(run)
    corpora = run.backfill.corpora
    for name in corpora:
        if name not in run.data.corpora:
            yield f"backfill.corpora has {name}; allowed: {', '.join(run.data.corpora)}"
    if len(set(corpora)) < len(corpora):
        yield f"backfill.corpora is {list(corpora)}; each once"


def _foreign_images(run: RunConfig) -> Iterator[str]:
    source = run.teacher.from_
    if source is not None and source.startswith("hf:") and run.data.has_images:
        yield f"teacher.from is {source}; data.corpora have images, which only the project's own models take"


def evaluate_rules(run: RunConfig) -> Iterator[str]:
    if run.init_from is None:
        yield "init_from is null; job=evaluate needs the folder of the model to evaluate"


def export_rules(run: RunConfig) -> Iterator[str]:
    if run.init_from is None:
        yield "init_from is null; job=export needs the run, checkpoint or folder of the model to export"
    if run.export.dir is None:
        yield "export.dir is null; job=export needs the folder to write"
    elif os.path.exists(run.export.dir) and not (os.path.isdir(run.export.dir) and not os.listdir(run.export.dir)):
        yield f"export.dir is {run.export.dir}; it exists and is not empty: choose a new folder"


# ---------------------------------------------------------------- of one codec each


def topk_rules(codec: CodecConfig, vocab_size: int) -> Iterator[str]:
    if codec.k > vocab_size:
        yield f"k is {codec.k}; at most the size of the teacher's vocabulary, {vocab_size}"


# ---------------------------------------------------------------- of one part each


def _model(key: str, m: ModelConfig, sample_tokens: int) -> Iterator[str]:
    for name in ("hidden_size", "expert_hidden"):
        if getattr(m, name) % 8:
            yield f"{key}.{name} is {getattr(m, name)}; grouped matrix products need a multiple of 8"
    yield from model_rules(m, f"{key}.")
    if sample_tokens > m.max_positions:
        yield f"data.sample_tokens is {sample_tokens}; {key}.max_positions allows {m.max_positions}"
    if m.vision is not None:
        image_id, most = m.vision.image_token_id, m.vocab_size - 1
        if not 0 <= image_id <= most:
            yield f"{key}.vision.image_token_id is {image_id}; the model's vocab_size allows 0 to {most}"
        yield from vision_rules(m.vision, f"{key}.vision.")


def _role(role: str, part: TeacherConfig | StudentConfig) -> Iterator[str]:
    o, t, train = part.optim, part.train, f"{role}.train"
    if len(o.betas) != 2:
        yield f"{role}.optim.betas is {list(o.betas)}; two numbers in [0, 1)"
    if o.optimizer is OptimizerName.adamw and o.eps <= 0:
        yield f"{role}.optim.eps is {o.eps}; it must be positive"
    yield from _schedule(f"{role}.optim", o)
    if part.model.parametrization is Parametrization.transfer and o.optimizer is not OptimizerName.adamw:
        yield (
            f"{role}.optim.optimizer is {o.optimizer.value} with {role}.model.parametrization transfer; "
            "its rules are those of adamw"
        )
    if t.log_every >= 1 and t.checkpoint_every % t.log_every:
        # Else the row that spans a checkpoint would be averaged over the steps since the resume alone.
        yield f"{train}.checkpoint_every is {t.checkpoint_every}; it must be a multiple of log_every, {t.log_every}"
    if t.accumulation >= 1 and t.batch % t.accumulation:
        yield f"{train}.batch is {t.batch}; it must be a multiple of accumulation, {t.accumulation} (and of the ranks)"
    if t.freeze is not Freeze.none and part.model.vision is None:
        yield (
            f"{train}.freeze is {t.freeze.value} and {role}.model.vision is null; only a model with vision has a "
            "half to freeze"
        )


def _schedule(key: str, part: OptimConfig | WeightingConfig) -> Iterator[str]:
    if part.schedule is Schedule.wsd and part.warmup + part.decay > 1:
        yield f"{key}.warmup + decay is {part.warmup + part.decay}; at most 1"


def _weighting(key: str, w: WeightingConfig) -> Iterator[str]:
    yield from _schedule(key, w)
    if w.entropy.enabled and not w.entropy.scale and w.entropy.skip == 0:
        yield f"{key}.entropy is enabled but does nothing; set scale=true or skip above 0"
    own = [name for name in FACTORS.names if dataclasses.is_dataclass(getattr(w, name, None))]
    for name, options in w.plugins.items():
        if name in own:
            yield f"{key}.plugins.{name}: this factor is the project's own; its options are keys of {key}.{name}"
        elif name not in FACTORS.names:
            allowed = ", ".join(each for each in FACTORS.names if each not in own)
            yield f"{key}.plugins.{name} is no factor; allowed: {allowed or 'none: no module of plugins adds one'}"
        elif not isinstance(options, dict):
            yield f"{key}.plugins.{name} is {options}; it must be a mapping of the factor's options, {{}} for none"


def _data(run: RunConfig) -> Iterator[str]:
    d = run.data
    if not d.corpora:
        yield "data.corpora is empty; name at least one corpus"
    if d.corpora and not any(corpus.has_held_out for corpus in d.corpora.values()):
        yield "data.corpora.*.held_out is 0 for all; one of them must hold out text for evaluation"
    for name, corpus in d.corpora.items():
        key = f"data.corpora.{name}"
        if corpus.source is Source.files and not corpus.files:
            yield f"{key}.files is empty; source=files needs paths or globs"
        for name in ("files", "held_out_files", "format", "mask_key", "image_key"):
            if corpus.source is not Source.files and (value := getattr(corpus, name)):
                yield f"{key}.{name} is {shown(value)}; source={corpus.source.value} takes none (use source=files)"
        if corpus.source is Source.needle:
            n = corpus.needle
            if corpus.max_documents is None:
                yield f"{key}.max_documents is null; source=needle makes so many documents"
            if n.longest < n.shortest:
                yield f"{key}.needle.longest is {n.longest}; at least {n.shortest}"
        if corpus.source is Source.law:
            yield from _law(key, corpus)
    specials = sum(token is not None for token in (d.tokenizer.bos, d.tokenizer.eos))
    if d.tokenizer.file is None:
        least = 256 + specials + len(IMAGE_TOKENS) * d.has_images
        if d.tokenizer.vocab_size < least:
            yield f"data.tokenizer.vocab_size is {d.tokenizer.vocab_size}; at least {least}"
        # job=backfill takes its teacher as it was saved: it is checked when it is there.
        for role in () if run.job == "backfill" else ("teacher", "student"):
            size = getattr(run, role).model.vocab_size
            if d.tokenizer.vocab_size > size:
                yield f"data.tokenizer.vocab_size is {d.tokenizer.vocab_size}; {role}.model.vocab_size allows {size}"
    # A trained tokenizer's first ids are bos and eos, then those of images.
    patch_id = None if d.tokenizer.file is not None else specials + IMAGE_TOKENS.index("<|patch|>")
    # job=evaluate takes its models as they were saved: they are checked when they are there.
    for role in JOBS[run.job].trains if d.has_images and run.job in JOBS.names else ():
        yield from vision_problems(f"{role}.model.vision", getattr(run, role).model.vision, d.images, patch_id)


MOST_CONTEXTS = 70_000
"""Of a law's longest context: its table has a row for each."""


def _law(key: str, corpus: CorpusConfig) -> Iterator[str]:
    law = corpus.law
    if corpus.max_documents is None:
        yield f"{key}.max_documents is null; source=law makes so many documents"
    if law.first + law.symbols > 127:
        yield f"{key}.law.symbols is {law.symbols}; law.first {law.first} leaves {127 - law.first} characters"
    if (law.symbols + 1) ** law.order > MOST_CONTEXTS:
        yield f"{key}.law.order is {law.order}; with {law.symbols} symbols more than {MOST_CONTEXTS:,} contexts"


def vision_problems(key: str, vision: VisionConfig | None, images: ImageConfig, patch_id: int | None) -> Iterator[str]:
    """Problems of a model with a run's images; patch_id: the tokenizer's `<|patch|>`, None: not known yet."""
    if vision is None:
        yield f"{key} is null; data.corpora have images"
        return
    if vision.tile_size != images.tile_size:
        yield f"{key}.tile_size is {vision.tile_size}; data.images.tile_size is {images.tile_size}"
    elif vision.patch_size * vision.shuffle >= 1 and vision.tile_tokens != images.tile_tokens:
        yield (
            f"{key} makes {vision.tile_tokens} tokens of a tile, (tile_size / patch_size / shuffle)^2; "
            f"data.images.tile_tokens is {images.tile_tokens}"
        )
    if patch_id is not None and vision.image_token_id != patch_id:
        yield f"{key}.image_token_id is {vision.image_token_id}; the tokenizer's <|patch|> is {patch_id}"


def _cache(run: RunConfig) -> Iterator[str]:
    c = run.cache
    if c.codec.name in CODECS.names:
        for problem in CODECS[c.codec.name].problems(c.codec, run.teacher.model.vocab_size):
            yield f"cache.codec.{problem}"
    for name in c.dirs:
        if name not in run.data.corpora:
            yield f"cache.dirs has {name}; allowed: {', '.join(run.data.corpora)}, the names of data.corpora"
    if len(set(c.dirs.values())) < len(c.dirs):
        yield f"cache.dirs are {', '.join(c.dirs.values())}; each corpus has a cache of its own"
    if c.follow and run.job != "student":
        yield f"cache.follow is true with job={run.job}; only job=student follows another run's cache"


def _evaluation(run: RunConfig) -> Iterator[str]:
    e = run.evaluate
    held_out = [name for name, corpus in run.data.corpora.items() if corpus.has_held_out]
    if e.accuracy_on is not None and e.accuracy_on not in held_out:
        allowed = ", ".join(held_out)
        yield f"evaluate.accuracy_on is {e.accuracy_on}; allowed: {allowed}, the corpora that hold something out"
    tested = run.teacher.model if run.job == "teacher" else run.student.model
    for length in e.needle.lengths:
        if run.job != "evaluate" and length > tested.max_positions:
            yield f"evaluate.needle.lengths has {length}; the model's max_positions is {tested.max_positions}"
    if not e.needle.depths:
        yield "evaluate.needle.depths is empty; at least one share, or lengths=[] for no test"


def _sources(run: RunConfig) -> Iterator[str]:
    """Of the folders that models come from."""
    folders = {
        "init_from": run.init_from,
        "teacher.init_from": run.teacher.init_from,
        "teacher.from": run.teacher.from_ and run.teacher.from_.removeprefix("hf:"),
        "student.init_from": run.student.init_from,
        "evaluate.teacher_from": run.evaluate.teacher_from,
    }
    for key, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            yield f"{key} is {folder}; no such folder"
    frozen = run.job == "backfill" or (run.job == "student" and run.student.targets is Targets.live)
    if run.teacher.from_ is not None and not frozen:
        yield (
            f"teacher.from is {run.teacher.from_} with job={run.job}; only job=backfill labels with a frozen teacher, "
            "and job=student with student.targets=live"
        )


def _precision(p: PrecisionConfig) -> Iterator[str]:
    if p.name not in PRECISIONS.names:
        return
    read = {name: getattr(PRECISIONS[name], "options", ()) for name in PRECISIONS.names}
    for field in dataclasses.fields(p):
        value = getattr(p, field.name)
        if field.name != "name" and value != field.default and field.name not in read[p.name]:
            readers = ", ".join(name for name, options in read.items() if field.name in options)
            yield (
                f"precision.{field.name} is {shown(value)} with precision.name {p.name}; of the precisions only "
                f"{readers} reads it"
            )


def _fp8(run: RunConfig) -> Iterator[str]:
    name, source = run.precision.name, run.teacher.from_
    if name in PRECISIONS.names and run.job in JOBS.names:
        multiple = getattr(PRECISIONS[name], "multiple", 1)
        for role in JOBS[run.job].trains:
            yield from width_rules(getattr(run, role).model, f"{role}.model.", multiple, f"precision {name}")
    if name != "fp8" or source is None:
        return
    if source.startswith("hf:"):
        yield (
            f"precision.name is fp8 with teacher.from {source}; only the project's own models compute in it: label "
            "with precision=bf16 or fp32"
        )
    elif run.job == "student":
        yield (
            f"precision.name is fp8 with teacher.from {source}; a frozen teacher's targets would lose what bf16 keeps: "
            "label with job=backfill precision=bf16, then train on the cache"
        )


def _folder_names(key: str, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():
            yield f"{key}.{name}: the name becomes a folder's; letters, digits, '-' and '_' only"
