"""Excess loss on text of a known law: how far a model's predictions are from the law itself, exactly."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.config.schema import LawConfig
from distill.data.join import Batch
from distill.data.law import Alphabet, Law
from distill.data.tokenizer import Tokenizer
from distill.engine.dist import Dist
from losses import Mixed, fixed, head_loss


class Excess(NamedTuple):
    """Means over the held-out tokens that laws speak of, nats."""

    excess: float
    """KL(law || model)."""
    entropy: float
    """Of the law: the loss of a model without excess."""
    tokens: int
    corpora: dict[str, float]
    """Excess on each corpus that has a law."""


@torch.no_grad()
def excess(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    laws: Mapping[str, LawConfig],
    tokenizer: Tokenizer,
    dist: Dist,
) -> Excess:
    """Every rank gives its own batches, each of one corpus; the result is that of all of them. Collective.

    Args:
        names: of the corpora, in the batches' order.
        laws: by corpus; others do not count.
    """
    training = model.training
    model.eval()
    known = {name: (Law(config), Alphabet(config, tokenizer)) for name, config in laws.items()}
    sums_C3 = torch.zeros(len(names), 3, dtype=torch.float64, device=dist.device)  # excess, entropy, tokens
    for batch in batches:
        corpus = int(batch.corpus_B[0])
        if names[corpus] in known:
            sums_C3[corpus] += _sums(model, batch, *known[names[corpus]], dist.device)
    model.train(training)
    sums_C3 = dist.sum(sums_C3)
    total, entropy, tokens = sums_C3.sum(0).tolist()
    assert tokens, "a law of the held-out text"
    means_C = (sums_C3[:, 0] / sums_C3[:, 2]).tolist()
    corpora = {name: mean for name, mean in zip(names, means_C) if name in known}
    return Excess(total / tokens, entropy / tokens, int(tokens), corpora)


def _sums(model: nn.Module, batch: Batch, law: Law, alphabet: Alphabet, device: torch.device) -> Tensor:
    """Excess and entropy, added up over the tokens of a batch that the law speaks of, and their number."""
    spoken_BS, contexts = alphabet.contexts(
        *(part.numpy() for part in (batch.ids_BS, batch.labels_BS, batch.documents_BS))
    )
    spoken_T = torch.from_numpy(spoken_BS).flatten().logical_and(batch.valid_BS.flatten())
    assert spoken_T.sum() == spoken_BS.sum(), "every symbol within a document carries loss"
    law_sN = torch.from_numpy(law.logprobs(contexts)).to(device)
    number_T = torch.cumsum(spoken_T, 0) - 1
    ids_N = torch.from_numpy(alphabet.ids_N).to(device)

    def distance(rows: slice, logits_tV: Tensor, lse_t: Tensor) -> tuple[Tensor]:
        mine_t = spoken_T[rows]
        truth_sN = law_sN[number_T[rows][mine_t].to(device)]
        mine_t = mine_t.to(device)
        model_sN = (logits_tV[mine_t][:, ids_N] - lse_t[mine_t, None]).double()
        return ((truth_sN.exp() * (truth_sN - model_sN)).sum(-1),)

    moved = batch.to(device)
    labels_T, valid_T = moved.labels_BS.flatten(), moved.valid_BS.flatten()
    head_fn = partial(head_loss, row_function=Mixed(labels_T, fixed(valid_T.float()), select=distance))
    head, _ = model(moved.ids_BS, moved.documents_BS, head_fn, moved.images)
    total = sum(part[0].sum() for part in head.selected)
    entropy = -(law_sN.exp() * law_sN).sum()
    return torch.stack([torch.as_tensor(total, device=device), entropy, spoken_T.sum().double().to(device)])
