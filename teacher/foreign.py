"""Any causal language model of `transformers` as a frozen teacher; the only file that imports that library.

Packed documents must not attend to each other, and the positions of each begin at 0. The architectures have no common
interface for packed documents, so every document is a row of its own, padded on the right, where causal attention does
not reach.

Where logits are nothing but a product of the last hidden states with the unembedding, which is tested on planted states
(teacher/probe.py) and on the first batch, the head runs in chunks like that of our own models. Elsewhere (biases,
capped or scaled logits) the model computes the logits itself, some whole documents at a time.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.config.errors import ConfigError, DivergenceError
from distill.config.files import LFS_CURE, is_lfs_pointer
from distill.data.join import Batch
from distill.model.finite import is_finite
from distill.model.segments import document_starts
from losses.head import rows_by_bytes
from losses.mixed import Select
from teacher.capture import MicroTargets
from teacher.labelling import label_rows
from teacher.probe import HeadForm, call, number, probe


class _Document(NamedTuple):
    """The tokens of a document in one row of the batch, by their place in the flattened batch."""

    start: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length)


class Foreign:
    """A causal language model of `transformers`; see `teacher.labelling.Frozen`.

    Args:
        name: of the teacher in messages.

    Attributes:
        max_positions: longest document that the model takes; None: its configuration has no limit.
    """

    def __init__(self, model: Any, name: str = "the teacher"):
        self.model: Any = model.eval()
        self._name = name
        config = model.config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._plain_head: bool | None = None
        """The logits are hidden states times the unembedding; None: not tested yet."""

    @cached_property
    def _head(self) -> HeadForm:
        return probe(self.model, self._name)

    @property
    def vocab_size(self) -> int:
        """The width of its logits, padded rows included.

        Raises:
            ConfigError: its configuration has a cap or scale that the model does not apply.
        """
        return self._head.width

    def flops_per_token(self, sample_tokens: int, tiles: float = 0.0) -> float:
        """An estimate: 2 for each weight that multiplies a token, and attention over half a sample."""
        assert not tiles, "no images"
        config = self.model.config.get_text_config()

        def size(*names: str) -> float:
            return next((found for name in names if (found := number(getattr(config, name, None)))), 0.0)

        active, experts = size("num_experts_per_tok"), size("num_local_experts", "num_experts", "n_routed_experts")
        share = active / experts if active and experts else 1.0
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        head = self.model.get_output_embeddings()
        if head is not None:
            tables.discard(id(head.weight))  # tied: the table is also the matrix of a product
        products = sum(
            p.numel() * (share if ".experts." in name else 1.0)
            for name, p in self.model.named_parameters()
            if p.ndim > 1 and id(p) not in tables
        )
        heads, layers = size("num_attention_heads"), size("num_hidden_layers")
        width = size("head_dim") or size("hidden_size") / max(heads, 1)
        return 2.0 * products + 4.0 * layers * heads * width * (sample_tokens + 1) / 2

    @property
    def unembedding(self) -> Tensor:
        self._need_plain(self._head.plain)
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        ids_T, documents = batch.ids_BS.flatten(), _documents(batch.documents_BS)
        self._need_plain(self._is_plain(ids_T, documents, len(ids_T)))
        return self._hidden(ids_T, documents, room=len(ids_T))

    def _need_plain(self, plain: bool) -> None:
        if not plain:
            raise ConfigError(
                f"{self._name}; its logits are not its last hidden states times its unembedding, as live targets need: "
                "label with job=backfill, and train on the cache"
            )

    def _is_plain(self, ids_T: Tensor, documents: list[_Document], room: int) -> bool:
        if self._plain_head is None:
            few = documents[: max(1, room // documents[0].length)]
            self._plain_head = self._head.plain and self._has_plain_head(ids_T, few)
        return self._plain_head

    def label(self, batch: Batch, select: Select | None, head_chunk: int | None) -> MicroTargets:
        ids_T, labels_T = batch.ids_BS.flatten(), batch.labels_BS.flatten()
        documents = _documents(batch.documents_BS)
        if head_chunk is None:
            head_chunk = rows_by_bytes(len(ids_T), self.vocab_size, ids_T.device, tensors=3)  # copied twice
        if self._is_plain(ids_T, documents, head_chunk):
            hidden_TD = self._hidden(ids_T, documents, room=len(ids_T))
            head = label_rows(hidden_TD, self.unembedding, batch, select, head_chunk)
            return MicroTargets(batch, head.parts["hard"], head.selected)
        hard, selections = [], []
        for group in _groups(documents, head_chunk, in_order=True):
            logits_NLV = self._rows(self.model, ids_T, group).logits
            logits_tV = torch.cat([row_LV[: d.length] for row_LV, d in zip(logits_NLV, group)])
            logits_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32))
            lse_t, start = logits_tV.logsumexp(-1), group[0].start
            if select is not None:
                selections.append(select(slice(start, start + len(lse_t)), logits_tV, lse_t))
            labels_t1 = labels_T[start : start + len(lse_t), None]
            hard.append(lse_t - logits_tV.gather(-1, labels_t1).squeeze(-1))
        return MicroTargets(batch, torch.cat(hard), selections)

    def _has_plain_head(self, ids_T: Tensor, documents: list[_Document]) -> bool:
        """Whether the product gives, number for number, the logits that the model gives on these documents."""
        head = self.model.get_output_embeddings()
        group = next(_groups(documents, sum(d.length for d in documents), in_order=True))
        out = self._rows(self.model.base_model, ids_T, group)
        hidden = getattr(out, "last_hidden_state", None)
        if self.model.base_model is self.model or hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
            return False
        product, logits = F.linear(hidden, head.weight), self._rows(self.model, ids_T, group).logits
        if product.shape != logits.shape:
            return False
        return bool((product.float() - logits.float()).abs().max() <= 1e-5 * logits.float().abs().max())

    def _hidden(self, ids_T: Tensor, documents: list[_Document], room: int) -> Tensor:
        """The last hidden states of all tokens [T, D]; at most `room` places, padding included, run at a time."""
        hidden_TD: Tensor | None = None
        for group in _groups(documents, room, in_order=False):
            rows_NLD = self._rows(self.model.base_model, ids_T, group).last_hidden_state
            if hidden_TD is None:
                hidden_TD = rows_NLD.new_empty(len(ids_T), rows_NLD.shape[-1])
            for row_LD, d in zip(rows_NLD, group):
                hidden_TD[d.tokens] = row_LD[: d.length]
        assert hidden_TD is not None
        return hidden_TD

    def _rows(self, module: Any, ids_T: Tensor, group: list[_Document]) -> Any:
        """The module's output for documents, a row each, padded on the right to the longest."""
        ids_NL = ids_T.new_zeros(len(group), max(d.length for d in group))
        mask_NL = torch.zeros_like(ids_NL)
        for row, d in enumerate(group):
            ids_NL[row, : d.length] = ids_T[d.tokens]
            mask_NL[row, : d.length] = 1
        return call(module, ids_NL, mask_NL)


