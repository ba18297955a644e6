"""Plants something that is not finite into a training step; as a program, runs a job with it (tests/fault).

python -m tests.workers.diverge ROLE STEP RANK KIND job=... ...      KIND: loss | gradient | logits | weights
"""

import os
import sys

import torch

from distill.engine.zero import Engine
from student.distilling import StudentStep
from teacher import pretraining as teacher_step
from teacher.pretraining import TeacherStep


class _BrokenGradient(torch.autograd.Function):
    """The same number, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def plant(patch, role, step, rank, kind):
    """patch: of a class or module, `setattr` or pytest's. step: as rows of metrics count them."""
    program = {"teacher": TeacherStep, "student": StudentStep}[role]
    begin, loss, update, head = program.begin, program.loss, Engine.step, teacher_step.mixed_loss
    here = {"now": False}

    def note(self, batch, at, dist):
        here["now"] = at + 1 == step and dist.rank == rank
        return begin(self, batch, at, dist)

    def spoiled(self, model, batch):
        loss_sum, routing = loss(self, model, batch)
        if here["now"] and kind == "loss":
            loss_sum = loss_sum + torch.inf
        if here["now"] and kind == "gradient":
            loss_sum = _BrokenGradient.apply(loss_sum)
        return loss_sum, routing

    def logits(hidden_TD, *arguments, **more):
        return head(hidden_TD * (torch.nan if here["now"] else 1.0), *arguments, **more)

    def overflow(self, *arguments):
        norm = update(self, *arguments)
        if here["now"]:
            here["now"] = False
            # An embedding that no text of the test has: nothing else would show it.
            self.model.embed.weight.data[-1, 0] = torch.inf
        return norm

    patch(program, "begin", note)
    patch(program, "loss", spoiled)
    if kind == "logits":
        patch(teacher_step, "mixed_loss", logits)
    if kind == "weights":
        patch(Engine, "step", overflow)


if __name__ == "__main__":
    role, step, rank, kind = sys.argv[1:5]
    if int(os.environ.get("RANK", "0")) == int(rank):
        plant(setattr, role, int(step), int(rank), kind)
    del sys.argv[1:5]
    from distill.__main__ import main

    sys.exit(main())
