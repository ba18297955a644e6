"""Needle in a haystack: made-up text that hides facts among filler, and questions that only those facts answer.

    The pale lake follows the dark star.
    Code Ada 47 Ada.
    The old fox paints the tall gate.
    Find Ada 47 Ada.

As a corpus (source=needle) it teaches retrieval: facts anywhere, several questions at the end. As a test it has an
exact number of tokens and its fact at a given depth.

An answer takes two steps, as in induction heads (Olsson et al. 2022, arXiv:2209.11895): one layer stores at each number
the name before it, and a later one attends from the name in question to the number that stored it. Neither step lowers
the loss without the other, and a small model gives any of the numbers for thousands of steps. So every line repeats its
name behind the number, and the repeated name carries loss as the answers do: this teaches the first step within some
hundred steps.
"""

from itertools import accumulate, chain
from math import exp, log
from random import Random
from typing import NamedTuple

from distill.config.errors import DataError
from distill.config.schema import NeedleConfig
from distill.data.tokenizer import Ranges, Tokenizer

FORMAT = 3
"""Raise it when equal configurations would give other text."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ada Amy Ann Ben Bob Cal Dan Dot Eli Eva Fay Gil Gus Hal Ian Ida Ike Ivy Jan Jay Jim Joe Kay Ken Kim Lee Leo Liv "
    "Lou Mae Max Meg Mia Ned Nia Noa Pam Pat Peg Ray Rex Rob Ron Roy Sam Sid Sue Tim Tom Una Val Zoe"
)
NUMBERS = range(10, 100)
ADJECTIVES = _words("old red big dry low new odd raw sad shy tall dark cold fast kind long pale rich slow warm")
NOUNS = _words(
    "cat dog fox owl bee sea sun oak inn jar key map pen hat bird boat cake door fish gate hill lake moon star"
)
VERBS = _words("sees likes finds hides paints moves sells feeds keeps warms calls meets draws opens wakes follows")

FILLER, FACT, QUESTION = 9, 6, 6
"""Words, numbers, marks and line ends of one line."""


def filler(random: Random) -> str:
    pick = random.choice
    return f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} the {pick(ADJECTIVES)} {pick(NOUNS)}.\n"


def fact(name: str, number: int) -> str:
    return f"Code {name} {number} {name}.\n"


def question(name: str) -> str:
    return f"Find {name}"


def answer(number: int) -> str:
    return f" {number}"


def document(config: NeedleConfig, index: int) -> tuple[str, Ranges]:
    """Training text number `index`, and the characters that the text before them decides; always the same.

    These are the answers, and the names that lines repeat. The logarithm of the length is drawn evenly from the allowed
    range. Of the room in it, the share of filler is the cube of an even draw, thus mostly small, since questions teach
    more; then the number of facts is drawn evenly, and questions take the rest.
    """
    random = Random(f"{config.seed}/{index}")
    room = int(exp(random.uniform(log(config.shortest), log(config.longest + 1))))
    lines = int(random.random() ** 3 * ((room - FACT - QUESTION) // FILLER + 1))
    room -= lines * FILLER
    facts = random.randint(1, min(config.facts, (room - QUESTION) // FACT))
    room -= facts * FACT
    numbers = dict(zip(random.sample(NAMES, facts), random.choices(NUMBERS, k=facts)))
    names: list[str | None] = [None] * lines  # None: a line of filler
    for name in numbers:
        names.insert(random.randint(0, len(names)), name)
    text, ranges = "", []

    for line in names:
        if line is None:
            text += filler(random)
        else:
            text += fact(line, numbers[line])
            end = len(text) - len(".\n")
            ranges.append((end - len(f" {line}"), end))
    for name in random.choices(list(numbers), k=room // QUESTION):
        text += question(name)
        decided = answer(numbers[name]) + f" {name}"
        ranges.append((len(text), len(text) + len(decided)))
        text += decided + ".\n"
    return text, ranges


class NeedleTrial(NamedTuple):
    """One test of retrieval."""

    prompt: list[int]
    """Ids of the text and the question, bos included where the tokenizer has one."""
    answer: list[int]
    """Ids that continue the prompt if the model has found the needle."""
    stated: int
    """Position of the last token of the line that states the answer."""


def trial(tokenizer: Tokenizer, length: int, depth: float, facts: int, seed: tuple[int | float, ...]) -> NeedleTrial:
    """A haystack of exactly `length` tokens, question and answer included, with the needle at a share `depth` of it.

    Args:
        depth: 0: the first line, 1: the last before the question.
        facts: in all; those other than the needle lie anywhere.

    Raises:
        DataError: facts and question alone are more than `length` tokens.
    """
    random = Random(repr(seed))
    names, numbers = random.sample(NAMES, facts), random.sample(NUMBERS, facts)

    def ids(text: str) -> list[int]:
        return tokenizer.encode_batch([text], offsets=False)[0][0]

    needle, *others = [ids(fact(name, number)) for name, number in zip(names, numbers)]
    asked, answered = ids(question(names[0])), ids(answer(numbers[0]))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = length - sum(map(len, (bos, needle, *others, asked, answered)))
    if room < 0:
        raise DataError(
            f"evaluate.needle.lengths has {length}; {facts} facts and a question alone are {length - room} tokens"
        )
    hay: list[list[int]] = []
    while room:
        line = ids(filler(random))[-room:]  # the last one as if the text had been cut from a longer one
        hay.insert(0, line)
        room -= len(line)
    for other in others:
        hay.insert(random.randint(0, len(hay)), other)
    ends = [0, *accumulate(map(len, hay))]
    place = min(range(len(ends)), key=lambda line: abs(ends[line] - depth * ends[-1]))
    before = [*bos, *chain(*hay[:place])]
    prompt = [*before, *needle, *chain(*hay[place:]), *asked]
    return NeedleTrial(prompt, answered, len(before) + len(needle) - 1)
