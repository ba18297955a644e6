"""job=export: a trained model as a Hugging Face folder, with its tokenizer, that transformers loads and generates with.

The tokenizer and the held-out text are those of the run that made the model; nothing is packed anew if they are there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from distill.config import owner
from distill.config.errors import ConfigError
from distill.config.files import write_text
from distill.config.load import typed
from distill.config.schema import DataConfig, ImageConfig, ModelConfig, RunConfig, VisionConfig, WeightDtype
from distill.config.units import counted
from distill.data.prepare import Prepared, prepare, reopen
from distill.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from distill.engine import checkpoint
from distill.engine.dist import Dist
from distill.model import hf
from distill.run import folder as run_folder
from distill.run import identity
from distill.run.evaluation import evaluate_whole
from distill.run.models import load_model, role_in
from distill.run.run import Run

_COPIED = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", identity.EXPORTED,
)  # fmt: skip
"""Of a Hugging Face folder that is exported again."""


def export(config: RunConfig, folder: Path, dist: Dist) -> None:
    """Writes `export.dir`, and a summary into the run folder.

    Raises:
        ConfigError: no tokenizer is found.
        CheckpointError: the model cannot be read, the format cannot hold it, or its router bias is not zero and may
            not be dropped.
    """
    e = config.export
    assert config.init_from is not None and e.dir is not None
    if dist.world > 1:
        raise ConfigError(f"job=export is started on {dist.world} ranks; one process writes the whole model")
    # Before the model, whose loading takes minutes.
    owner.own(Path(e.dir), "export.dir", f"job={config.job}", will_appear=True)
    source = Path(config.init_from)
    home = _Home.of(source, config.data)
    opened = None if (source / "config.json").exists() else checkpoint.find(source)
    model = load_model(source, e.role.value, opened=opened)
    origin = None if opened is None else identity.stored(opened, role_in(opened, e.role.value))
    biased = hf.drops_router_bias(model, e.drop_router_bias, "export.drop_router_bias")
    tokenizer = home.tokenizer()
    data = Prepared(tokenizer, {}, {})
    if biased:
        data = home.held_out(tokenizer, folder / "data", model.config.vocab_size)
    tracking = dataclasses.replace(config.tracking, report=False)  # there is no curve to draw
    run = Run(dataclasses.replace(config, data=home.data, tracking=tracking), folder, dist)
    run.use(data)
    run.start()
    if not home.is_hf:
        model.config = _with_ids_of(tokenizer, model.config)

    def also(target: Path) -> None:
        if home.is_hf:
            _copy(source, target)
        else:
            _write_tokenizer(tokenizer, model.config, home.data.images, target)
        if origin is not None and not biased:  # without its bias the model routes otherwise: it is another teacher
            identity.write_exported(target, *origin)

    report = hf.save(
        model,
        e.dir,
        dtype={WeightDtype.fp32: torch.float32, WeightDtype.bf16: torch.bfloat16}[e.dtype],
        drop_router_bias=biased,
        heldout_loss=(lambda m: evaluate_whole(run, m).loss) if biased else None,
        max_shard_bytes=int(e.max_shard_gb * 1e9),
        also=also,
    )
    files = sorted(path.name for path in Path(e.dir).glob("*.safetensors"))
    parameters = sum(p.numel() for p in model.parameters())
    written = counted(len(files), "file")
    run.tracker.message(f"exported {parameters:,} parameters in {e.dtype.value} to {e.dir} ({written})")
    entries = {"dir": str(e.dir), "parameters": parameters, "dtype": e.dtype.value, "files": files}
    run.finish({**entries, **report._asdict()})


@dataclasses.dataclass(frozen=True)
class _Home:
    """Where a model comes from, and what it was made with."""

    is_hf: bool
    """Its folder is a Hugging Face folder, with a tokenizer of its own."""
    data: DataConfig
    """The run's; without a run the command's own."""
    packed: Path | None
    """Folder of the run's packed corpora; None: it is gone, or there is no run."""
    file: Path
    """The tokenizer."""

    @staticmethod
    def of(source: Path, own: DataConfig) -> _Home:
        """Of a run, a checkpoint in one, one elsewhere, or a Hugging Face folder.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if (source / "config.json").exists() and (source / TOKENIZER).exists():
            return _Home(True, own, None, source / TOKENIZER)
        run = run_folder.run_of(source)
        if run is None or (source / "config.json").exists():
            if own.tokenizer.file is None:
                raise ConfigError(
                    f"init_from is {source}; neither a run nor a {TOKENIZER} is there: name the model's tokenizer with "
                    "data.tokenizer.file"
                )
            return _Home(False, own, None, Path(own.tokenizer.file))
        data = typed(DataConfig, run_folder.recorded(run)["data"])
        homes = [run, run.parent.parent] if run.parent.name == "arms" else [run]  # an arm has its run's data
        packed = Path(data.dir) if data.dir else next((h / "data" for h in homes if (h / "data").is_dir()), None)
        file = next((h / TOKENIZER for h in homes if (h / TOKENIZER).exists()), None)
        if file is None:
            raise ConfigError(f"init_from is {source}; {run / TOKENIZER} is missing")
        return _Home(False, data, packed, file)

    def tokenizer(self) -> Tokenizer:
        """It, with the bos and eos that the data were packed with (of a Hugging Face folder: none)."""
        config = dataclasses.replace(self.data.tokenizer, bos=None, eos=None) if self.is_hf else self.data.tokenizer
        return load_tokenizer(config, self.file)

    def held_out(self, tokenizer: Tokenizer, folder: Path, vocab_size: int) -> Prepared:
        """The corpora, as the run packed them; else packed in `folder`."""
        found = None if self.packed is None else reopen(self.data, self.packed, tokenizer)
        return found or prepare(self.data, self.packed or folder, vocab_size)


def _copy(source: Path, target: Path) -> None:
    for name in _COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _with_ids_of(tokenizer: Tokenizer, config: ModelConfig) -> ModelConfig:
    """The configuration with the tokenizer's special tokens.

    Further ends of a turn are kept where the tokenizer's own eos is among them. A padding id that the tokenizer
    lacks becomes its eos, as is usual for text that is generated.
    """
    eos = tokenizer.eos_id
    eos_ids = config.eos_ids if eos in config.eos_ids else [] if eos is None else [eos]
    has_pad = config.pad_id is not None and tokenizer.token(config.pad_id) is not None
    return dataclasses.replace(
        config, bos_id=tokenizer.bos_id, eos_ids=list(eos_ids), pad_id=config.pad_id if has_pad else eos
    )


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, images: ImageConfig, folder: Path) -> None:
    tokenizer.save(folder / TOKENIZER)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": config.pad_id}
    special = {name: tokenizer.token(i) for name, i in ids.items() if i is not None}
    _dump(special, folder / "special_tokens_map.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # else a padded batch would go on from its padding
        "clean_up_tokenization_spaces": False,
    }
    _dump(settings | special, folder / "tokenizer_config.json")
    if config.vision is not None:
        _write_processor(config.vision, images, folder)


def _write_processor(vision: VisionConfig, images: ImageConfig, folder: Path) -> None:
    """How transformers makes tiles of images and tokens of tiles."""
    mean = [0.5] * 3
    pixels = {
        "image_processor_type": "Llama4ImageProcessor",
        "processor_class": "Llama4Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": mean,
        "image_std": mean,
        "size": {"height": vision.tile_size, "width": vision.tile_size},
        "max_patches": images.max_tiles,
        "resize_to_max_canvas": images.resize_to_max_canvas,
    }
    _dump(pixels, folder / "preprocessor_config.json")
    tokens = {"patch_size": vision.patch_size, "pixel_shuffle_ratio": 1 / vision.shuffle}
    _dump({"processor_class": "Llama4Processor", **tokens}, folder / "processor_config.json")


def _dump(data: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
