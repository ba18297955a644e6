"""A student of transformers' Trainer on cached soft targets: a collator that reads them, and one method.

python examples/hf_trainer.py FOLDER     (writes the toy cache of plain_loop.py there, and trains on it)
"""

import sys

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from distill.cache import CacheReader, token_digests
from losses.mixed import mixed_loss


class Join:
    """Collator: rows of `input_ids` [S] and `sample_id` to a batch with its soft targets."""

    def __init__(self, reader: CacheReader):
        self.reader = reader

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids_BS = torch.stack([row["input_ids"] for row in rows])
        sample_ids_B = np.array([row["sample_id"] for row in rows])
        targets = self.reader.read(sample_ids_B, token_digests(ids_BS.numpy())).targets
        return {"input_ids": ids_BS, "labels": ids_BS, **targets._asdict()}


class DistillTrainer(Trainer):
    """Loss = alpha soft + (1 - alpha) hard where there is a target, hard elsewhere; no logits of whole batches.

    Labels are as the Trainer makes them: -100 carries no loss, a position's label is the token after it. It works in
    one process or with data parallelism; where parameters are split (FSDP, ZeRO 3), gather the head's weight first.
    """

    alpha = 0.5

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels_BS = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        labels_T, valid_T = labels_BS.flatten().clamp(min=0), (labels_BS != -100).flatten()
        # The whole model is called, so that wrappers work, but it makes the logits of one position only.
        outputs = model(input_ids=inputs["input_ids"], output_hidden_states=True, logits_to_keep=1)
        hidden_TD = outputs.hidden_states[-1].flatten(0, 1)
        weight_VD = self.accelerator.unwrap_model(model).lm_head.weight
        covered_T = inputs["covered_T"] & valid_T
        w_soft_T = self.alpha * covered_T
        w_hard_T = valid_T.float() - w_soft_T
        result = mixed_loss(hidden_TD, weight_VD, labels_T, w_hard_T, inputs["ids_TK"], inputs["probs_TK"], w_soft_T)
        tokens = valid_T.sum() if num_items_in_batch is None else num_items_in_batch  # of all micro-batches and ranks
        loss = result.loss_sum / tokens
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if model.training:
            self.sums = getattr(self, "sums", 0) + torch.stack(
                [result.hard_T[valid_T].sum(), result.soft_T[covered_T].sum(), covered_T.sum(), valid_T.sum()]
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            hard, soft, covered, valid = self.sums.tolist()
            logs |= {"hard": hard / valid, "soft": soft / max(covered, 1), "coverage": covered / valid}
            self.sums = 0
        super().log(logs, *args, **kwargs)


def trainer(student, cache: str, train: list[dict], heldout: list[dict], **options) -> DistillTrainer:
    arguments = TrainingArguments(
        remove_unused_columns=False,  # the collator takes sample_id, which the model has no argument for
        prediction_loss_only=True,
        report_to=[],
        **options,
    )
    return DistillTrainer(student, arguments, Join(CacheReader(cache)), train, heldout)


if __name__ == "__main__":
    import plain_loop

    ids_NS = plain_loop.samples()
    rows = [{"input_ids": ids_S, "sample_id": i} for i, ids_S in enumerate(ids_NS)]
    train, heldout = rows[:-40], rows[-40:]  # the cache has no targets of the last 40 samples
    teacher, student = plain_loop.model(96, 2), plain_loop.model(48, 1, seed=1)
    plain_loop.train(teacher, ids_NS[:-40], None, 60)
    plain_loop.write_cache(sys.argv[1], teacher, ids_NS, torch.arange(len(train)))
    trainer(
        student, sys.argv[1], train, heldout, output_dir=f"{sys.argv[1]}-run", max_steps=60, logging_steps=10,
        gradient_accumulation_steps=2, per_device_train_batch_size=4, learning_rate=3e-3, eval_strategy="steps",
        eval_steps=30, save_strategy="no", use_cpu=True, disable_tqdm=True,
    ).train()  # fmt: skip
