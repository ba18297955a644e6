"""Run under 2 ranks by tests/unit/test_model_dispatch.py: each rank holds half of the experts of every MoE layer.

python -m tests.workers.expert_parallel OUT
"""

import sys

import torch
import torch.distributed as torch_dist
from safetensors.torch import save_file

from distill.model import Transformer
from distill.model.dispatch import Dispatched, LocalDispatcher
from distill.model.parts import Parts
from tests.unit.test_model_attention import config_of

CONFIG = {"active_experts": 2, "moe_step": 1, "init_std": 0.2}
RANKS = 2


class Exchange(torch.autograd.Function):
    """All-to-all of rows; the gradient goes the way back."""

    @staticmethod
    def forward(ctx, x_RD, sent, received):
        ctx.sizes = sent, received
        out = x_RD.new_empty(sum(received), x_RD.shape[1])
        torch_dist.all_to_all_single(out, x_RD.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad_RD):
        sent, received = ctx.sizes
        return Exchange.apply(grad_RD, received, sent), None, None


class ExpertParallel(LocalDispatcher):
    """Rows go to the rank that holds their expert, and back."""

    def held(self, experts):
        share = experts // torch_dist.get_world_size()
        return range(torch_dist.get_rank() * share, (torch_dist.get_rank() + 1) * share)

    def dispatch(self, hidden_TD, experts_TA, weight_TA, experts):
        mine = super().dispatch(hidden_TD, experts_TA, weight_TA, experts)
        share = len(self.held(experts))
        theirs_E = torch.empty_like(mine.counts_E)
        torch_dist.all_to_all_single(theirs_E, mine.counts_E)
        sent, received = (c.view(-1, share).sum(1).tolist() for c in (mine.counts_E, theirs_E))
        x_RD = Exchange.apply(mine.x_RD, sent, received)
        expert_R = torch.arange(share).repeat(torch_dist.get_world_size()).repeat_interleave(theirs_E)
        order_R = expert_R.argsort(stable=True)
        ends_E = torch.bincount(expert_R, minlength=share).cumsum(0).int()
        return Dispatched(x_RD[order_R], ends_E, mine.counts_E, (mine.state, order_R, sent, received))

    def combine(self, y_RD, state):
        row_TA, order_R, sent, received = state
        return super().combine(Exchange.apply(y_RD[order_R.argsort()], received, sent), row_TA)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(64, (RANKS, 17), generator=generator)


def whole():
    torch.manual_seed(0)
    return Transformer(config_of(**CONFIG))


def backward(model, ids_BS):
    logits_TV, routing = model(ids_BS, head_fn=lambda hidden_TD, weight_VD: hidden_TD @ weight_VD.T)
    logits_TV.square().sum().backward()
    return logits_TV.detach(), routing


def main(out):
    torch_dist.init_process_group("gloo")
    rank, source = torch_dist.get_rank(), whole()
    model = Transformer(source.config, Parts(dispatcher=ExpertParallel()))
    for name, tensor in source.state_dict().items():
        held = ExpertParallel().held(len(tensor))
        own = model.state_dict()[name]
        own.copy_(tensor[held.start : held.stop] if ".experts." in name else tensor)
    logits_TV, routing = backward(model, batch()[rank : rank + 1])
    tensors = {"logits": logits_TV, "counts": routing.counts_LE}
    tensors |= {f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
    save_file(tensors, f"{out}/{rank}.safetensors")
    torch_dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
