"""Run under 1 or 2 ranks by tests/unit/test_engine_freeze.py: trains a Transformer with vision with one half frozen.

python -m tests.workers.freezing OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as torch_dist
from safetensors.torch import save_file

from distill.config.schema import (
    EngineConfig,
    Freeze,
    ModelConfig,
    OptimConfig,
    VisionConfig,
    WeightDecay,
)
from distill.engine import checkpoint
from distill.engine import dist as engine_dist
from distill.engine.deepspeed_engine import Engine
from distill.model import Transformer
from distill.model.freeze import freeze
from losses import mixed_loss
from tests.image_corpus import in_order

VISION = VisionConfig(
    hidden_size=16, layers=2, heads=2, mlp_hidden=64, tile_size=8, patch_size=2, adapter_hidden=16, adapter_out=16,
    image_token_id=63,
)  # fmt: skip
MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, expert_hidden=16, dense_hidden=32,
    experts=4, moe_step=1, chunk_size=8, vision=VISION, init_std=0.1,
)  # fmt: skip
STEPS, BATCH, LENGTH = 4, 4, 12
DECAY = WeightDecay(matrices=0.1, embedding=0.2, head=0.3, router=0.4, norms=0.5)  # whatever moves must not move
OPTIM = OptimConfig(lr=1e-2, eps=1e-3, clip=1.2, weight_decay=DECAY)
SETTINGS = [(f"{zero}/{what.name}/fp32", zero, what) for zero in (0, 1) for what in Freeze]
SETTINGS += [(f"{zero}/{what.name}/bf16", zero, what) for zero in (0, 1) for what in Freeze]


def model(what):
    torch.manual_seed(0)
    net = Transformer(MODEL)
    freeze(net, what)
    return net


def data(step):
    """ids, labels, tiles; on even steps the first two rows begin with a tile, on odd steps no row has one."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(63, (BATCH, LENGTH), generator=g)
    labels = torch.randint(63, (BATCH, LENGTH), generator=g)
    tiles = torch.randint(0, 256, (0 if step % 2 else 2, 3, 8, 8), dtype=torch.uint8, generator=g)
    ids[: len(tiles), : VISION.tile_tokens] = 63
    return ids, labels, tiles


def micro_loss(ids, labels, tiles):
    images = in_order(tiles, ids, 63, VISION.tile_tokens)

    def loss(net):
        def head(hidden, weight):
            return mixed_loss(hidden, weight, labels.flatten(), torch.ones(labels.numel())).loss_sum

        return net(ids, None, head, images if len(tiles) else None)[0]

    return loss


def train(engine, dist, first, stop):
    share = BATCH // dist.world
    for step in range(first, stop):
        ids, labels, tiles = data(step)
        mine = slice(dist.rank * share, (dist.rank + 1) * share)
        halves = [slice(start, start + share // 2) for start in (0, share // 2)]  # two micro-batches
        cuts = [(ids[mine][half], labels[mine][half], tiles[mine][half]) for half in halves]
        for cut in cuts:
            engine.backward(micro_loss(*cut)(engine.training_model), torch.tensor(BATCH * LENGTH))
        engine.update(OPTIM.lr)


def collect(engine):
    return {key: get().detach().clone() for key, get in engine.state() if key != "optimizer_steps"}


def main():
    out = Path(sys.argv[1])
    dist = engine_dist.start(EngineConfig(threads=1))
    found = {}
    for name, zero, what in SETTINGS:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name.rsplit("/", 1)[1]]
        engine = Engine(model(what), OPTIM, EngineConfig(zero=zero), dtype, dist)
        train(engine, dist, 0, 2)
        checkpoint.save(out / f"ck-{dist.world}", 2, {"m": engine}, {}, dist, 1)
        train(engine, dist, 2, STEPS)
        found |= {f"{name}/whole/{key}": value for key, value in collect(engine).items()}
        engine.close()
        tensors = checkpoint.newest(out / f"ck-{dist.world}").tensors("m")
        engine = Engine(model(what), OPTIM, EngineConfig(zero=zero), dtype, dist, tensors)
        train(engine, dist, 2, STEPS)
        found |= {f"{name}/resumed/{key}": value for key, value in collect(engine).items()}
        engine.close()
    if dist.is_main:
        save_file(found, out / f"world-{dist.world}.safetensors")
    torch_dist.barrier()


if __name__ == "__main__":
    main()
