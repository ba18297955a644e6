"""Types, defaults and meaning of every configuration key; values live in `conf/`, construction in code.

Shape letters and words are those of docs/guide.md. Losses are in nats per token. Fields are plain dataclasses
so that Hydra and OmegaConf type-check YAML and command line alike. No attribute of theirs can be set: another value is
another object (`dataclasses.replace`). No torch here: tools that read only a configuration start at once. Longer than
other files, so that the whole surface is read in one place.
"""

from dataclasses import field
from enum import Enum, StrEnum
from typing import Annotated, Any

from distill.config.immutable import frozen
from distill.config.model import MISSING
from distill.config.model import BaseSizes as BaseSizes
from distill.config.model import ModelConfig as ModelConfig
from distill.config.model import Parametrization as Parametrization
from distill.config.model import RopeScaling as RopeScaling
from distill.config.model import VisionConfig as VisionConfig
from distill.config.ranges import (
    Below1,
    Between,
    Characters,
    Count,
    Draws,
    Exponent,
    Facts,
    Ids,
    Many,
    Natural,
    NotNegative,
    Order,
    PathText,
    Positive,
    PositiveShare,
    Seconds,
    Seed,
    Share,
    Size,
    Stage,
    Symbols,
    Tau,
    Temperature,
    Tflops,
    Threads,
    Tiles,
    TopK,
    Words,
)
from distill.config.registry import CODECS, DISPATCHERS, JOBS, LOSSES, PRECISIONS
from distill.config.study import LabConfig as LabConfig

JobName = Annotated[str, JOBS]
LossName = Annotated[str, LOSSES]
DispatcherName = Annotated[str, DISPATCHERS]
PrecisionName = Annotated[str, PRECISIONS]


class Role(StrEnum):
    teacher = "teacher"
    student = "student"


class OptimizerName(Enum):
    adamw = "adamw"
    sgd = "sgd"


class Schedule(Enum):
    """Of the learning rate and of alpha; wsd: warm-up, stable, decay; step: constant, then at once the final value."""

    constant = "constant"
    step = "step"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class ReplayOrder(Enum):
    own = "own"
    same = "same"
    newest = "newest"
    late_first = "late_first"


class Targets(Enum):
    """Where a student's soft targets come from: a cache, or a forward pass of a teacher in the same process."""

    cache = "cache"
    live = "live"


class Freeze(Enum):
    """Half of a model with vision that does not train; the projector between them always does."""

    none = "none"
    vision = "vision"
    text = "text"


class FileFormat(Enum):
    """json: objects on lines, one after another, or in an array; text: one document a file."""

    text = "text"
    json = "json"
    parquet = "parquet"
    arrow = "arrow"


class OnFull(Enum):
    block = "block"
    skip = "skip"


class OnMissing(Enum):
    hard = "hard"
    fail = "fail"


class Source(Enum):
    stdlib = "stdlib"
    files = "files"
    digits = "digits"
    needle = "needle"
    law = "law"


class WeightDtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class WandbMode(Enum):
    off = "off"
    offline = "offline"
    online = "online"


class ConsoleMode(Enum):
    auto = "auto"
    bar = "bar"
    lines = "lines"
    off = "off"


# ---------------------------------------------------------------- optimization


@frozen
class WeightDecay:
    """Decoupled weight decay of each parameter group, per unit of learning rate."""

    matrices: NotNegative = 0.1
    """Attention projections, experts, shared experts, dense feed-forward; all matrices of vision."""
    embedding: NotNegative = 0.0
    head: NotNegative = 0.1
    router: NotNegative = 0.0
    norms: NotNegative = 0.0
    """Norm weights; biases, class and positional embeddings of vision."""


