"""Cached decoding against the full forward pass; sampling against plain Python."""

import dataclasses
from collections import Counter

import pytest
import torch

from distill.config.errors import ConfigError, DataError
from distill.model import Transformer
from distill.model.decode import Decoder, generate, sample
from distill.model.images import Images
from tests.closeness import worst
from tests.image_corpus import in_order
from tests.unit.test_model_attention import config_of, random_documents
from tests.unit.test_model_vision import vision_config, vision_model

CHUNK, LENGTH = 8, 37


def model_of(**changes):
    torch.manual_seed(0)
    model = Transformer(config_of(**({"max_positions": 64, "moe_step": 1, "init_std": 0.15} | changes)))
    return model


def decoded(model, rows, steps):
    """Logits of every token after the first `prefilled` of each row, by prefill and then `steps` tokens at a time."""
    decoder = Decoder(model, len(rows), max(len(ids) for ids, _ in rows))
    logits = [decoder.prefill([ids[:prefilled] for ids, prefilled in rows])[:, None]]
    at, left = [prefilled for _, prefilled in rows], min(len(ids) - prefilled for ids, prefilled in rows)
    while left:
        n = min(steps, left)
        logits.append(decoder.extend(torch.stack([ids[a : a + n] for (ids, _), a in zip(rows, at)])))
        at, left = [a + n for a in at], left - n
    return torch.cat(logits, 1), decoder


SPLITS = sorted({split for border in (8, 16, 24, 32) for split in (border - 1, border, border + 1)} | {1, 2, 36, 37})


@pytest.mark.parametrize("chunk", [CHUNK, 5, None])
def test_prefill_plus_decode_is_the_full_forward_at_every_border(chunk):
    model = model_of(chunk_size=chunk)
    ids_S = torch.randint(0, 64, (LENGTH,))
    full_SV = model.logits(ids_S[None])[0].detach()
    for split in SPLITS:
        found, _ = decoded(model, [(ids_S, split)], 1)
        assert worst(found[0], full_SV[split - 1 :]) < 5e-5


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "active_experts": 2}, {"nope_step": 0}, {"moe_step": 2}])
def test_rows_of_different_lengths_grow_by_any_number_of_tokens(steps, changes):
    model = model_of(**changes)
    with torch.no_grad():
        for router in model.routers:
            router.bias.normal_(0, 0.3)
    rows = [(torch.randint(0, 64, (prefilled + 24,)), prefilled) for prefilled in (1, 7, 8, 9, 13)]
    found, _ = decoded(model, rows, steps)
    for row, (ids_S, prefilled) in enumerate(rows):
        expected = model.logits(ids_S[None])[0, prefilled - 1 :].detach()
        assert worst(found[row], expected) < 5e-5


def test_layers_with_positions_hold_one_chunk():
    model = model_of()
    ids_S = torch.randint(0, 64, (LENGTH,))
    _, decoder = decoded(model, [(ids_S, 19), (ids_S[:30], 12)], 1)
    for layer, kv in zip(model.layers, decoder.caches):
        slots = CHUNK if layer.rope else LENGTH
        assert kv.keys_BGSC.shape == kv.values_BGSC.shape == (2, 2, slots, 8)
        # The storage is no larger than what is seen of it.
        assert kv.keys_BGSC.untyped_storage().nbytes() == 2 * 2 * slots * 8 * 4


def test_only_the_tail_chunk_of_a_prompt_is_kept():
    model = model_of()
    for length, kept in ((19, 3), (16, 0), (8, 0), (5, 5)):
        decoder = Decoder(model, 1, LENGTH)
        decoder.prefill([torch.randint(0, 64, (length,))])
        for layer, kv in zip(model.layers, decoder.caches):
            written = (kv.keys_BGSC != 0).any(-1).any(1)[0]
            assert written.nonzero().squeeze(1).tolist() == list(range(kept if layer.rope else length))


def test_greedy_generation_takes_the_full_forwards_choice_and_stops_at_eos():
    model = model_of()
    prompts = [torch.randint(0, 64, (n,)) for n in (3, 8, 21)]
    found = generate(model, prompts, 12, eos_ids=[])
    for prompt, new in zip(prompts, found):
        ids = prompt
        for _ in range(12):
            ids = torch.cat([ids, model.logits(ids[None])[0, -1].argmax()[None]])
        assert new.tolist() == ids[len(prompt) :].tolist() and not new.requires_grad
    eos = [found[0][4].item(), found[2][2].item()]
    cut = generate(model, prompts, 12, eos_ids=eos)
    for whole, short in zip(found, cut):
        ends = [i for i, token in enumerate(whole.tolist()) if token in eos]
        assert short.tolist() == whole[: ends[0] + 1 if ends else 12].tolist()
    assert len({len(short) for short in cut}) > 1
    # By default it is the configuration that says what ends a row.
    model.config = dataclasses.replace(model.config, eos_ids=eos)
    assert [row.tolist() for row in generate(model, prompts, 12)] == [row.tolist() for row in cut]


