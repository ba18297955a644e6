"""Soft targets of a teacher in the same process: forward passes over the student's own batches, nothing stored.

A step's batch is first labelled as a whole: the teacher's last hidden states, and of each token what the weighting
reads. Logits exist in chunks only, and a second time in the student's head, beside its own.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.cache import SoftTargets
from distill.data.join import Batch
from distill.engine.dist import Dist
from losses import Mixed, fixed, head_loss


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher of live targets; what may change is asked for at every step."""

    hidden: Callable[[Batch], Tensor]
    """Normed hidden states [T, E] of a batch on the device, without gradient and in evaluation mode."""
    unembedding: Callable[[], Tensor]
    """[U, E]; the logits are its product with the hidden states."""
    width: int
    """E."""
    step: Callable[[], int]
    """Its optimizer steps so far."""
    identity: str | None = None
    """Of a frozen one; a run that goes on must have the same."""


@torch.no_grad()
def labelled(teacher: LiveTeacher, batch: Batch, parts: int, chunk: int | None, dist: Dist) -> Batch:
    """This rank's batch of an optimizer step, on the device but for its images, with the teacher's targets.

    A sample with an id that the teacher lacks has none. Levels are 0: the teacher of the moment is the best there is.

    Args:
        parts: equal numbers of samples that go through the teacher at a time.
        chunk: tokens whose logits live at one time; None: by bytes.
    """
    on_host, size, weight_UE = batch, len(batch.ids_BS) // parts, teacher.unembedding()
    batch = dataclasses.replace(batch, images=None).to(dist.device)
    vocab_size = len(weight_UE)
    valid_BS = batch.valid_BS
    known_B = (batch.ids_BS < vocab_size).all(1) & ((batch.labels_BS < vocab_size) | ~valid_BS).all(1)
    readable = dataclasses.replace(
        batch, ids_BS=_within(batch.ids_BS, vocab_size), labels_BS=_within(batch.labels_BS, vocab_size)
    )
    found = []
    for start in range(0, len(batch.ids_BS), size):
        # Images are cut on the host, where it reads which tiles the rows have.
        rows = on_host.rows(start, start + size)
        images = None if rows.images is None else rows.to(dist.device).images
        micro = dataclasses.replace(readable.rows(start, start + size), images=images)
        found.append(_label(teacher, weight_UE, micro, chunk))
    hidden_TE, loss_T, entropy_T = (torch.cat(column) for column in zip(*found))

    covered_T = known_B.repeat_interleave(batch.ids_BS.shape[1])
    level_B = torch.where(known_B, 0.0, torch.nan)
    no_atoms_T0 = loss_T.new_zeros(len(loss_T), 0)
    return dataclasses.replace(
        batch,
        images=on_host.images,
        targets=SoftTargets(no_atoms_T0.long(), no_atoms_T0, covered_T, -loss_T, entropy_T),
        step_B=torch.where(known_B, teacher.step(), -1),
        level_B=level_B,
        end_B=level_B,
        par_B=torch.where(known_B, torch.inf, torch.nan),
        teacher_TE=hidden_TE,
    )


def _within(ids_BS: Tensor, vocab_size: int) -> Tensor:
    return torch.where(ids_BS < vocab_size, ids_BS, 0)


def _label(teacher: LiveTeacher, weight_UE: Tensor, micro: Batch, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, E], cross entropy of the labels and entropy, fp32 nats [T]."""
    labels_T = micro.labels_BS.flatten()
    hidden_TE = teacher.hidden(micro)
    rows = Mixed(labels_T, fixed(torch.zeros(len(labels_T), device=labels_T.device)), entropy=True)
    head = head_loss(hidden_TE, weight_UE, rows, chunk=chunk)
    return hidden_TE, head.parts["hard"].float(), head.parts["entropy"].float()