@frozen
class OptimConfig:
    optimizer: OptimizerName = OptimizerName.adamw
    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: list[Below1] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two; SGD takes the first as its momentum."""
    eps: NotNegative = 1e-8
    weight_decay: WeightDecay = field(default_factory=WeightDecay)
    clip: NotNegative = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: Schedule = Schedule.wsd
    warmup: Share = 0.02
    """Share of the steps spent rising linearly from 0."""
    decay: Share = 0.2
    """wsd: share of the steps spent falling linearly at the end; step: share of the steps at final_lr."""
    final_lr: Share = 0.0
    """Learning rate at the end, as a share of the peak."""


@frozen
class TrainConfig:
    steps: Count | None = None
    """Optimizer steps; null: as many as `epochs` gives."""
    epochs: Positive = 1.0
    """Passes over the corpus, used when `steps` is null."""
    batch: Size = 8
    """Samples per optimizer step, over all ranks."""
    accumulation: Size = 1
    """Micro-batches per optimizer step on each rank."""
    log_every: Count = 10
    eval_every: Natural = 0
    """Steps between held-out evaluations; 0: only at the end."""
    eval_samples: Many = 64
    """Held-out samples of an evaluation during training (at most what is held out)."""
    checkpoint_every: Natural = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Count = 1
    """Newest checkpoints that are kept."""
    balance_rate: NotNegative = 1e-3
    """Step of the loss-free router bias; 0 switches balancing off. A frozen text model's stays as it is."""
    balance_loss: NotNegative = 0.0
    """Coefficient, per MoE layer, of the sequence-wise balance loss on top of it (1e-4 is usual); 0: none."""
    z_loss: NotNegative = 0.0
    """Coefficient, per MoE layer, of the routers' z-loss (1e-3 is usual); 0: none."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time."""
    freeze: Freeze = Freeze.none
    """Keep the vision tower and its adapter, or the whole text model, as they are; needs model.vision."""
    head_chunk: Count | None = None
    """Tokens whose logits live at one time; null: by bytes, 256 MiB of them on a CPU and 2 GiB on a GPU."""


# ---------------------------------------------------------------- weighting, replay


@frozen
class LagFactor:
    """alpha falls with how much worse the teacher of a target was than the best teacher will be at its end."""

    enabled: bool = False
    power: Positive = 0.5
    memory: PositiveShare = 0.01
    """Share of the student's tokens over which student and teacher are compared: a token counts 1 / e after so many."""


@frozen
class EntropyFactor:
    """alpha by the entropy of the teacher's prediction."""

    enabled: bool = False
    scale: bool = False
    """Multiply by entropy / log V."""
    skip: Below1 = 0.0
    """Share of a batch's covered tokens, the lowest in entropy, that get no soft loss."""


@frozen
class DisagreementFactor:
    """alpha rises with the disagreement of student and teacher on the token."""

    enabled: bool = False
    half: Positive = 0.1
    """Nats at which the factor is one half."""


@frozen
class VarianceFactor:
    """The weight of least squared error between noisy labels and biased targets."""

    enabled: bool = False
    labels: Positive = 1.0
    """Labels that the student averages at the peak of its learning rate; more as the rate falls."""


@frozen
class LabelGapFactor:
    """The soft loss counts where the teacher's loss of the token's own label was below the student's; the hard weight
    stays."""

    enabled: bool = False
    margin: NotNegative = 0.0
    """Nats of student's less teacher's loss at which the factor is one half."""
    width: Positive = 1.0
    """Nats from there to 0.73."""


@frozen
class WeightingConfig:
    """alpha_T = schedule(step) x the factors that are enabled; loss = alpha * soft + (1 - alpha) * hard."""

    schedule: Schedule = Schedule.constant
    alpha: Share = 0.5
    """Largest alpha of the schedule."""
    final_alpha: Share = 0.0
    """Where step, linear, cosine and wsd end."""
    warmup: Share = 0.0
    """wsd only: share of the steps spent rising from 0."""
    decay: Share = 0.2
    """wsd: share of the steps spent falling; step: share of the steps at final_alpha."""
    lag: LagFactor = field(default_factory=LagFactor)
    entropy: EntropyFactor = field(default_factory=EntropyFactor)
    disagreement: DisagreementFactor = field(default_factory=DisagreementFactor)
    variance: VarianceFactor = field(default_factory=VarianceFactor)
    label_gap: LabelGapFactor = field(default_factory=LabelGapFactor)
    plugins: dict[str, Any] = field(default_factory=dict)
    """Further factors by the name that a module of `plugins` registered, each with a mapping of its own options."""


@frozen
class LossOptions:
    """Of `student.loss`; null: the loss's default. One that the loss does not read is refused."""

    temperature: Temperature | None = None
    """Student and teacher are both made flatter by it, and the soft loss is multiplied by its square; default 1."""
    beta: Exponent | None = None
    """jensen_shannon: the teacher's share of the mean distribution, in (0, 1), default 0.5; alpha_beta: exponent of the
    student, default 0.7."""
    skew: Between | None = None
    """skew_kl, skew_reverse_kl: share of the first distribution in the second; default 0.1."""
    alpha: Exponent | None = None
    """alpha_beta: exponent of the teacher; default 0.2."""