def load(folder: Path, dtype: torch.dtype) -> Foreign:
    """The model of a folder, on the CPU. Nothing is downloaded, no code of the folder runs, and no pickle is read.

    Raises:
        ConfigError: `transformers` is missing, the folder holds no such model, or lacks some of its weights.
        DivergenceError: a weight is not finite; names file and key.
    """
    key = f"teacher.from is hf:{folder}"
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"{key}; it needs transformers: pip install 'codistill[hf]'") from None
    if pointers := [path.name for path in sorted(folder.glob("*.safetensors")) if is_lfs_pointer(path)]:
        raise ConfigError(f"{key}; {', '.join(pointers[:3])} {LFS_CURE}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{key}; transformers cannot load it: {first}") from error
    model, info = loaded
    # transformers draws weights that a file lacks at random, and only warns.
    if lacking := sorted(info["missing_keys"]):
        raise ConfigError(f"{key}; its files lack {len(lacking)} tensors of the model: {', '.join(lacking[:4])}")
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise DivergenceError(f"{key}; {_stored(folder, name)} is not finite")
    return Foreign(model, key)


def _stored(folder: Path, name: str) -> str:
    """File and key of the folder's first tensor that is not finite; else the model's own name for one."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if not is_finite(file.get_tensor(key)):
                    return f"{path}: {key}"
    return name


def _documents(documents_BS: Tensor) -> list[_Document]:
    """The documents of every row, in the order of the flattened tokens."""
    starts = document_starts(documents_BS).flatten().nonzero().flatten().tolist()
    ends = [*starts[1:], documents_BS.numel()]
    return [_Document(start, end - start) for start, end in zip(starts, ends)]


def _groups(documents: list[_Document], room: int, in_order: bool) -> Iterator[list[_Document]]:
    """Documents to run together: at most `room` places with padding, or one document; by length unless `in_order`."""
    group: list[_Document] = []
    longest = 0
    for document in documents if in_order else sorted(documents, key=lambda d: d.length):
        if group and max(longest, document.length) * (len(group) + 1) > room:
            yield group
            group, longest = [], 0
        group.append(document)
        longest = max(longest, document.length)
    if group:
        yield group
