"""The student's loss: which row function takes its labels and targets, and the matching of hidden states beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.cache import SoftTargets
from distill.config import soft_losses
from distill.config.registry import LOSSES, LossEntry
from distill.config.schema import StudentConfig
from losses import HeadLoss, Mixed, RowFunction, head_loss
from losses.bucketed import Bucketed
from losses.checked import Checked
from losses.dense import Dense
from losses.matching import hidden_match
from losses.mixed import Weigh
from student.weigher import Weigher


class SoftLoss:
    """`student.loss` with its options, which `distill.config.soft_losses` has allowed for its targets.

    Args:
        codecs: of the caches that are read; empty: none.
        projector: takes hidden states [T, D] to the width of the teacher's; None: they are not matched.
        debug: labels, atoms and weights are checked.
    """

    def __init__(
        self,
        config: StudentConfig,
        codecs: Sequence[str] = (),
        projector: nn.Module | None = None,
        debug: bool = False,
    ):
        self._entry, self._match, self._projector = LOSSES[config.loss], config.hidden_match, projector
        self._chunk, self._debug = config.train.head_chunk, debug
        options = soft_losses.options_of(config)
        self._temperature = options.get("temperature", 1.0)
        self._divergence = self._entry.divergence(options) if isinstance(self._entry, LossEntry) else None
        self._exact = {soft_losses.form_of(codec) for codec in codecs} == {soft_losses.BUCKET}
        self._as_mixed = config.loss == "mixed" or not self._exact
        self._is_cross_entropy = config.loss == "mixed" or (
            self._divergence is not None and self._as_mixed and bool(codecs)
        )
        self._is_linear = soft_losses.verdict(config.loss, self._temperature, soft_losses.SAMPLED).startswith("yes")

    def rows(
        self,
        labels_T: Tensor,
        weigh: Weigh,
        targets: SoftTargets | None,
        teacher: tuple[Tensor, Tensor] | None,
        norms: bool = False,
    ) -> RowFunction:
        """The row function of a micro-batch; teacher: hidden states [T, E] and unembedding [U, E] of a live one; norms:
        of gradients are among its parts, but of a module's loss only where it is a `Mixed`."""
        atoms = () if targets is None else (targets.ids_TK, targets.probs_TK)
        if self._divergence is None:
            made: RowFunction = self._entry(labels_T, weigh, *atoms)
            return made._replace(norms=norms) if isinstance(made, Mixed) else made
        if not atoms:
            return Mixed(labels_T, weigh, norms=norms)
        if teacher is not None:
            return Dense(labels_T, weigh, *teacher, self._divergence, self._temperature, norms)
        if self._as_mixed:
            assert self._is_linear, "the configuration allows no other loss of atoms that were drawn"
            return Mixed(labels_T, weigh, *atoms, norms=norms)
        return Bucketed(labels_T, weigh, *atoms, self._divergence, self._temperature, norms)

    def least(self, targets: SoftTargets) -> Tensor:
        """The least that the part `soft` of each token can be, nats [T]; the rest of it is a divergence."""
        if not self._is_cross_entropy:
            return torch.zeros_like(targets.entropy_T)
        if not self._exact:
            return targets.entropy_T
        # The bucket is left out: the entropy of the atoms, which need not add up to 1.
        probs_TK, mass_T = targets.probs_TK, targets.probs_TK.sum(-1)
        return torch.xlogy(mass_T, mass_T) - torch.xlogy(probs_TK, probs_TK).sum(-1)

    def head(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        rows: RowFunction,
        weigher: Weigher | None,
        teacher_TE: Tensor | None,
    ) -> HeadLoss:
        """The head's pass; with a projector also the part `hidden_match`, whose coefficient is a share of the soft
        term's weight."""
        head = head_loss(hidden_TD, weight_VD, Checked(rows) if self._debug else rows, chunk=self._chunk)
        if self._projector is None or teacher_TE is None or weigher is None:
            return head
        w_soft_T = weigher.whole.soft_T
        match_T = hidden_match(self._projector(hidden_TD), teacher_TE)
        loss_sum = head.loss_sum + self._match * (w_soft_T * match_T).sum()
        return head._replace(loss_sum=loss_sum, parts=head.parts | {"hidden_match": match_T.detach()})