@frozen
class ReplayConfig:
    order: ReplayOrder = ReplayOrder.late_first
    """Order over the teacher's stream: the teacher's (same), backwards, or its second half first; own: not the
    teacher's stream but the run's own, from its corpora, their weights and data.seed."""


@frozen
class ArmConfig:
    """A further student that is trained after the codistilled one, from the same init on the same samples."""

    lr: Positive | None = None
    """Peak learning rate; null: the student's."""
    schedule: Schedule | None = None
    """Of the learning rate; null: the student's."""
    order: ReplayOrder = ReplayOrder.same
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    cached: bool = True
    """False: hard labels alone; the cache is never opened."""


@frozen
class TeacherConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init_from: PathText | None = None
    """Hugging Face folder or our checkpoint that gives the first weights."""
    capture: bool = True
    """Write soft targets of every training batch to the cache."""
    from_: PathText | None = None
    """Frozen teacher of job=backfill, or of live targets, on the command line also spelt `teacher.from`: a run, a
    checkpoint, a Hugging Face Llama 4 folder; or `hf:FOLDER`, any causal language model that transformers loads (extra
    `hf`)."""


@frozen
class StudentConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init_from: PathText | None = None
    cached: bool = True
    """False: hard labels alone; no cache is opened."""
    targets: Targets = Targets.cache
    """live: the frozen teacher of `teacher.from` (job=student), or the teacher that trains beside (job=codistill)."""
    loss: LossName = "mixed"
    """Of the soft targets; docs/guide.md has the table of what each may use. mixed: cross entropy."""
    loss_options: LossOptions = field(default_factory=LossOptions)
    hidden_match: NotNegative = 0.0
    """Coefficient, times alpha, of 1 - cosine between the teacher's last hidden state and a learned projection of the
    student's; live targets only; 0: none."""
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)


# ---------------------------------------------------------------- data, cache


IMAGE_TOKENS = (
    "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>"
)  # fmt: skip
"""A tokenizer for images has them. In a trained one they follow bos and eos: with both they are ids 2 to 7."""


@frozen
class TokenizerConfig:
    file: PathText | None = None
    """A `tokenizer.json`; null trains a byte-level BPE on the training split."""
    vocab_size: Ids = 512
    """Size of the trained BPE, special tokens included (six more if a corpus has images); unused with `file`."""
    bos: str | None = "<|begin_of_text|>"
    """Token put before every document; null: none."""
    eos: str | None = "<|end_of_text|>"
    """Token put after every document; null: none."""


@frozen
class NeedleConfig:
    """Made-up documents that teach retrieval: filler with facts in it, then questions (source=needle).

    Lengths count words, numbers, marks and line ends, which are tokens of a tokenizer that has one for each.
    """

    shortest: Words = 32
    longest: Words = 250
    facts: Facts = 8
    """Most facts of a document; questions about them take the room that facts and filler leave."""
    answers_only: bool = True
    """Only what the text decides carries loss, answers and the names behind them; false: the whole text."""
    seed: Seed = 0


@frozen
class LawConfig:
    """Documents drawn from a next-symbol law that is known exactly (source=law); symbols are one-byte characters."""

    symbols: Symbols = 64
    first: Characters = 48
    """Code of the first symbol; the others follow it. Laws of a mixture take symbols of their own."""
    order: Order = 2
    """Symbols before the next one that decide it, beside the document's first."""
    strength: Positive = 1.0
    """Typical standard deviation of the log-odds that one context brings: the more, the lower the entropy."""
    length: Count = 62
    """Symbols of a document; with bos and eos it then fills a sample of two more tokens."""
    seed: Seed = 0
    """Of the law."""
    draw: Seed = 0
    """Of the documents."""


