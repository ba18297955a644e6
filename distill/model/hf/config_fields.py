"""Takes values out of one object of a `config.json`: each by its type, every fault noted, no unknown key accepted."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distill.config.model import RopeScaling, scaling_rules
from distill.config.ranges import out_of_range

_WRITTEN_EVERYWHERE = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attn_implementation cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    dtype experts_implementation finetuning_task id2label is_decoder is_encoder_decoder label2id name_or_path num_labels
    output_attentions output_hidden_states prefix problem_type pruned_heads return_dict sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version
    use_bfloat16 use_cache"""
"""Keys that transformers 4 and 5 write for every model."""
_HOW_TO_GENERATE = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p"""
"""Keys of generation that transformers 4 wrote into `config.json`."""
_MARKS_OF_TOOLS = "for_llm_compressor unsloth_fixed unsloth_version"
_LARGEST = 2**53
"""Not all whole numbers beyond it are floats; no size of a model is as large."""
ANYWHERE = frozenset((_WRITTEN_EVERYWHERE + _HOW_TO_GENERATE + " " + _MARKS_OF_TOOLS).split())
"""Keys that change nothing that is computed, at every level of a file."""


class Fields:
    """One object of a parsed `config.json`.

    A value that is missing or malformed is noted and replaced by 1, so that all faults of a file are named at once.

    Args:
        where: what messages put before a key, such as `config.json: text_config.`.
        problems: gets a sentence for every fault.
    """

    def __init__(self, data: dict[str, Any], where: str, problems: list[str]):
        self.data, self.where, self.problems = data, where, problems
        self._before = len(problems)
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return self.data.get(key, default)

    def fault(self, key: str, what: str) -> None:
        """Notes `<where><key> <what>`."""
        self.problems.append(f"{self.where}{key} {what}")

    @property
    def sound(self) -> bool:
        """No fault was noted since this object was opened."""
        return len(self.problems) == self._before

    def number(self, key: str, default: Any = ..., kind: type = int, null: bool = False) -> Any:
        """A number as `kind` (int or float); without a default the key is required.

        Args:
            null: null is allowed, and returned as None.
        """
        value = self.get(key, default)
        if value is None and (null or default is None):
            return None
        if value is None or value is ...:
            self.fault(key, "is missing" if value is ... else "is null")
            return 1
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not valid or (kind is int and value != int(value)):
            self.fault(key, f"is {value!r}; it must be {'an integer' if kind is int else 'a number'}")
            return 1
        return kind(value)

    def integers(self, key: str) -> list[int] | None:
        """A list of integers, or None where the key is missing or null."""
        value = self.get(key)
        if value is None or (isinstance(value, list) and all(isinstance(item, int) for item in value)):
            return value
        self.fault(key, f"is {value!r}; it must be a list of integers or null")
        return None

    def truth(self, key: str, default: bool) -> bool:
        """True or false, or a number for one: early files have the integer 4 in place of true."""
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
        """Notes any value but this one and null, which is the same as a missing key."""
        value = self.get(key)
        if value is not None and value != allowed:
            self.fault(key, f"is {value!r}; only {allowed!r} is supported")

    def check(self, config: Any, rules: Callable[..., Iterator[str]], keys: Mapping[str, str]) -> None:
        """Notes which numbers of a configuration made of this object are out of range, or else the rules it breaks.

        Args:
            rules: of `distill.config.model`.
            keys: the format's key of a field that has another name there.
        """
        if self.sound:  # else a number that replaces a fault would be held against sound ones
            for problem in out_of_range(config):
                name, _, what = problem.partition(" ")
                self.fault(keys.get(name, name), what)
        if self.sound:
            self.problems += rules(config, self.where, lambda name: keys.get(name, name))

    def rest(self, inert: frozenset[str]) -> None:
        """Notes every key that was not asked for and is not known to change nothing."""
        known = self._asked | inert | ANYWHERE
        for key in self.data.keys() - known:
            near = difflib.get_close_matches(key, known, n=3)
            self.fault(key, "is no key of Llama 4" + (f"; did you mean {' or '.join(near)}?" if near else ""))


class Rope(NamedTuple):
    theta: float
    scaling: RopeScaling | None


def rope(fields: Fields, spellings: Sequence[str], kinds: Sequence[str]) -> Rope:
    """Rotary positions of a part of the model, in the object that is there under one of the spellings, or beside it.

    Args:
        spellings: keys of the object; where both are there they must agree.
        kinds: allowed values of rope_type.
    """
    above = fields.get("rope_theta")
    ropes = []
    for spelling in spellings:
        value = fields.get(spelling)
        if isinstance(value, dict):
            value = ({} if above is None else {"rope_theta": above}) | value
            ropes.append(_one_rope(Fields(value, f"{fields.where}{spelling}.", fields.problems), kinds))
        elif value is not None:
            fields.fault(spelling, f"is {value!r}; it must be an object or null")
    if not ropes:
        return Rope(fields.number("rope_theta", kind=float), None)
    if ropes[0] != ropes[-1]:
        fields.fault(spellings[0], f"and {spellings[-1]} are both there and disagree; keep one")
    return ropes[0]


def _one_rope(fields: Fields, kinds: Sequence[str]) -> Rope:
    theta = fields.number("rope_theta", kind=float)
    new, old = fields.get("rope_type"), fields.get("type")
    kind = new or old or "default"
    fields.only("partial_rotary_factor", 1.0)
    if kind not in kinds:
        fields.fault("rope_type", f"is {kind!r}; allowed: {', '.join(map(repr, kinds))}")
        return Rope(theta, None)
    positions = "original_max_position_embeddings"
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    if kind == "default":
        fields.rest(frozenset((*factors, positions)))
        return Rope(theta, None)
    factor, low, high = (fields.number(key, kind=float) for key in factors)
    scaling = RopeScaling(factor, low, high, fields.number(positions))
    fields.rest(frozenset())
    fields.check(scaling, scaling_rules, {"original_positions": positions})
    return Rope(theta, scaling)
