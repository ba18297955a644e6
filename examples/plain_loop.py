"""Soft targets of any teacher into a cache, and a student trained on them in a plain loop. Seconds on a CPU.

python examples/plain_loop.py FOLDER     (or a URL: s3://bucket/folder)
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.cache import CacheHeader, CacheReader, CacheWriter, CodecConfig, token_digests
from losses.mixed import mixed_loss

S, V = 64, 256


def samples() -> torch.Tensor:
    """A toy corpus: the bytes of a Python file, cut into samples [samples, S]."""
    data = np.frombuffer(Path(textwrap.__file__).read_bytes(), np.uint8)
    return torch.from_numpy(data[: len(data) // S * S].reshape(-1, S).astype(np.int64))


def model(width: int, layers: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, **sizes))


def labels_of(ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each, and whether there is one: the last of a sample has none."""
    valid_BS = (torch.arange(S) < S - 1).expand_as(ids_BS)
    return ids_BS.roll(-1, dims=1).flatten(), valid_BS.flatten()


def write_cache(folder: str, teacher: LlamaForCausalLM, ids_NS: torch.Tensor, sample_ids: torch.Tensor) -> None:
    """Forward passes of the teacher over some samples; any model that gives logits will do."""
    header = CacheHeader(
        vocab_size=V, tokenizer="bytes", corpus="textwrap", sample_tokens=S, samples=len(ids_NS), codec=CodecConfig(),
        seed=0,
    )  # fmt: skip
    counts_V = np.bincount(ids_NS.flatten(), minlength=V)
    with CacheWriter(folder, header, writer="teacher", counts_V=counts_V) as writer, torch.no_grad():
        for chosen in sample_ids.split(8):
            ids_BS = ids_NS[chosen]
            logits_TV = teacher(input_ids=ids_BS).logits.flatten(0, 1)
            digests_B = token_digests(ids_BS.numpy())
            writer.put_logits(
                chosen.numpy(), digests_B, logits_TV, *labels_of(ids_BS), step=0, tokens_seen=0, teacher="toy"
            )
        writer.finish()


def train(model: LlamaForCausalLM, ids_NS: torch.Tensor, reader: CacheReader | None, steps: int, alpha=0.5) -> list:
    """Rows of (loss, hard loss, soft loss, coverage), nats per token; without a reader on labels alone."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        chosen = torch.randint(len(ids_NS), (8,), generator=generator)
        ids_BS = ids_NS[chosen]
        labels_T, valid_T = labels_of(ids_BS)
        atoms, covered_T = (), torch.zeros_like(valid_T)
        if reader is not None:
            targets = reader.read(chosen.numpy(), token_digests(ids_BS.numpy())).targets
            atoms, covered_T = (targets.ids_TK, targets.probs_TK), targets.covered_T & valid_T
        # Two weights for each token: one without a target learns from its label alone.
        w_soft_T = alpha * covered_T
        w_hard_T = valid_T.float() - w_soft_T
        hidden_TD = model.model(input_ids=ids_BS).last_hidden_state.flatten(0, 1)
        weights = (w_soft_T,) if atoms else ()
        result = mixed_loss(hidden_TD, model.lm_head.weight, labels_T, w_hard_T, *atoms, *weights)
        loss = result.loss_sum / valid_T.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        soft = result.soft_T[covered_T].mean() if atoms else torch.tensor(torch.nan)
        rows.append([x.item() for x in (loss, result.hard_T[valid_T].mean(), soft, covered_T.sum() / valid_T.sum())])
    return rows


if __name__ == "__main__":
    ids_NS = samples()
    teacher, student = model(96, 2), model(48, 1, seed=1)
    train(teacher, ids_NS, None, 60)
    write_cache(sys.argv[1], teacher, ids_NS, torch.arange(len(ids_NS)))
    for step, row in enumerate(train(student, ids_NS, CacheReader(sys.argv[1]), 60)):
        if step % 10 == 9:
            print("step {:3}  loss {:.3f}  hard {:.3f}  soft {:.3f}  coverage {:.2f}".format(step + 1, *row))