@frozen
class CorpusConfig:
    source: Source = Source.stdlib
    files: list[PathText] = field(default_factory=list)
    """Paths or globs of jsonl, json, parquet, arrow, feather or text files, compressed or not (source=files)."""
    held_out_files: list[PathText] = field(default_factory=list)
    """The same for the held-out split; empty: `held_out` splits `files` by document."""
    format: FileFormat | None = None
    """Of all files; null: by the suffix of each."""
    text_key: str = "text"
    """Column that holds a document's text."""
    mask_key: str | None = None
    """Column with [start, end) character ranges of the text that carry loss; null: all of it."""
    image_key: str | None = None
    """Column with a document's images: a path (from the file's folder), bytes, a dict of both, or a list of these;
    the text has `<|image|>` where each belongs. Image files are not read again once a corpus is packed."""
    held_out: Below1 = 0.05
    """Share of the files (stdlib), documents (files) or images (digits) kept for evaluation; documents with images
    are drawn by them, so that those about the same images stay together."""
    max_documents: Many | None = None
    """Stop after so many documents (digits: digits); null: all. needle and law have no end and need a number."""
    whole_documents: bool = False
    """Begin a new sample rather than cut a document that fits in one, so that no text is parted from its image; the
    room that is left carries no loss."""
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    law: LawConfig = field(default_factory=LawConfig)
    weight: Positive = 1.0
    """Share of this corpus in a mixture, up to a common factor."""

    @property
    def has_images(self) -> bool:
        return self.source is Source.digits or self.image_key is not None

    @property
    def has_held_out(self) -> bool:
        return self.held_out > 0 or bool(self.held_out_files)


@frozen
class ImageConfig:
    """How an image becomes tiles and tokens; defaults are the released values."""

    tile_size: Size = 336
    """Height and width of a tile in pixels; the models' vision.tile_size."""
    tile_tokens: Size = 144
    """Tokens that a tile becomes; (tile_size / patch_size / shuffle)^2 of the models."""
    max_tiles: Tiles = 16
    """Of an image's canvas; one more is added when it has several."""
    resize_to_max_canvas: bool = False
    """Enlarge an image as far as some canvas allows; false: only up to the side of a tile."""


@frozen
class DataConfig:
    corpora: dict[str, CorpusConfig] = field(default_factory=lambda: {"main": CorpusConfig()})
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sample_tokens: Ids = 128
    """Tokens S of one packed sample."""
    images: ImageConfig = field(default_factory=ImageConfig)
    seed: Seed = 0
    """Of the order of samples."""
    dir: PathText | None = None
    """Folder in which packed corpora are kept for later runs; null: `data/` in the run folder."""

    @property
    def has_images(self) -> bool:
        return any(corpus.has_images for corpus in self.corpora.values())


@frozen
class CodecConfig:
    name: Annotated[str, CODECS] = "systematic"
    draws: Draws = 20
    """systematic, multinomial: draws per token."""
    tau: Tau = 0.05
    """threshold: probabilities from tau up are kept, smaller ones sampled with weight tau."""
    k: TopK = 12
    """topk: entries per token."""
    options: dict[str, Any] = field(default_factory=dict)
    """Codecs of plugins: what they are made of."""


@frozen
class CacheConfig:
    dir: PathText | None = None
    """Folder of the cache, or URL of one that fsspec supports (s3://bucket/folder); null: `cache/` in the run folder. A
    mixture keeps one folder per corpus in it."""
    dirs: dict[str, PathText] = field(default_factory=dict)
    """Folder, or URL, of the cache of a corpus, by the corpus' name, where it is not the one that `dir` gives."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    shard_samples: Many = 256
    """Samples per published shard."""
    index_every: Many = 64
    """Published shards after which a writer makes a listing of them, which readers open in place of each shard."""
    queue: Count = 64
    """Micro-batches that may wait for the writer thread."""
    on_full: OnFull = OnFull.block
    """What capture does when the queue is full: wait, or leave a counted gap."""
    on_missing: OnMissing = OnMissing.hard
    """What a student does with samples that have no targets: hard loss alone, or stop."""
    follow: bool = False
    """Wait for a teacher that is still publishing."""
    follow_timeout: Seconds = 3600.0
    """Seconds without a new shard after which a following student gives up."""


# ---------------------------------------------------------------- engine, tracking, run


@frozen
class EngineConfig:
    zero: Stage = 0
    """ZeRO stage."""
    dispatcher: DispatcherName = "local"
    """Takes rows of a MoE layer to their experts and back."""
    threads: Threads = 0
    """CPU threads per process; 0: OMP_NUM_THREADS if it is set, else cores / ranks on the node."""
    backend: str | None = None
    """torch.distributed backend; null: nccl on GPUs, else gloo."""
    timeout: Seconds = 1800.0
    """Seconds after which a collective that one rank never joins is an error."""
    debug: bool = False
    """Check ids, probabilities, mass and weights that the loss is given; every step waits for the device."""


@frozen
class PrecisionConfig:
    name: PrecisionName = "auto"
    """In which weights and activations are stored and multiplied; auto: bf16 on a GPU, else fp32, settled when a run
    starts."""
    native: bool = False
    """Of bf16 on a CPU: multiply in bf16 itself, which few processors do fast; else the same operands are multiplied
    in fp32."""


@frozen
class TrackingConfig:
    wandb: WandbMode = WandbMode.off
    project: str = "codistill"
    name: str | None = None
    """Name of the wandb run; null: the run folder's."""
    console: ConsoleMode = ConsoleMode.auto
    """One live line on a terminal, plain lines elsewhere; bar and lines force either."""
    histogram_every: Count = 1
    """Logged rows between histograms of alpha."""
    report: bool = True
    """Write report.html at the end of the job."""