def test_prompts_may_hold_images():
    model, tokens = vision_model(init_std=0.15), vision_config().tile_tokens
    prompts, tiles, alone = [], torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8), []
    for length, mine in ((11, tiles[:1]), (9, tiles[:0]), (21, tiles[1:])):
        ids_S = torch.randint(0, 63, (length,))
        ids_S[1 : 1 + len(mine) * tokens] = 63
        prompts.append(ids_S)
        for _ in range(6):
            # The ids that follow are text, whatever they are; only the prompt has image tokens in order.
            images = in_order(mine, ids_S[None, :length], 63, tokens)
            patch_BS = torch.nn.functional.pad(images.patch_BS, (0, len(ids_S) - length), value=-1)
            logits = model.logits(ids_S[None], images=Images(mine, patch_BS))[0, -1]
            ids_S = torch.cat([ids_S, logits.argmax()[None]])
        alone.append(ids_S[length:].tolist())
    images = in_order(tiles, torch.cat(prompts)[None], 63, tokens)
    found = generate(model, prompts, 6, eos_ids=[], images=images)
    assert [row.tolist() for row in found] == alone
    assert alone != [row.tolist() for row in generate(model, prompts, 6, eos_ids=[])]


def test_sampling_follows_its_generator():
    model = model_of()
    prompts = [torch.randint(0, 64, (n,)) for n in (3, 9)]

    def draw(seed):
        rows = generate(
            model, prompts, 16, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(seed), eos_ids=[]
        )
        return [row.tolist() for row in rows]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("top_p", [1.0, 0.86, 0.84, 0.64, 1e-9])
def test_the_nucleus_is_the_fewest_ids_that_reach_top_p(top_p):
    logits, temperature, draws = [1.0, 3.0, -1.0, 2.0, 2.5], 1.7, 20_000
    scaled = [2.718281828459045 ** (z / temperature) for z in logits]
    order = sorted(range(5), key=lambda i: -scaled[i])
    kept = next(order[:n] for n in range(1, 6) if n == 5 or sum(scaled[i] for i in order[:n]) >= top_p * sum(scaled))
    generator = torch.Generator().manual_seed(0)
    found = Counter(sample(torch.tensor([logits] * draws), temperature, top_p, generator).tolist())
    assert set(found) == set(kept)
    for i in kept:
        share = scaled[i] / sum(scaled[j] for j in kept)
        assert found[i] / draws == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5 + 1e-9)


def test_bf16_decodes_what_its_own_full_forward_says():
    # One expert: routing that flips by a rounding is another matter.
    model = model_of(moe_step=0).to(torch.bfloat16)
    ids_S = torch.randint(0, 64, (30,))
    found, decoder = decoded(model, [(ids_S, 13)], 4)
    assert found.dtype == decoder.caches[0].keys_BGSC.dtype == torch.bfloat16
    expected = model.logits(ids_S[None])[0, 12:]
    assert (found[0] - expected).abs().max() < 0.05 * expected.abs().max()


def test_too_long_is_one_clear_error():
    model = model_of(max_positions=20)
    with pytest.raises(DataError, match=r"a document has 21 tokens; the model's max_positions is 20"):
        model(torch.zeros(2, 21, dtype=torch.int64))
    model(torch.zeros(1, 21, dtype=torch.int64), torch.tensor([[0] + [1] * 20]))  # it is documents that count
    with pytest.raises(DataError, match=r"prompt 1 has 15 tokens and 6 are to follow; the model's max_positions is 20"):
        generate(model, [torch.zeros(3, dtype=torch.int64), torch.zeros(15, dtype=torch.int64)], 6)
    assert len(generate(model, [torch.zeros(15, dtype=torch.int64)], 5, eos_ids=[])[0]) == 5


def test_bad_arguments_are_named_together():
    prompt = [torch.zeros(3, dtype=torch.int64)]
    with pytest.raises(ConfigError) as caught:
        generate(model_of(), prompt, 0, temperature=-1.0, top_p=0.0)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["max_new_tokens", "temperature", "top_p"]
    for prompts in ([], [torch.zeros(0, dtype=torch.int64)], [torch.zeros(1, 3, dtype=torch.int64)]):
        with pytest.raises(DataError):
            generate(model_of(), prompts, 1)


def test_training_goes_on_after_generation():
    model = model_of()
    generate(model, [torch.randint(0, 64, (9,))], 3)
    logits = model.logits(torch.randint(0, 64, (2, 21)), random_documents(2, 21, seed=0))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
