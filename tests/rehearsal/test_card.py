"""What the rehearsal is there to find, planted: each fault is an error that names our line."""

import ast
import math
from unittest import mock

import numpy as np
import pytest
import torch

from distill.cache import Picks
from distill.engine.waits import MAY_WAIT
from distill.tracking.meters import Meters
from tests.rehearsal import test_rehearsal as steps
from tests.rehearsal.card import DEVICE, ROOT, RehearsalError, inserted
from tests.rehearsal.plain_engine import backward

HOST = torch.ones(3)


def _pinned_copy(x):
    HOST.pin_memory().to(DEVICE)


def _in_pieces(x):
    torch.ones(3, 4).pin_memory()[:, ::2].to(DEVICE, non_blocking=True)


def _out_of_the_card(x):
    torch.empty(3).copy_(x, non_blocking=True)


MIXED = {
    "a sum": lambda x: x + HOST,
    "a number among tensors": lambda x: torch.stack([x[0], HOST[0]]),
    "indices": lambda x: x.index_select(0, torch.arange(2)),
    "a product": lambda x: torch.mm(x[:, None], HOST[None]),
}
WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x),
    "to the host": _out_of_the_card,
    "mask": lambda x: x[x > 0],
    "mask to write": lambda x: x.__setitem__(x > 0, x.sum()),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: torch.bincount(x.long()),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "synchronize by its other name": lambda x: torch.accelerator.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
    "event by its other name": lambda x: torch.Event(DEVICE).synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "printed": lambda x: print(x),
    "in a text": lambda x: f"{x}",
    "a number in a text": lambda x: f"{x.sum():.3f}",
    "pageable": lambda x: HOST.to(DEVICE),
    "pageable, not blocking": lambda x: HOST.to(DEVICE, non_blocking=True),
    "pinned, blocking": _pinned_copy,
    "pinned, in pieces": _in_pieces,
    "new tensor": lambda x: torch.tensor([1.0], device=DEVICE),
    "from numpy": lambda x: torch.as_tensor(np.ones(3)).to(DEVICE),
    "index of a list": lambda x: x[[0, 1]],
    "index on the host": lambda x: x[torch.arange(2)],
    "write a number": lambda x: x.__setitem__(0, 1.0),
}


@pytest.mark.parametrize("name", [*MIXED, *WAITS])
def test_a_planted_fault_is_an_error_with_its_line(name, monkeypatch):
    fault = (MIXED | WAITS)[name]
    slot = Meters._slot

    def planted(self, key, size):
        fault(torch.ones(3, device=DEVICE))
        return slot(self, key, size)

    monkeypatch.setattr(Meters, "_slot", planted)
    line = r'distill/tracking/meters.py:\d+: .*\n    slot = self._slot\(f"mean'
    with inserted() as card, card.step(), pytest.raises(RehearsalError, match=line):
        Meters(DEVICE).add("x", 1.0, 1.0)
    if name in WAITS:
        with inserted():  # outside of a step these cost time and nothing else
            Meters(DEVICE).add("x", 1.0, 1.0)


def test_what_is_right_is_no_error():
    with inserted() as card, card.step():
        x = HOST.pin_memory().to(DEVICE, non_blocking=True)
        x[:1] = 1.0
        (x * HOST.sum() + math.pi).clamp(min=0).sum().isfinite()
        kept = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        torch.cuda.Event().record()
        assert kept.device.type == "cpu" and HOST.sum().item() == 3 and len(HOST[HOST > 0]) == 3


def test_a_fault_in_the_backward_pass():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    with inserted() as card, card.step(), pytest.raises(RehearsalError, match="on the host"):
        backward(Reads.apply(torch.ones(3, device=DEVICE, requires_grad=True)).sum())


@pytest.mark.parametrize(
    "place, fault, line",
    [
        ("distill.data.join.sent", lambda tensor, device: tensor.to(device), "join.py"),
        ("distill.model.segments.sent", lambda tensor, device: tensor.to(device), "segments.py"),
        ("student.distilling.sent", lambda tensor, device: tensor, "distilling.py"),
        ("distill.run.trainer.load_stats", lambda counts_LE: {"most": counts_LE.max().item()}, "trainer.py"),
    ],
)  # fmt: skip
def test_a_whole_step_finds_a_planted_fault(place, fault, line):
    with mock.patch(place, fault), pytest.raises(RehearsalError, match=line):
        steps.learn()


def test_a_capture_waits_for_its_targets_and_for_nothing_beside_them():
    cat = Picks.cat

    def fault(selections):
        picks = cat(selections)
        picks.entropy_T[picks.entropy_T > 0]
        return picks

    with mock.patch.object(Picks, "cat", fault), pytest.raises(RehearsalError, match=r"capture\.py"):
        steps.teach()


def test_a_fault_is_none_where_the_host_may_wait():
    with inserted() as card, card.step():
        meters = Meters(DEVICE)
        meters.add("x", torch.ones((), device=DEVICE), 1.0)
        meters.flush()
    assert card.waited == {"distill/tracking/meters.py:Meters.flush"}


@pytest.mark.parametrize("place", MAY_WAIT)
def test_a_place_that_may_wait_is_there(place):
    path, name = place.split(":")
    scopes, names = [(ast.parse((ROOT / path).read_text()), "")], set()
    for node, prefix in scopes:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                local = ".<locals>." if isinstance(child, ast.FunctionDef) else "."
                scopes.append((child, prefix + child.name + local))
    assert name in names
