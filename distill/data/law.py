"""A made-up language whose next-symbol law is known, so that a model's excess loss over it is exact.

    log p(next | text) = log softmax(common + table_1[last] + table_2[last two] + ... + topics[first])

`common` gives symbols, and so contexts, frequencies like Zipf's. The tables are random; each row has a strength of its
own, so contexts differ in entropy. Frequent contexts are learned soon and rare ones late, the longer the later, and the
topic takes attention to the document's first symbol: the loss falls over a whole run, at any size of model.

As a corpus (source=law) a document is a text of one-byte characters. With a tokenizer without merges
(data.tokenizer.vocab_size=258) each is one token. The first symbol names the topic; the law speaks of all that follow.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.config.errors import DataError
from distill.config.schema import LawConfig
from distill.data.tokenizer import Tokenizer

FORMAT = 1
"""Raise it when equal configurations would give other text."""
BLOCK = 512
"""Documents that are drawn together; how many there are changes none of them."""

Symbols = NDArray[np.int64]
"""Numbers of symbols; the number of symbols itself stands for none."""
Floats = NDArray[np.float64]


class Contexts(NamedTuple):
    """What the law of T next symbols depends on."""

    topic_T: Symbols
    """The first symbol of the document; none: that one itself comes next."""
    before_TK: Symbols
    """The last symbols, the last one first; none where the document has fewer."""


class Law:
    """The law of one configuration, over its N symbols."""

    def __init__(self, config: LawConfig):
        self.config = config
        n, random = config.symbols, np.random.default_rng([config.seed, FORMAT])
        self._common_N = -np.log(2.0 + random.permutation(n))

        def table(rows: int) -> Floats:
            strength_R = config.strength * 2.0 ** random.uniform(-1.0, 1.0, rows)
            return random.standard_normal((rows, n)) * strength_R[:, None]

        self._topics = table(n + 1)
        self._topics[n] = 0.0
        self._tables = [table((n + 1) ** k) for k in range(1, config.order + 1)]

    def logprobs(self, contexts: Contexts) -> Floats:
        """Log-probabilities [T, N] of the next symbol."""
        logits_TN = self._common_N + self._topics[contexts.topic_T]
        row_T = np.zeros_like(contexts.topic_T)
        for k, table in enumerate(self._tables):
            row_T = row_T * (self.config.symbols + 1) + contexts.before_TK[:, k]
            logits_TN += table[row_T]
        top_T = logits_TN.max(-1, keepdims=True)
        return logits_TN - (top_T + np.log(np.exp(logits_TN - top_T).sum(-1, keepdims=True)))

    def documents(self, count: int) -> Iterator[str]:
        """The first `count` documents."""
        for start in range(0, count, BLOCK):
            for symbols in self._block(start // BLOCK)[: count - start]:
                yield bytes(symbols.astype(np.uint8) + self.config.first).decode("ascii")

    def _block(self, block: int) -> Symbols:
        """[BLOCK, length] symbols."""
        c = self.config
        random = np.random.default_rng([c.draw, block, c.seed, FORMAT])
        symbols = np.full((BLOCK, c.order + c.length), c.symbols)
        topic_B = np.full(BLOCK, c.symbols)
        for place in range(c.order, c.order + c.length):
            before_BK = symbols[:, place - c.order : place][:, ::-1]
            shares_BN = np.exp(self.logprobs(Contexts(topic_B, before_BK))).cumsum(-1)
            drawn_B = random.random(BLOCK) * shares_BN[:, -1]
            symbols[:, place] = (shares_BN <= drawn_B[:, None]).sum(-1).clip(max=c.symbols - 1)
            if place == c.order:
                topic_B = symbols[:, place]
        return symbols[:, c.order :]


class Alphabet:
    """The symbols of a law as ids of a tokenizer, and the law's contexts in packed samples.

    Attributes:
        ids_N: id of each symbol.

    Raises:
        DataError: the tokenizer has no bos, or a symbol is not one token.
    """

    def __init__(self, config: LawConfig, tokenizer: Tokenizer):
        self.config = config
        texts = [chr(config.first + symbol) for symbol in range(config.symbols)]
        encoded = [text.ids for text in tokenizer.encode_batch(texts, offsets=False)]
        if tokenizer.bos_id is None or any(len(ids) != 1 for ids in encoded):
            raise DataError(
                f"{tokenizer.name}: a corpus with source=law takes a bos token (data.tokenizer.bos) and one token a "
                "byte (data.tokenizer.vocab_size=258)"
            )
        self._bos_id, self.ids_N = tokenizer.bos_id, np.array([ids[0] for ids in encoded])
        self._symbol_V = np.full(max(tokenizer.vocab_size, self.ids_N.max() + 1), config.symbols)
        self._symbol_V[self.ids_N] = np.arange(config.symbols)

    def contexts(
        self, ids_BS: Symbols, labels_BS: Symbols, documents_BS: Symbols
    ) -> tuple[NDArray[np.bool_], Contexts]:
        """Which labels the law speaks of [B, S], and the contexts of these, in order.

        Not of a document's first symbol, nor of bos and eos, nor of documents whose beginning is in an earlier sample.
        """
        none, length = self.config.symbols, ids_BS.shape[1]
        place_S = np.arange(length)
        begins_BS = np.diff(documents_BS, axis=1, prepend=-1) != 0
        start_BS = np.maximum.accumulate(np.where(begins_BS, place_S, 0), axis=1)
        symbol_BS = self._symbol_V[ids_BS]

        def at(place_BS: Symbols) -> Symbols:
            return np.take_along_axis(symbol_BS, place_BS.clip(0, length - 1), axis=1)

        topic_BS = at(start_BS + 1)
        before = [
            np.where(place_S - k > start_BS, at(np.broadcast_to(place_S - k, ids_BS.shape)), none)
            for k in range(self.config.order)
        ]
        whole_BS = np.take_along_axis(ids_BS, start_BS, axis=1) == self._bos_id
        spoken_BS = whole_BS & (place_S > start_BS) & (topic_BS < none) & (before[0] < none)
        spoken_BS &= self._symbol_V[labels_BS] < none
        return spoken_BS, Contexts(topic_BS[spoken_BS], np.stack([b[spoken_BS] for b in before], axis=-1))
