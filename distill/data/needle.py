"""Needle in a haystack: made-up text that hides facts among filler, and questions that only those facts answer.

    The pale lake follows the dark star.
    Code Ada 47 Ada.
    The old fox paints the tall gate.
    Find Ada 47 Ada.

As a corpus (source=needle) it teaches retrieval: facts anywhere, several questions at the end. As a test it is built to
the token: facts at a depth of one's choice in a text of an exact length.

To answer takes two steps, as in induction heads (Olsson et al. 2022, arXiv:2209.11895): one layer notes at each number
the name before it, a later one looks from the name in question for the number that noted it. Neither pays without the
other, and a small model stays for thousands of steps at naming any of the numbers. So every line says its name again
behind the number, and that carries loss as the answers do: it is learned within some hundred steps, and is step one.
"""

from __future__ import annotations

from itertools import accumulate, chain
from math import exp, log
from random import Random
from typing import NamedTuple

from distill.config.errors import DataError
from distill.config.schema import NeedleConfig
from distill.data.gaps import Ranges
from distill.data.tokenizer import Tokenizer

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
"""Words, numbers, marks and line ends of one line of each kind."""


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
    """Training text number `index`, and the [start, end) characters that what is before them decides; always the same.

    These are the answers, and the name where a line says it again. The logarithm of the length is drawn evenly from
    what the configuration allows; then the lines of filler and the number of facts from what there is room for, facts
    evenly, filler as the cube of what is drawn evenly: mostly little, since questions, which take the rest, teach more.
    """
    random = Random(f"{config.seed}/{index}")
    room = int(exp(random.uniform(log(config.shortest), log(config.longest + 1))))
    lines = int(random.random() ** 3 * ((room - FACT - QUESTION) // FILLER + 1))
    room -= lines * FILLER
    facts = random.randint(1, min(config.facts, (room - QUESTION) // FACT))
    room -= facts * FACT
    numbers = dict(zip(random.sample(NAMES, facts), random.choices(NUMBERS, k=facts)))
    told: list[str | None] = [None] * lines
    for name in numbers:
        told.insert(random.randint(0, len(told)), name)
    text, ranges = "", []

    def mark(start: int, marked: str) -> None:
        ranges.append((start, start + len(marked)))

    for line in told:
        if line is None:
            text += filler(random)
        else:
            text += fact(line, numbers[line])
            mark(len(text) - len(f" {line}.\n"), f" {line}")
    for name in random.choices(list(numbers), k=room // QUESTION):
        text += question(name)
        mark(len(text), answer(numbers[name]) + f" {name}")
        text += answer(numbers[name]) + f" {name}.\n"
    return text, ranges


class Trial(NamedTuple):
    """One test: what a model is given, and what it should say."""

    prompt: list[int]
    """Ids, bos included where the tokenizer has one."""
    answer: list[int]
    stated: int
    """Position of the last token of the line that states the answer."""


def trial(tokenizer: Tokenizer, length: int, depth: float, facts: int, seed: tuple[int | float, ...]) -> Trial:
    """A haystack of exactly `length` tokens, question and answer included, with the needle at a share `depth` of it.

    Args:
        depth: 0: the first line, 1: the last before the question.
        facts: in all; those that are not asked for lie anywhere.

    Raises:
        DataError: facts and question alone are more than `length` tokens.
    """
    random = Random(repr(seed))
    names, numbers = random.sample(NAMES, facts), random.sample(NUMBERS, facts)

    def ids(text: str) -> list[int]:
        return tokenizer.encode_batch([text], offsets=False)[0][0]

    needle, *others = [ids(fact(name, number)) for name, number in zip(names, numbers)]
    asked, said = ids(question(names[0])), ids(answer(numbers[0]))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = length - sum(map(len, (bos, needle, *others, asked, said)))
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
    return Trial(prompt, said, len(before) + len(needle) - 1)
