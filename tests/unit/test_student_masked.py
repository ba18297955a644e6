"""What a token without weight holds reaches neither weights nor metrics."""

import math

import torch

from losses.weighting import Signals, Weighting
from student.weigher import Weigher


def test_a_weigher_gives_an_invalid_token_weights_of_0_whatever_its_losses_are():
    class ReadsLoss:
        reads_label = False

        def value(self, state, signals):
            return signals.student_loss_T / (1 + signals.student_loss_T)

        def metrics(self, state, signals, value_T):
            return {}

    valid_T, ones = torch.tensor([True, False, True]), torch.ones(3)
    none = torch.empty(0)
    signals = Signals(ones.long(), valid_T, *[ones] * 6, 1.0, none, none)
    weighting = Weighting(lambda step: 0.5, {"reads": ReadsLoss()})
    weigher = Weigher(weighting, {"reads": {}}, 0, signals, valid_T, 0 * ones)
    losses_T = torch.tensor([2.0, math.nan, 2.0])
    w_hard_T, w_soft_T = weigher(slice(0, 3), losses_T, losses_T)
    assert w_hard_T[1] == w_soft_T[1] == 0 and w_hard_T.isfinite().all() and w_soft_T[0] > 0
    norms = {"hard_norm": losses_T, "soft_norm": losses_T}
    whole = weigher.whole
    metrics = whole.means(norms) | weighting.metrics({"reads": {}}, whole.signals, whole.values)
    assert all(torch.as_tensor(mean.sum).isfinite() for mean in metrics.values())
