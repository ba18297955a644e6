"""Plants something that is not finite into a training step; as a program, runs a job with it (tests/fault).

python -m tests.workers.diverge ROLE STEP RANK KIND job=... ...      KIND: loss | gradient | logits | weights
"""

import dataclasses
import os
import sys

import torch

from distill.engine.deepspeed_engine import Engine
from distill.run.trainer import Trainer
from student.distilling import StudentRecipe
from teacher import pretraining
from teacher.pretraining import TeacherRecipe


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
    recipe = {"teacher": TeacherRecipe, "student": StudentRecipe}[role]
    train_step, forward, update, head = Trainer._train_step, recipe.forward, Engine.update, pretraining.head_loss
    here = {"now": False}

    def note(self, batch):
        here["now"] = self.role == role and self.step + 1 == step and self.dist.rank == rank
        train_step(self, batch)
        here["now"] = False

    def spoiled(self, model, micro, plan):
        out = forward(self, model, micro, plan)
        if here["now"] and kind == "loss":
            out = dataclasses.replace(out, loss_sum=out.loss_sum + torch.inf)
        if here["now"] and kind == "gradient":
            out = dataclasses.replace(out, loss_sum=_BrokenGradient.apply(out.loss_sum))
        return out

    def logits(hidden_TD, *arguments, **more):
        return head(hidden_TD * (torch.nan if here["now"] else 1.0), *arguments, **more)

    def overflow(self, lr):
        norm = update(self, lr)
        if here["now"]:
            # An embedding that no text of the test has: nothing else would show it.
            self.model.embed.weight.data[-1, 0] = torch.inf
        return norm

    patch(Trainer, "_train_step", note)
    patch(recipe, "forward", spoiled)
    if kind == "logits":
        patch(pretraining, "head_loss", logits)
    if kind == "weights":
        patch(Engine, "update", overflow)


if __name__ == "__main__":
    role, step, rank, kind = sys.argv[1:5]
    if int(os.environ.get("RANK", "0")) == int(rank):
        plant(setattr, role, int(step), int(rank), kind)
    del sys.argv[1:5]
    from distill.__main__ import main

    sys.exit(main())
