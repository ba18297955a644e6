"""Run under 1 or 2 ranks by tests/unit/test_engine.py: trains a tiny Transformer through the engine.

python -m tests.workers.engine OUT MODE      MODE: cut | resume
"""

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as torch_dist
from safetensors.torch import save_file

from distill.config.schema import (
    BaseSizes,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    Parametrization,
    PrecisionConfig,
    WeightDecay,
)
from distill.engine import checkpoint
from distill.engine import dist as engine_dist
from distill.engine.deepspeed_engine import Engine
from distill.model import Transformer
from distill.model.fp8 import Fp8
from distill.model.parts import Parts
from distill.model.precision import numerics_of
from losses import mixed_loss, routing_loss

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, expert_hidden=16, dense_hidden=32,
    experts=4, moe_step=1, chunk_size=8,
)  # fmt: skip
BASE = BaseSizes(hidden_size=8, layers=1, expert_hidden=4, dense_hidden=8)
STEPS, BATCH, LENGTH = 4, 4, 12
MICRO = 64
"""Micro-batches of the step in bf16, over all ranks; their gradients are about alike, so that a sum in bf16 stalls."""
BALANCE, Z = 0.3, 0.1  # large, so that a gradient that is lost or scaled shows


def model(name):
    """Under AdamW every kind of parameter has its own learning rate, eps and weight decay."""
    torch.manual_seed(0)
    transfer = dataclasses.replace(MODEL, parametrization=Parametrization.transfer, base=BASE)
    return Transformer(transfer if name == "adamw" else MODEL)


def data(step):
    """ids, labels and a mask whose rows differ much in their number of valid tokens."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(64, (BATCH, LENGTH), generator=g)
    labels = torch.randint(64, (BATCH, LENGTH), generator=g)
    valid = torch.arange(LENGTH) < torch.tensor([12, 1, 5, 9])[:, None]
    return ids, labels, valid


def optim(name):
    lr = 1e-2 if name == "adamw" else 0.5
    # Clipping acts on some steps only. A large eps: near zero gradients AdamW would otherwise turn rounding into whole
    # steps.
    clip = 0.9 if name == "adamw" else 1.5
    return OptimConfig(
        optimizer=OptimizerName[name], lr=lr, eps=1e-3, clip=clip, weight_decay=WeightDecay(matrices=0.1, head=0.3)
    )


def micro_loss(rows):
    ids, labels, valid = rows

    def loss(net):
        weights = valid.flatten().float()

        def head(hidden, weight):
            return mixed_loss(hidden, weight, labels.flatten(), weights).loss_sum

        loss_sum, routing = net(ids, None, head)
        return loss_sum + routing_loss(routing.logits_LTE, routing.experts_LTA, valid, balance=BALANCE, z=Z)[0]

    return loss


def train(engine, dist, first, stop, accumulation):
    norms = []
    share = BATCH // dist.world
    for step in range(first, stop):
        mine = [x[dist.rank * share : (dist.rank + 1) * share] for x in data(step)]
        micro = share // accumulation
        cuts = [[x[i * micro : (i + 1) * micro] for x in mine] for i in range(accumulation)]
        valid = dist.sum(mine[2].sum())
        for cut in cuts:
            engine.backward(micro_loss(cut)(engine.training_model), valid)
        norms.append(engine.update(optim_lr(engine, step)).float())
    return torch.stack(norms)


def optim_lr(engine, step):
    return engine.base_lr * (1 - 0.1 * step)


def build(dist, zero, name, tensors=None, activation_checkpointing=False):
    net = model(name)
    net.activation_checkpointing = activation_checkpointing
    engine = Engine(net, optim(name), EngineConfig(zero=zero), torch.float32, dist, tensors)
    engine.base_lr = optim(name).lr
    return engine


def micro_batch(index):
    g = torch.Generator().manual_seed(index)
    ids, labels = torch.randint(64, (2, 1, LENGTH), generator=g)
    return ids, labels, torch.ones(1, LENGTH, dtype=torch.bool)


def one_step_in_bf16(dist, zero):
    """The state after a step of gradient descent, lr 1, of many micro-batches; and as the other stage loads it."""
    config = OptimConfig(
        optimizer=OptimizerName.sgd, lr=1.0, betas=[0.0, 0.0], clip=0.0, weight_decay=WeightDecay(0, 0, 0, 0, 0)
    )
    engine = Engine(model("sgd"), config, EngineConfig(zero=zero), torch.bfloat16, dist)
    for index in range(dist.rank, MICRO, dist.world):
        engine.backward(micro_loss(micro_batch(index))(engine.training_model), torch.tensor(1))
    before = [p._version for p in engine.model.parameters()]
    engine.update(1.0)
    # Casts that are kept of a weight go by it.
    assert all(p._version > version for p, version in zip(engine.model.parameters(), before))
    found = collect(engine)
    rounded = {f"rounded/{name}": p.detach().clone() for name, p in engine.model.named_parameters()}
    tensors = found | {"optimizer_steps": torch.tensor(1.0)}
    engine.close()
    engine = Engine(model("sgd"), config, EngineConfig(zero=1 - zero), torch.bfloat16, dist, tensors)
    moved = {f"moved/{key}": value for key, value in collect(engine).items()}
    engine.close()
    return found | rounded | moved


def casts_of_weights_in_fp8(dist, zero):
    """How often a step casts each weight along each dimension: [steps, weights and dimensions]; and of each step's
    first micro-batch the loss, and what a model with the same weights and no casts kept says."""
    config = dataclasses.replace(MODEL, kv_heads=2)
    numerics = PrecisionConfig("fp8")
    torch.manual_seed(0)
    net, fresh = (Transformer(config, Parts.of(numerics_of(numerics, dist.device))) for _ in range(2))
    net.activation_checkpointing = True
    engine = Engine(net, optim("sgd"), EngineConfig(zero=zero), torch.bfloat16, dist)
    fresh.to(torch.bfloat16)
    real, counts, losses = Fp8.cast, [], []

    def counted(product, by, x, **options):
        for name, p in net.named_parameters():
            if x.data_ptr() == p.data_ptr():
                counts[-1][name, by.__name__] += 1
        return real(product, by, x, **options)

    with mock.patch.object(Fp8, "cast", counted):
        for step in range(3):
            counts.append(Counter())
            rows = [x[dist.rank :: dist.world] for x in data(step)]
            rows[2].fill_(True)
            for index in range(len(rows[0])):
                loss = micro_loss([x[index : index + 1] for x in rows])(engine.training_model)
                engine.backward(loss, torch.tensor(BATCH * LENGTH))
                if index == 0:
                    fresh.load_state_dict({name: p.detach() for name, p in net.named_parameters()}, strict=False)
                    losses.append(torch.stack([loss.detach(), micro_loss([x[:1] for x in rows])(fresh).detach()]))
            engine.update(0.5)
    engine.close()
    keys = sorted({key for count in counts for key in count})
    return {"casts": torch.tensor([[count[key] for key in keys] for count in counts]), "losses": torch.stack(losses)}


def traces_of_a_rehearsal(dist, zero):
    """By dtype: how many of an engine's tensors a rehearsed step of full size has changed; and of the steps after it,
    the largest difference of a weight from where the same steps end without a rehearsal."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for rehearsed in (True, False):
            engine = Engine(model("adamw"), optim("adamw"), EngineConfig(zero=zero), dtype, dist)
            engine.base_lr = optim("adamw").lr
            train(engine, dist, 0, 2, 1)
            if rehearsed:
                before = {**collect(engine), **own_weights(engine)}
                with engine.rehearsal():
                    train(engine, dist, 2, 4, 1)
                after = {**collect(engine), **own_weights(engine)}
                changed = sum(not torch.equal(after[key], value) for key, value in before.items())
            train(engine, dist, 2, 3, 1)
            ends.append(collect(engine))
            engine.close()
        apart = max((ends[0][key] - value).abs().max() for key, value in ends[1].items())
        found[str(dtype)] = torch.tensor([changed, apart])
    return found


