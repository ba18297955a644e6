"""The examples of docs/python.md run, learn, and have the gradient of the loss that their text gives."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash

from distill.cache import CacheHeader, CacheReader, CacheWriter, CodecConfig, token_digests
from distill.config import registry
from examples import hf_trainer, plain_loop
from examples.plain_loop import S, V
from tests.closeness import apart

ALPHA = 0.5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained teacher, its cache without the targets of the last 40 samples, and the samples."""
    ids_NS, folder = plain_loop.samples(), str(tmp_path_factory.mktemp("cache"))
    teacher = plain_loop.model(48, 1)
    plain_loop.train(teacher, ids_NS[:-40], None, 40)
    plain_loop.write_cache(folder, teacher, ids_NS, torch.arange(len(ids_NS) - 40))
    return teacher, folder, ids_NS


def rows_of(ids_NS, ids):
    return [{"input_ids": ids_NS[i], "sample_id": i} for i in ids]


def options(folder, **more):
    return dict(output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no") | more


def dense_gradient(student, folder, ids_NS, ids, alpha=ALPHA):
    """By autograd through whole logits in fp64: no shift by padding, no fusion, no weights but a loop over tokens."""
    model = copy.deepcopy(student).double()
    reader, loss, count = CacheReader(folder), 0.0, 0
    for i in ids:
        logp_SV = model(input_ids=ids_NS[i : i + 1]).logits[0].log_softmax(-1)
        targets = reader.read(np.array([i]), token_digests(ids_NS[i : i + 1].numpy())).targets
        for t in range(S - 1):
            hard, soft, covered = -logp_SV[t, ids_NS[i, t + 1]], 0.0, bool(targets.covered_T[t])
            for token, p in zip(targets.ids_TK[t].tolist(), targets.probs_TK[t].double().tolist()):
                soft = soft - p * logp_SV[t, token]
            loss, count = loss + (alpha * soft + (1 - alpha) * hard if covered else hard), count + 1
    (loss / count).backward()
    return loss.item() / count, {name: p.grad for name, p in model.named_parameters()}


def close(model, want):
    return all(apart(p.grad, want[name], whole=want.values()) < 1e-5 for name, p in model.named_parameters())


def test_the_cache_holds_what_the_teacher_says(made):
    """On average over the tokens: decoded rows against the teacher's own distribution."""
    teacher, folder, ids_NS = made
    found = CacheReader(folder).read(np.arange(100), token_digests(ids_NS[:100].numpy())).targets
    assert found.covered_T.view(100, S).sum(1).tolist() == [S - 1] * 100
    with torch.no_grad():
        p_TV = teacher(input_ids=ids_NS[:100]).logits.flatten(0, 1).double().softmax(-1)
    got_TV = torch.zeros_like(p_TV).scatter_add_(1, found.ids_TK, found.probs_TK.double())
    valid = found.covered_T
    assert torch.allclose(got_TV[valid].mean(0), p_TV[valid].mean(0), atol=2e-3)
    labels_T = torch.cat([ids_NS[:100, 1:], ids_NS[:100, :1]], 1).flatten()
    want = p_TV.gather(1, labels_T[:, None])[:, 0].log()
    assert (found.label_logprob_T[valid] - want[valid]).abs().mean() < 0.05


def test_plain_loop(made):
    _, folder, ids_NS = made
    student = plain_loop.model(32, 1, seed=1)
    rows = plain_loop.train(student, ids_NS[:-40], CacheReader(folder), 30)
    loss, hard, soft, coverage = zip(*rows)
    assert set(coverage) == {1.0} and all(np.isfinite(rows).flatten())
    assert np.mean(soft[-5:]) < np.mean(soft[:5]) - 1 and np.mean(hard[-5:]) < np.mean(hard[:5]) - 1
    assert loss[0] == pytest.approx((hard[0] + soft[0]) / 2, rel=1e-5)


def test_the_trainer_takes_steps_on_targets_and_is_judged_on_labels(made, tmp_path):
    _, folder, ids_NS = made
    n = len(ids_NS)
    heldout = range(n - 40, n)
    student = plain_loop.model(32, 1, seed=1)
    trainer = hf_trainer.trainer(
        student, folder, rows_of(ids_NS, range(n - 40)), rows_of(ids_NS, heldout),
        **options(tmp_path, max_steps=30, logging_steps=5, learning_rate=3e-3, per_device_train_batch_size=4,
                  gradient_accumulation_steps=2),
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "soft" in row]
    assert len(logged) == 6 and all(row["coverage"] == 1.0 for row in logged)
    assert logged[-1]["soft"] < logged[0]["soft"] - 1 and logged[-1]["hard"] < logged[0]["hard"] - 1
    # With accumulation too, what is logged is the mean over tokens.
    for row in logged:
        assert row["loss"] == pytest.approx((row["hard"] + row["soft"]) / 2, abs=0.02)
    with torch.no_grad():
        ids = ids_NS[-40:]
        logp = student(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    want = -logp.gather(-1, ids[:, 1:, None]).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_the_trainers_gradient_over_accumulated_batches_is_the_dense_one(made, tmp_path):
    """Of micro-batches with unequal numbers of targets: the last sample has none."""
    _, folder, ids_NS = made
    student = plain_loop.model(32, 1, seed=2)
    ids = [3, 77, 5, len(ids_NS) - 1]
    trainer = hf_trainer.trainer(student, folder, rows_of(ids_NS, ids), [], **options(tmp_path))
    micro = [trainer.data_collator(rows_of(ids_NS, part)) for part in (ids[:1], ids[1:])]
    tokens = trainer._get_num_items_in_batch(micro, torch.device("cpu"))
    assert int(tokens) == 4 * (S - 1)
    trainer.current_gradient_accumulation_steps = 2
    loss = sum(trainer.training_step(student, inputs, tokens).item() for inputs in micro)
    want, gradient = dense_gradient(student, folder, ids_NS, ids)
    assert loss == pytest.approx(want, rel=1e-5) and close(student, gradient)
    assert not close(student, dense_gradient(student, folder, ids_NS, ids, alpha=0.3)[1])


def test_labels_that_carry_no_loss_have_no_part(made, tmp_path):
    _, folder, ids_NS = made
    student = plain_loop.model(32, 1, seed=2)
    trainer = hf_trainer.trainer(student, folder, rows_of(ids_NS, [1]), [], **options(tmp_path))
    inputs = trainer.data_collator(rows_of(ids_NS, [1]))
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, 1:40] = -100
    assert trainer._get_num_items_in_batch([inputs], torch.device("cpu")) == S - 40
    trainer.compute_loss(student, inputs, num_items_in_batch=S - 40).backward()
    hidden_SV = student(input_ids=ids_NS[1:2]).logits[0]
    used = student.lm_head.weight.grad.clone()
    student.zero_grad()
    targets = CacheReader(folder).read(np.array([1]), token_digests(ids_NS[1:2].numpy())).targets
    p_SV = torch.zeros(S, V).scatter_add_(1, targets.ids_TK, targets.probs_TK)
    p_SV[torch.arange(S - 1), ids_NS[1, 1:]] += 1
    logp_SV = hidden_SV.log_softmax(-1)
    (-(p_SV * logp_SV)[39:-1].sum() * 0.5 / (S - 40)).backward()
    assert apart(student.lm_head.weight.grad, used) < 1e-5


def test_token_digests_are_those_of_the_bytes():
    ids_BS = np.array([[1, 2, 300], [4, 5, 70_000]])
    more_BS = np.array([[True, False, True], [False, False, True]])
    want = [
        xxhash.xxh3_64_intdigest(b"".join(int(i).to_bytes(4, "little") for i in row) + bytes(map(int, more)))
        for row, more in zip(ids_BS, more_BS)
    ]
    assert token_digests(ids_BS, more_BS).tolist() == want
    assert token_digests(torch.from_numpy(ids_BS).numpy()).dtype == np.uint64


def test_all_code_of_the_page_runs(tmp_path, monkeypatch):
    """Block after block in one program, with what the text takes for granted."""
    monkeypatch.setattr(registry.CODECS, "_entries", dict(registry.CODECS._entries))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    torch.manual_seed(0)
    ids_BS, head = torch.randint(0, 40, (3, 8)), torch.nn.Linear(16, 40, bias=False)
    given = dict(
        V=40, S=8, data=range(3), counts_V=np.ones(40), batches=[(np.arange(3), ids_BS)], device="cpu", alpha=0.5,
        teacher=lambda ids: torch.randn(*ids.shape, 40), model=SimpleNamespace(lm_head=head), torch=torch,
        hidden_TD=torch.randn(24, 16, requires_grad=True), teacher_hidden_TE=torch.randn(24, 12),
        teacher_head_UE=torch.randn(40, 12),
    )  # fmt: skip
    exec("\n".join(line[4:] for line in page.splitlines() if line.startswith("    ")), given)
    assert given["result"].loss_sum > 0 and given["targets"].covered_T.sum() == 21
    assert head.weight.grad.abs().sum() > 0


def test_the_codec_of_the_page(tmp_path, monkeypatch):
    """Its atoms are the most probable ids, after a way through a cache."""
    monkeypatch.setattr(registry.CODECS, "_entries", dict(registry.CODECS._entries))
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    [code] = re.findall(r"\*\*A codec of your own\*\*.*?:\n\n((?: {4}.*\n|\n)+)", page)
    exec(re.sub(r"^ {4}", "", code, flags=re.MULTILINE), {})
    codec = CodecConfig(name="coarse", options={"keep": 3})
    header = CacheHeader(vocab_size=50, tokenizer="t", corpus="c", sample_tokens=4, samples=2, codec=codec, seed=0)
    ids_BS, logits_TV = np.arange(8).reshape(2, 4), torch.randn(8, 50)
    labels_T, valid_T = torch.arange(8), torch.tensor([1, 1, 1, 0] * 2).bool()
    with CacheWriter(tmp_path / "cache", header, writer="w") as writer:
        writer.put_logits(np.arange(2), token_digests(ids_BS), logits_TV, labels_T, valid_T, step=0, tokens_seen=0,
                          teacher="t")  # fmt: skip
        writer.finish()
    targets = CacheReader(tmp_path / "cache").read(np.arange(2), token_digests(ids_BS)).targets
    assert targets.covered_T.tolist() == valid_T.tolist()
    for t in valid_T.nonzero().flatten().tolist():
        p_K, ids_K = logits_TV[t].softmax(-1).topk(3)
        assert dict(zip(targets.ids_TK[t].tolist(), targets.probs_TK[t].tolist())) == pytest.approx(
            dict(zip(ids_K.tolist(), p_K.tolist())), abs=1e-4
        )
