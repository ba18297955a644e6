"""Taking values out of one object of a `config.json`: typed, every fault noted, no key passed over in silence."""

from __future__ import annotations

import difflib
from typing import Any

_WRITTEN_EVERYWHERE = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attn_implementation cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    dtype experts_implementation finetuning_task id2label is_decoder is_encoder_decoder label2id name_or_path num_labels
    output_attentions output_hidden_states prefix problem_type pruned_heads return_dict sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version
    use_bfloat16 use_cache"""
"""By transformers, 4 and 5, whatever the model."""
_HOW_TO_GENERATE = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p"""
"""Which transformers 4 kept here."""
_MARKS_OF_TOOLS = "for_llm_compressor unsloth_fixed unsloth_version"
_LARGEST = 2**53
"""Whole numbers beyond it are not all floats; nothing of a model is as large."""
ANYWHERE = frozenset((_WRITTEN_EVERYWHERE + _HOW_TO_GENERATE + " " + _MARKS_OF_TOOLS).split())
"""Keys that change nothing that is computed, at every level of a file."""


class Fields:
    """One object of a parsed `config.json`.

    A value that is missing or malformed is noted and stands in as 1, so that all faults of a file are found at once.

    Args:
        where: what messages put before a key, such as `config.json: text_config.`.
        problems: takes a sentence for every fault.

    Attributes:
        faults: how many were noted here.
    """

    def __init__(self, data: dict[str, Any], where: str, problems: list[str]):
        self.data, self.where, self.problems = data, where, problems
        self.faults = 0
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        return self.data.get(key, default)

    def fault(self, key: str, what: str) -> None:
        """Notes `<where><key> <what>`."""
        self.problems.append(f"{self.where}{key} {what}")
        self.faults += 1

    def number(self, key: str, default: Any = ..., kind: type = int, null: bool = False) -> Any:
        """A number as `kind` (int or float); without a default the key must be there.

        Args:
            null: null is allowed, and given as None.
        """
        value = self.get(key, default)
        if value is None and (null or default is None):
            return None
        if value is None or value is ...:
            self.fault(key, "is missing" if value is ... else "is null")
            return 1
        sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not sound or (kind is int and value != int(value)):
            self.fault(key, f"is {value!r}; it must be {'an integer' if kind is int else 'a number'}")
            return 1
        return kind(value)

    def integers(self, key: str) -> list[int] | None:
        """A list of integers, or None where there is none."""
        value = self.get(key)
        if value is None or (isinstance(value, list) and all(isinstance(item, int) for item in value)):
            return value
        self.fault(key, f"is {value!r}; it must be a list of integers or null")
        return None

    def truth(self, key: str, default: bool) -> bool:
        """A truth value, or a number for one: early files hold the integer 4 where true is meant."""
        value = self.get(key, default)
        if not isinstance(value, (bool, int, float)):
            self.fault(key, f"is {value!r}; it must be true or false")
        return bool(value)

    def side(self, key: str) -> int:
        """The side of a square, given as one number or as two equal ones."""
        value = self.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            self.data = {**self.data, key: value[0]}
        size: int = self.number(key)
        return size

    def only(self, key: str, allowed: Any) -> None:
        """The key may be there with this one value, or with null, which says nothing."""
        value = self.get(key)
        if value is not None and value != allowed:
            self.fault(key, f"is {value!r}; only {allowed!r} is supported")

    def rest(self, inert: frozenset[str]) -> None:
        """Refuses every key that was neither asked for nor is known to change nothing."""
        known = self._seen | inert | ANYWHERE
        for key in self.data.keys() - known:
            near = difflib.get_close_matches(key, known, n=3)
            self.fault(key, "is no key of Llama 4" + (f"; did you mean {' or '.join(near)}?" if near else ""))