def own_weights(engine):
    return {f"own/{name}": p.detach().clone() for name, p in engine.model.named_parameters()}


def collect(engine):
    return {key: get().detach().clone() for key, get in engine.state() if key != "optimizer_steps"}


def main():
    out, mode = Path(sys.argv[1]), sys.argv[2]
    dist = engine_dist.start(EngineConfig(threads=1))
    found = {}
    if mode == "cut":
        for zero in (0, 1):
            found |= {f"fp8/{zero}/{key}": value for key, value in casts_of_weights_in_fp8(dist, zero).items()}
            found |= {f"bf16/{zero}/{key}": value for key, value in one_step_in_bf16(dist, zero).items()}
            found |= {f"rehearsed/{zero}/{key}": value for key, value in traces_of_a_rehearsal(dist, zero).items()}
            for name in ("adamw", "sgd"):
                for accumulation in (1, 2):
                    engine = build(dist, zero, name, activation_checkpointing=accumulation == 2)
                    norms = train(engine, dist, 0, STEPS, accumulation)
                    for key, value in {**collect(engine), "norms": norms}.items():
                        found[f"{zero}/{name}/{accumulation}/{key}"] = value
                    engine.close()
                # Half-way, saved for whoever resumes it.
                engine = build(dist, zero, name)
                train(engine, dist, 0, 2, 1)
                checkpoint.save(out / f"ck-{dist.world}-{zero}-{name}", 2, {"m": engine}, {"at": 2}, dist, 1)
                engine.close()
    else:
        for source in sorted(out.glob("ck-*")):
            name = source.name.rsplit("-", 1)[1]
            for zero in (0, 1):
                found_checkpoint = checkpoint.newest(source)
                engine = build(dist, zero, name, found_checkpoint.tensors("m"))
                train(engine, dist, found_checkpoint.state["at"], STEPS, 1)
                for key, value in collect(engine).items():
                    found[f"{source.name}/{zero}/{key}"] = value
                engine.close()
    if dist.is_main:
        save_file(found, out / f"{mode}-{dist.world}.safetensors")
    torch_dist.barrier()


if __name__ == "__main__":
    main()
