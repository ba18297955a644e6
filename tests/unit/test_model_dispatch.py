"""The dispatcher of the MoE layer: handed in, in one process and over two, and chosen by name."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from distill.config.registry import DISPATCHERS, PRECISIONS
from distill.config.schema import PrecisionConfig
from distill.model import Transformer
from distill.model.dispatch import LocalDispatcher
from distill.model.parts import PLAIN, Parts
from distill.model.precision import Numerics, numerics_of
from tests.closeness import worst
from tests.unit.test_model_attention import config_of
from tests.workers import expert_parallel


@pytest.mark.parametrize("active", [1, 3])
def test_rows_are_sorted_by_expert_and_combined_by_token(active):
    torch.manual_seed(0)
    hidden_TD, weight_TA = torch.randn(11, 4), torch.rand(11, active)
    experts_TA = torch.stack([torch.randperm(5)[:active] for _ in range(11)])
    there = LocalDispatcher().dispatch(hidden_TD, experts_TA, weight_TA, 6)
    rows = [(e, t, a) for t, row in enumerate(experts_TA.tolist()) for a, e in enumerate(row)]
    rows.sort(key=lambda row: row[:2])
    assert torch.equal(there.x_RD, torch.stack([hidden_TD[t] * weight_TA[t, a] for _, t, a in rows]))
    counts = [sum(e == row[0] for row in rows) for e in range(6)]
    assert there.counts_E.tolist() == counts and there.counts_E.dtype == torch.int64
    assert there.ends_E.tolist() == [sum(counts[: e + 1]) for e in range(6)] and there.ends_E.dtype == torch.int32
    combined = LocalDispatcher().combine(there.x_RD, there.state)
    assert worst(combined, hidden_TD * weight_TA.sum(1, keepdim=True)) < 1e-6
    assert list(LocalDispatcher().held(6)) == list(range(6))


def test_the_dispatcher_handed_in_serves_every_moe_layer():
    class Counting(LocalDispatcher):
        calls = 0

        def dispatch(self, *arguments):
            self.calls += 1
            return super().dispatch(*arguments)

    dispatcher = Counting()
    torch.manual_seed(0)
    ours = Transformer(config_of(), Parts(dispatcher=dispatcher))
    torch.manual_seed(0)
    ids_BS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours.logits(ids_BS), Transformer(config_of()).logits(ids_BS))
    assert dispatcher.calls == 2


def test_parts_follow_from_the_names_of_a_run(monkeypatch):
    cpu = torch.device("cpu")
    assert Parts.of(numerics_of(PrecisionConfig("fp32"), cpu), "local")[:2] == PLAIN[:2]
    for registry in (DISPATCHERS, PRECISIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    double, product = (lambda x, weight: x @ weight.T * 2), (lambda x, weight, ends_E: x)

    class Toy(LocalDispatcher):
        pass

    DISPATCHERS.add("toy", Toy)
    PRECISIONS.add("toy", Numerics(torch.float32, double, product))
    linear_fn, grouped_fn, dispatcher, _ = Parts.of(numerics_of(PrecisionConfig("toy"), cpu), "toy")
    assert (linear_fn, grouped_fn, type(dispatcher)) == (double, product, Toy)


def test_half_of_the_experts_in_each_of_two_processes(tmp_path):
    """The protocol carries an all-to-all: logits, counts and gradients are those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run([*command, "tests.workers.expert_parallel", str(tmp_path)], check=True, timeout=300)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    model = expert_parallel.whole()
    logits_TV, routing = expert_parallel.backward(model, expert_parallel.batch())
    assert worst(torch.cat([rank["logits"] for rank in ranks]), logits_TV) < 1e-5
    assert torch.equal(ranks[0]["counts"] + ranks[1]["counts"], routing.counts_LE)
    for name, parameter in model.named_parameters():
        grads = [rank[f"grad/{name}"] for rank in ranks]
        found = torch.cat(grads) if ".experts." in name else grads[0] + grads[1]
        assert worst(found, parameter.grad) < 1e-5, name
