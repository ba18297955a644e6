"""The engine against plain PyTorch: any cut of a batch is the same step, any resume is the same run."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from distill.config.schema import OptimConfig, Schedule
from distill.engine.optim import decay_group, learning_rate
from distill.model.parametrization import scales
from tests.cli import PATIENCE
from tests.closeness import worst
from tests.workers import engine as worker


def launch(world, *arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    start = [sys.executable, "-m"]
    if world > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"]
    command = [*start, "tests.workers.engine", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " GB" not in done.stdout  # DeepSpeed's bf16 optimizer would print the memory in use


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("engine")
    for mode in ("cut", "resume"):
        for world in (1, 2):
            launch(world, out, mode)
    return {path.stem: load_file(path) for path in out.glob("*.safetensors")}


def reference(name):
    """Mean over the batch's valid tokens, clipped, plain optimizer: nothing of ours but the model and its factors."""
    net, config = worker.model(name).float(), worker.optim(name)
    groups = []
    for n, p in net.named_parameters():
        factors, decay = scales(net.config, n), getattr(config.weight_decay, decay_group(n))
        own = {"weight_decay": decay * factors.weight_decay, "eps": 1e-3 * factors.eps, "factor": factors.lr}
        groups.append({"params": [p], **own})
    optimizer = (
        torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
        if name == "sgd"
        else torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
    )
    norms = []
    for step in range(worker.STEPS):
        ids, labels, valid = worker.data(step)
        logits_TV, routing = net(ids, None, F.linear)
        loss_T = F.cross_entropy(logits_TV, labels.flatten(), reduction="none")
        loss_sum = loss_T[valid.flatten()].sum()
        for logits_TE, experts_TA in zip(routing.logits_LTE, routing.experts_LTA):
            loss_sum = loss_sum + worker.Z * (logits_TE.exp().sum(1).log()[valid.flatten()] ** 2).sum()
            for row in range(len(ids)):
                here = slice(row * ids.shape[1], (row + 1) * ids.shape[1])
                score = torch.sigmoid(logits_TE[here])
                mean = (score / score.sum(1, keepdim=True)).mean(0)
                count = torch.bincount(experts_TA[here].flatten(), minlength=4)
                loss_sum = loss_sum + worker.BALANCE * valid[row].sum() * (4 * count / count.sum() * mean).sum()
        optimizer.zero_grad()
        (loss_sum / valid.sum()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - 0.1 * step) * group["factor"]
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters()}, torch.stack(norms)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_cut_of_a_batch_is_one_step_of_plain_pytorch(results, world, zero, name, accumulation):
    want, norms = reference(name)
    got = results[f"cut-{world}"]
    prefix = f"{zero}/{name}/{accumulation}"
    # Clipping acts on some steps only, so a wrong scale cannot hide.
    assert norms.max() > worker.optim(name).clip > norms.min()
    assert worst(got[f"{prefix}/norms"], norms) < 1e-5
    for key, value in want.items():
        assert worst(got[f"{prefix}/param/{key}"], value) < 5e-5, key


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("saved", [(1, 0), (1, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("loaded", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_resume_is_bitwise_alike_and_close_in_another_world_or_stage(results, name, saved, loaded):
    whole = {
        k.split("/", 3)[3]: v for k, v in results[f"cut-{loaded[0]}"].items() if k.startswith(f"{loaded[1]}/{name}/1/")
    }
    prefix = f"ck-{saved[0]}-{saved[1]}-{name}/{loaded[1]}/"
    resumed = {k.removeprefix(prefix): v for k, v in results[f"resume-{loaded[0]}"].items() if k.startswith(prefix)}
    assert resumed.keys() == whole.keys() - {"norms"}
    for key, value in resumed.items():
        if saved == loaded:
            assert torch.equal(value, whole[key]), key
        else:
            assert worst(value, whole[key]) < 5e-5, key


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1])
def test_in_bf16_weights_and_sums_of_micro_batches_are_fp32_and_another_stage_loads_them(results, world, zero):
    net = worker.model("sgd").bfloat16()
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in net.named_parameters()}
    for index in range(worker.MICRO):
        net.zero_grad()
        worker.micro_loss(worker.micro_batch(index))(net).backward()
        for name, p in net.named_parameters():
            sums[name] += p.grad.double()
    found = {k.removeprefix(f"bf16/{zero}/"): v for k, v in results[f"cut-{world}"].items() if k.startswith("bf16/")}
    for name, before in worker.model("sgd").named_parameters():
        after = found[f"param/{name}"]
        assert after.dtype == torch.float32
        assert worst(before.detach().bfloat16().double() - after.double(), sums[name]) < 1e-5, name
        assert torch.equal(found[f"rounded/{name}"], after.bfloat16()), name
    kept = {key for key in found if key.startswith(("param/", "momentum_buffer/"))}
    assert all(torch.equal(found[f"moved/{key}"], found[key]) for key in kept) and len(kept) == 2 * len(sums)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_a_rehearsed_step_of_any_size_leaves_no_trace(results, world, zero, dtype):
    assert results[f"cut-{world}"][f"rehearsed/{zero}/{dtype}"].tolist() == [0, 0]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1])
def test_in_fp8_a_step_casts_each_weight_once_for_all_micro_batches_and_their_recomputation(results, world, zero):
    casts, losses = (results[f"cut-{world}"][f"fp8/{zero}/{key}"] for key in ("casts", "losses"))
    # Both ways in both layers: four projections of attention, three of the shared expert, two of the routed ones.
    assert casts.shape == (3, 2 * 2 * (4 + 3 + 2)) and bool((casts == 1).all())
    assert torch.equal(losses[:, 0], losses[:, 1]) and len(losses.unique()) == 3


@pytest.mark.parametrize(
    ("kind", "step", "want"),
    [
        ("constant", 50, 1.0),
        ("constant", 4, 0.5),
        ("linear", 10, 1.0),
        ("linear", 55, 0.55),
        ("cosine", 55, 0.55),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 99, 0.145),
    ],
)
def test_learning_rate_by_hand(kind, step, want):
    config = OptimConfig(lr=1.0, schedule=Schedule[kind], warmup=0.1, decay=0.2, final_lr=0.1)
    assert learning_rate(config, step, 100) == pytest.approx(want)


def test_every_parameter_of_the_model_has_its_decay_group():
    groups = {n: decay_group(n) for n, _ in worker.model("adamw").named_parameters()}
    assert {n for n, g in groups.items() if g == "norms"} == {
        n for n, p in worker.model("adamw").named_parameters() if p.ndim == 1
    }
    assert [n for n, g in groups.items() if g == "embedding"] == ["embed.weight"]
    assert [n for n, g in groups.items() if g == "head"] == ["head.weight"]
    assert {n.split(".")[-2] for n, g in groups.items() if g == "router"} == {"router"}
    assert sum(g == "matrices" for g in groups.values()) > 8