@frozen
class CodistillConfig:
    rounds: Count = 20
    """Alternations of teacher and student in one process."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """Further students for comparison, by name."""


@frozen
class BackfillConfig:
    """A frozen teacher labels, forward only, what the caches of the run's corpora lack or hold too stale."""

    corpora: list[str] = field(default_factory=list)
    """Corpora to label; empty: all of data.corpora."""
    min_lag: Positive | None = None
    """Nats by which a record's teacher was worse than the best of its cache from which on it counts as stale, and is
    replaced if this teacher is better; null: only gaps are filled."""
    max_samples: Many | None = None
    """Most samples that this teacher labels in all, those of earlier runs included; null: no bound."""
    max_tflops: Tflops | None = None
    """Most it may spend on them, 10^12 floating-point operations; null: no bound."""
    batch: Size = 16
    """Samples of a forward pass on each rank."""
    unit_samples: Count = 256
    """Samples of a unit of work: the ranks take units in turns, and a logged row covers one."""
    head_chunk: Count | None = None
    """Tokens whose logits live at one time; null: by bytes, 256 MiB of them on a CPU and 2 GiB on a GPU."""
    dry_run: bool = False
    """Print the plan and what it would cost; label nothing."""


@frozen
class NeedleTestConfig:
    """Needle in a haystack: share of facts that a model retrieves, by length of the text and place of the fact."""

    lengths: list[Count] = field(default_factory=list)
    """Tokens of the whole text, question and answer included; empty: no such test."""
    depths: list[Share] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Share of the haystack that is before the fact."""
    trials: Count = 20
    """Texts for each length and depth."""
    facts: Facts = 1
    """Facts of the same kind in a text, one of which is asked for."""


@frozen
class EvaluateConfig:
    teacher_from: PathText | None = None
    """Folder of the teacher, for agreement; null: none is reported."""
    samples: Many | None = None
    """Held-out samples; null: all."""
    batch: Size = 16
    calibration_bins: Size = 15
    """Equal-width confidence bins of the expected calibration error."""
    accuracy_on: str | None = None
    """Corpus on whose held-out text the accuracy of every model is reported; null: none is."""
    trained_tokens: Count | None = None
    """Sample length of the model's training, for images that go beyond it; null: data.sample_tokens."""
    needle: NeedleTestConfig = field(default_factory=NeedleTestConfig)


@frozen
class ExportConfig:
    dir: PathText | None = None
    """Folder that the Hugging Face checkpoint is written to; it must not exist, or be empty."""
    role: Role = Role.student
    """Which model of a run that trained two."""
    dtype: WeightDtype = WeightDtype.fp32
    """Of the weights in the files."""
    drop_router_bias: bool = False
    """Leave out a router bias that is not zero: the format has none. What it costs on held-out text is measured."""
    max_shard_gb: Positive = 5.0
    """Largest file in GB (10^9 bytes), exceeded only by a single larger tensor."""


@frozen
class RunConfig:
    job: JobName = MISSING
    seed: Seed = 0
    """Of initial weights, sampling of targets, and (unless data.seed is set apart) nothing else."""
    resume: bool = False
    """Go on from the run folder's newest valid checkpoint, or start if there is none."""
    init_from: PathText | None = None
    """First weights of the model that the job trains, or the model that it evaluates, exports or labels with: a run, a
    checkpoint or a Hugging Face folder (job=codistill: use teacher. / student.init_from)."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    codistill: CodistillConfig = field(default_factory=CodistillConfig)
    backfill: BackfillConfig = field(default_factory=BackfillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    lab: LabConfig = field(default_factory=LabConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    plugins: list[str] = field(default_factory=list)
    """Modules that are imported first, from the Python path or the working folder: they register jobs, losses,
    factors, codecs, dispatchers and precisions (distill/config/registry.py)."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
