"""Readers of foreign formats, against files written here by the formats' rules and the dense truth behind them.

Longer than other files: four formats share their writers of damaged files.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tarfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from distill.config.errors import CacheError, ConfigError
from distill.tools.imports.distillkit import DistillKit
from distill.tools.imports.megatron import Megatron
from distill.tools.imports.plain import PlainParquet
from distill.tools.imports.vllm import Vllm

V = 1000


def truth(n: int, seed: int = 0) -> list[list[float]]:
    """Dense log-probabilities of n positions, by plain Python."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        z = [float(v) for v in draw.normal(0, 3, V)]
        top = max(z)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in z))
        rows.append([v - lse for v in z])
    return rows


def best(row: list[float], k: int) -> list[int]:
    return sorted(range(V), key=lambda i: -row[i])[:k]


def split(sequence) -> list[dict[int, float]]:
    """One dictionary a position."""
    found, place = [], 0
    for count in sequence.entries.counts_P:
        ids, values = (part[place : place + count] for part in sequence.entries[1:])
        found.append(dict(zip(ids.tolist(), values.tolist())))
        place += count
    return found


# --- DistillKit -------------------------------------------------------------------------------------------------------


def bits(numbers: list[int], width: int) -> bytes:
    text = "".join(format(number, f"0{width}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def number(value: float, kind: str) -> bytes:
    if kind == "bfloat16":
        return struct.pack("<f", value)[2:]  # towards zero
    return struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[kind], value)


def compressed(logprobs: list[float], c: dict) -> bytes:
    """Falling log-probabilities by the options `c`."""
    k, e = c["k"], c["exact_k"]
    values = list(logprobs)
    if c["delta_encoding"]:
        values = values[:1] + [b - a for a, b in pairwise(values)]
    data = b"".join(number(v, c["exact_dtype"]) for v in values[:e])
    rest = np.array(values[e:])
    if c["polynomial_terms"]:
        t = np.linspace(0, 1, k - e) if c["normalize_t"] else np.arange(k - e, dtype=float)
        known = {"sqrt": np.sqrt, "exp": np.exp}
        terms = np.stack([known[i](t) if isinstance(i, str) else t**i for i in c["polynomial_terms"]], 1)
        coefficients = np.linalg.lstsq(terms, rest, rcond=None)[0]
        data += b"".join(number(float(v), c["term_dtype"]) for v in coefficients)
        rest = rest - terms @ coefficients
    at = 0
    for b in c["residual_bins"]:
        part, width = rest[at : at + b["num_elements"]], b["element_bits"]
        at += b["num_elements"]
        scale = float(np.abs(part).max()) / (1 if width == 1 else 2 ** (width - 1)) or 1.0
        data += number(scale, b["scale_dtype"])
        if width == 1:
            data += bits([int(v >= 0) for v in part], 1)
        else:
            half = 2 ** (width - 1)
            data += bits([min(max(round(v / scale), -half), half - 1) + half for v in part], width)
    return data


BASE = {
    "d": V, "k": 24, "exact_k": 24, "exact_dtype": "float32", "polynomial_terms": None, "term_dtype": "float32",
    "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
}  # fmt: skip


def bin_(dtype: str, width: int, count: int) -> dict:
    return {"scale_dtype": dtype, "element_bits": width, "num_elements": count}


def write_distillkit(folder, options: dict, rows: list[list[float]], tokens: list[int], name: str = "data_0", **extra):
    folder.mkdir(exist_ok=True)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(options))
    tops = [best(row, options["k"]) for row in rows]
    columns = {
        "input_ids": pa.array([tokens], pa.list_(pa.uint64())),
        "compressed_logprobs": [[list(compressed([r[i] for i in t], options)) for r, t in zip(rows, tops)]],
        "bytepacked_indices": [[list(bits(t, (options["d"] - 1).bit_length())) for t in tops]],
    }
    for column in ("compressed_logprobs", "bytepacked_indices"):
        columns[column] = pa.array(columns[column], pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table(columns | extra), folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, 1e-6),
        ({"exact_dtype": "float16"}, 0.005),
        ({"exact_dtype": "bfloat16"}, 0.07),
        ({"exact_dtype": "float64", "delta_encoding": True}, 1e-12),
        ({"delta_encoding": True, "exact_dtype": "float32"}, 1e-5),
        ({"exact_k": 8, "polynomial_terms": [0, 1, 2, "sqrt"]}, 0.3),
        ({"exact_k": 8, "polynomial_terms": [0, 1, "sqrt", "exp"], "normalize_t": True, "term_dtype": "float64"}, 0.3),
        ({"exact_k": 8, "polynomial_terms": [0, 1, "sqrt"], "residual_bins": [bin_("float32", 12, 16)]}, 1e-3),
        ({"exact_k": 4, "residual_bins": [bin_("float16", 7, 5), bin_("float64", 20, 15)]}, 0.15),
        ({"exact_k": 0, "residual_bins": [bin_("float64", 33, 24)], "delta_encoding": True}, 1e-6),
        ({"exact_k": 20, "polynomial_terms": [0], "residual_bins": [bin_("float32", 1, 2)]}, 0.5),
    ],
)
def test_distillkit_gives_the_distributions_that_were_packed(tmp_path, options, error):
    rows, tokens = truth(5), [7, 1, 2, 3, 900, 5]
    (sequence,) = DistillKit([write_distillkit(tmp_path, BASE | options, rows, tokens)])
    assert sequence.tokens.tolist() == tokens and sequence.positions == 5
    for row, found in zip(rows, split(sequence), strict=True):
        assert sorted(found) == sorted(best(row, 24))
        assert max(abs(found[i] - row[i]) for i in found) < error


def test_distillkit_one_bit_residuals_by_hand(tmp_path):
    """values = fit 0.5 t - 3, then +-0.25 on the first two."""
    options = BASE | {"k": 4, "exact_k": 1, "polynomial_terms": [0, 1], "residual_bins": [bin_("float32", 1, 2)]}
    folder = write_distillkit(tmp_path, options, truth(1), [1, 2])
    data = struct.pack("<ffff", -0.125, -3.0, 0.5, 0.25) + bytes([0b10000000])
    table = pq.read_table(folder / "data_0.parquet")
    table = table.set_column(1, "compressed_logprobs", pa.array([[list(data)]], pa.list_(pa.list_(pa.uint8()))))
    pq.write_table(table, folder / "data_0.parquet")
    (sequence,) = DistillKit([folder])
    assert sequence.entries.logprobs_N.tolist() == [-0.125, -2.75, -2.75, -2.0]


def test_distillkit_packed_rows_are_several_sequences_and_files_come_in_order(tmp_path):
    rows, tokens = truth(6), [1, 2, 3, 4, 5, 6]
    mask = pa.array([[1, 1, 2, 2, 2, 0]])
    for name in ("data_10", "data_2"):
        write_distillkit(tmp_path, BASE, rows, tokens, name, attention_mask=mask)
    found = list(DistillKit([tmp_path]))
    assert [s.tokens.tolist() for s in found] == [[1, 2], [3, 4, 5]] * 2
    assert "data_2" in found[0].where and "data_10" in found[2].where
    assert split(found[1])[0] == pytest.approx({i: rows[2][i] for i in best(rows[2], 24)}, abs=1e-5)


def test_distillkit_keeps_fewer_when_asked(tmp_path):
    rows = truth(3)
    source = DistillKit([write_distillkit(tmp_path, BASE, rows, [1, 2, 3])], k=3)
    assert [sorted(found) for found in split(next(iter(source)))] == [sorted(best(row, 3)) for row in rows]
    assert source.info.k == 3 and "top-3" in source.info.bias


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"polynomial_degree": 8}, "polynomial_degree"),
        ({"exact_dtype": "float8"}, "exact_dtype"),
        ({"residual_bins": [bin_("float32", 64, 4)], "exact_k": 20}, "element_bits is 64"),
        ({"polynomial_terms": ["cos"], "exact_k": 20}, "cos"),
        ({"exact_k": 30}, "exact_k is 30"),
        ({"exact_k": 20}, "nothing describes"),
        ({"k": "many"}, "k is 'many'"),
        ({"wavelets": 3}, "wavelets"),
        ({"exact_k": 20, "polynomial_terms": [0]}, "bytes of compressed_logprobs"),
        ({"d": 200_000}, "bytes of bytepacked_indices"),
        ({"d": 600}, "d is 600"),
    ],
)
def test_distillkit_options_that_do_not_fit_are_refused_by_name(tmp_path, options, named):
    write_distillkit(tmp_path, BASE, truth(3), [1, 2, 3])
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(BASE | options))
    with pytest.raises(CacheError, match=named):
        list(DistillKit([tmp_path]))


# --- plain Parquet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits", "logprobs"])
def test_plain_dense_rows_come_as_they_are(tmp_path, name):
    rows = truth(4)
    pq.write_table(pa.table({"input_ids": [[1, 2, 3, 4]], name: [rows]}), tmp_path / "a.parquet")
    source = PlainParquet([tmp_path])
    (sequence,) = source
    assert source.info.k is None and np.allclose(sequence.dense_PV, rows, atol=1e-5)


def test_plain_top_k_with_named_columns_and_a_shift(tmp_path):
    rows = truth(3)
    tops = [[], *(best(row, 4) for row in rows)]
    values = [[], *([row[i] for i in top] for row, top in zip(rows, tops[1:]))]
    pq.write_table(pa.table({"t": [[9, 1, 2, 3]], "token_ids": [tops], "top_values": [values]}), tmp_path / "a.parquet")
    (sequence,) = PlainParquet([tmp_path], tokens="t", ids="token_ids", values="top_values", shifted=True, k=4)
    assert sequence.tokens.tolist() == [9, 1, 2, 3] and sequence.positions == 3
    for row, found in zip(rows, split(sequence), strict=True):
        assert found == pytest.approx({i: row[i] for i in best(row, 4)})


def test_plain_top_k_logits_with_and_without_their_sum(tmp_path):
    rows = truth(2)
    tops = [best(row, 4) for row in rows]
    raw = [[row[i] + 7.0 for i in top] for row, top in zip(rows, tops)]
    table = {"input_ids": [[1, 2]], "topk_ids": [tops], "topk_logprobs": [raw], "lse": [[7.0, 7.0]]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (whole,) = PlainParquet([tmp_path], lse="lse")
    assert split(whole)[1] == pytest.approx({i: rows[1][i] for i in tops[1]})
    source = PlainParquet([tmp_path], logits=True)
    (scaled,) = source
    mass = math.fsum(math.exp(rows[1][i]) for i in tops[1])
    assert split(scaled)[1] == pytest.approx({i: rows[1][i] - math.log(mass) for i in tops[1]})
    assert "over-confident" in source.info.bias
    with pytest.raises(CacheError, match=r"a\.parquet row 0, position 0: a value is [3-7]"):
        list(PlainParquet([tmp_path]))


# --- vLLM -------------------------------------------------------------------------------------------------------------


def request(rows: list[list[float]], tokens: list[int], k: int) -> dict:
    found: list = [None]
    for row, token in zip(rows, tokens[1:]):
        rank = {i: r for r, i in enumerate(sorted(range(V), key=lambda i: -row[i]), 1)}
        wanted = best(row, k) + ([] if rank[token] <= k else [token])
        found.append({str(i): {"logprob": row[i], "rank": rank[i], "decoded_token": "x"} for i in wanted})
    return {"prompt_token_ids": tokens, "prompt_logprobs": found}


def vllm_case() -> tuple[list[list[float]], list[int], dict]:
    rows = truth(4)
    tokens = [3, best(rows[0], 1)[0], best(rows[1], 500)[-1], best(rows[2], 900)[-1], best(rows[3], 6)[-1]]
    return rows, tokens, request(rows, tokens, 5)


def check_vllm(source: Vllm) -> None:
    rows, tokens, _ = vllm_case()
    (sequence,) = source
    assert sequence.tokens.tolist() == tokens and source.info.k == 5
    for row, token, found, label in zip(rows, tokens[1:], split(sequence), sequence.label_logprobs_P, strict=True):
        assert found == pytest.approx({i: row[i] for i in best(row, 5)})
        assert label == pytest.approx(row[token])


def test_vllm_keeps_the_top_and_takes_the_label_from_beyond_it(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(vllm_case()[2]) + "\n\n")
    check_vllm(Vllm([tmp_path]))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "choices": [vllm_case()[2]]}) + "\n")
    check_vllm(Vllm([tmp_path]))


def test_vllm_labels_all_beyond_the_top_do_not_widen_it(tmp_path):
    rows = truth(3)
    tokens = [3, *(best(row, 400)[-1] for row in rows)]
    (tmp_path / "a.jsonl").write_text(json.dumps(request(rows, tokens, 5)))
    source = Vllm([tmp_path])
    (sequence,) = source
    assert source.info.k == 5
    assert [sorted(found) for found in split(sequence)] == [sorted(best(row, 5)) for row in rows]


@pytest.mark.parametrize("kind", ["map", "structs", "text", "inferred"])
def test_vllm_in_parquet_however_it_was_dumped(tmp_path, kind):
    case = vllm_case()[2]
    found = case["prompt_logprobs"]
    value = pa.struct([("logprob", pa.float64()), ("rank", pa.int32())])
    bare = [e and {int(i): {"logprob": v["logprob"], "rank": v["rank"]} for i, v in e.items()} for e in found]
    if kind == "map":
        column = pa.array([[e and list(e.items()) for e in bare]], pa.list_(pa.map_(pa.int64(), value)))
    elif kind == "structs":
        column = pa.array([[e and [{"token_id": i, **v} for i, v in e.items()] for e in bare]])
    elif kind == "text":
        column = pa.array([json.dumps(found)])
    else:
        column = pa.array([found])
    pq.write_table(
        pa.table({"prompt_token_ids": [case["prompt_token_ids"]], "prompt_logprobs": column}), tmp_path / "a.parquet"
    )
    check_vllm(Vllm([tmp_path]))


def test_vllm_numbers_without_ranks_and_the_servers_minus_infinity(tmp_path):
    line = {
        "prompt_token_ids": [1, 2, 3],
        "prompt_logprobs": [None, {"2": -0.5, "7": -1.5}, {"9": -0.1, "8": -9999.0, "3": -5}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    (sequence,) = Vllm([tmp_path])
    assert split(sequence) == [{2: -0.5, 7: -1.5}, {9: -0.1, 3: -5.0}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["prompt_logprobs"].pop(), "5 prompt_token_ids, 4 prompt_logprobs"),
        (
            lambda r: r["prompt_logprobs"].__setitem__(0, r["prompt_logprobs"][1]),
            "first of prompt_logprobs is not null",
        ),
        (lambda r: r["prompt_logprobs"].__setitem__(2, {"5": "high"}), "entry 2"),
        (lambda r: r.pop("prompt_token_ids"), "needs the lists"),
        (lambda r: r["prompt_logprobs"].__setitem__(2, {"5": {"logprob": 3.5, "rank": 1}}), "a value is 3.5"),
    ],
)
def test_vllm_requests_that_are_not_whole_are_refused(tmp_path, change, named):
    record = vllm_case()[2]
    change(record)
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(CacheError, match=rf"a\.jsonl line 2.*{named}"):
        list(Vllm([tmp_path], k=5))


def settings(kind, **shown):
    """A case whose request is written beside its outputs, in one of the places where users have it."""
    case = vllm_case()[2]
    if kind == "choices":
        return {"choices": [case]} | shown
    return case | ({"sampling_params": shown} if kind == "params" else shown)


@pytest.mark.parametrize("kind", ["beside", "params", "choices", "parquet"])
@pytest.mark.parametrize(
    ("shown", "given", "problem"),
    [
        ({}, None, None),
        ({"temperature": 1.0}, None, None),
        ({"temperature": 0}, None, None),
        ({"temperature": 0.7}, None, r"temperature is 0\.7, so its values may be other targets .* --temperature 0\.7"),
        ({"temperature": 0.7}, 1.0, None),
        ({"temperature": 0.7}, 0.7, None),
        ({"temperature": 0.7}, 0.5, r"its temperature is 0\.7; --temperature is 0\.5"),
        ({"temperature": 0.7, "logprobs_mode": "raw_logprobs"}, None, None),
        ({"temperature": 0.7, "logprobs_mode": "raw_logprobs"}, 0.7, r"its temperature is 1\.0; --temperature is 0\.7"),
        ({"temperature": 0.7, "logprobs_mode": "processed_logprobs"}, None, "logprobs_mode is processed_logprobs"),
        ({"temperature": 0.7, "logprobs_mode": "processed_logprobs"}, 1.0, r"its temperature is 0\.7"),
        ({"temperature": 0.7, "logprobs_mode": "processed_logprobs"}, 0.7, None),
        ({"logprobs_mode": "processed_logprobs"}, None, "--temperature 1"),
        ({"logprobs_mode": "processed_logprobs"}, 1.0, None),
        ({"logprobs_mode": "raw_logits"}, None, "logprobs_mode is 'raw_logits'; its values are no log-probabilities"),
    ],
)
def test_vllm_says_when_values_are_of_another_temperature(tmp_path, kind, shown, given, problem):
    if kind == "parquet":
        case = vllm_case()[2]
        columns = {
            "prompt_token_ids": [case["prompt_token_ids"]],
            "prompt_logprobs": [json.dumps(case["prompt_logprobs"])],
        }
        pq.write_table(pa.table(columns | {name: [value] for name, value in shown.items()}), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps(settings(kind, **shown)) + "\n")
    source = Vllm([tmp_path], temperature=given)
    if problem:
        with pytest.raises(CacheError, match=rf"a\.(jsonl line 1|parquet row 0): .*{problem}"):
            list(source)
    else:
        check_vllm(source)
        is_other = given not in (None, 1.0) or shown.get("logprobs_mode") == "processed_logprobs"
        assert (f"processed at temperature {given or 1:g}, so these are other targets" in source.info.bias) == is_other


@pytest.mark.parametrize("given", [0.0, -1.0, math.nan, math.inf])
def test_vllm_temperatures_that_cannot_be_are_refused(tmp_path, given):
    (tmp_path / "a.jsonl").write_text(json.dumps(vllm_case()[2]))
    with pytest.raises(ConfigError, match="--temperature is"):
        Vllm([tmp_path], temperature=given)


# --- Megatron-LM ------------------------------------------------------------------------------------------------------


def payload(micros: list[list[list[list[float]]]], k: int, nucleus: int | None = None) -> bytes:
    """micros[micro-batch][sequence][position] are dense rows; of each the k largest, of every other one `nucleus`."""
    lists: dict = {"values": [], "indices_low": [], "bit_17": []}
    for micro in micros:
        shape = (len(micro[0]), len(micro), k)
        values, ids = torch.full(shape, -1000.0), torch.full(shape, -1, dtype=torch.int64)
        for b, rows in enumerate(micro):
            for s, row in enumerate(rows):
                top = best(row, nucleus if nucleus and s % 2 else k)
                values[s, b, : len(top)] = torch.tensor([row[i] for i in top])
                ids[s, b, : len(top)] = torch.tensor(top) * 131  # beyond 16 bits
        lists["values"].append(values.half())
        lists["indices_low"].append((ids & 0xFFFF).to(torch.uint16))
        lists["bit_17"].append((ids >> 16).bool())
    buffer = io.BytesIO()
    torch.save(lists, buffer)
    return pa.compress(buffer.getvalue(), codec="zstd", asbytes=True)


def write_tar(path, members: dict[str, bytes], meta: dict | None = None) -> None:
    meta = meta or {"hash": "0" * 32, "saver": {"k": 4, "p": None, "min_k": 1, "save_dtype": "fp16"}}
    with tarfile.open(path, "w") as tar:
        for name, data in {"_meta.json": json.dumps(meta).encode(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def same(sequence, rows: list[list[float]], k: int = 4, nucleus: int | None = None) -> None:
    for s, (row, found) in enumerate(zip(rows, split(sequence), strict=True)):
        top = best(row, nucleus if nucleus and s % 2 else k)
        assert found == pytest.approx({i * 131: row[i] for i in top}, rel=1e-3)


@pytest.mark.parametrize("nucleus", [None, 2])
def test_megatron_sequences_come_in_the_order_of_training(tmp_path, nucleus):
    """Two data-parallel ranks, two micro-batches of two sequences, three iterations in two tars of each."""
    dense = {i: [truth(3, seed=100 * i + n) for n in range(8)] for i in (9, 10, 11)}
    for d in range(2):
        data = {}
        for i, sequences in dense.items():
            mine = [sequences[4 * j + 2 * d : 4 * j + 2 * d + 2] for j in range(2)]
            data[i] = payload(mine, 4, nucleus)
        write_tar(tmp_path / f"cp0_dp{d}__9.tar", {"9.pt.zst": data[9]})
        write_tar(tmp_path / f"cp0_dp{d}__11.tar", {f"{i}.pt.zst": data[i] for i in (10, 11)})
    source = Megatron([tmp_path])
    found = list(source)
    assert len(found) == 24 and source.info.k == 4 and "order given" in source.info.bias
    for sequence, rows in zip(found, [rows for i in (9, 10, 11) for rows in dense[i]], strict=True):
        assert sequence.tokens is None
        same(sequence, rows, nucleus=nucleus)


def test_megatron_context_parallel_parts_are_put_together(tmp_path):
    rows = truth(8)
    for c, places in enumerate(([0, 1, 6, 7], [2, 3, 4, 5])):
        write_tar(tmp_path / f"cp{c}_dp0__1.tar", {"1.pt.zst": payload([[[rows[p] for p in places]]], 4 - c)})
    (sequence,) = Megatron([tmp_path])
    same_as = [best(row, 3 if p in (2, 3, 4, 5) else 4) for p, row in enumerate(rows)]
    assert [sorted(found) for found in split(sequence)] == [sorted(131 * i for i in top) for top in same_as]


class Trap:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_megatron_never_unpickles_code(tmp_path, capsys):
    buffer = io.BytesIO()
    torch.save({"values": [Trap()], "indices_low": [], "bit_17": []}, buffer)
    write_tar(tmp_path / "cp0_dp0__1.tar", {"1.pt.zst": pa.compress(buffer.getvalue(), codec="zstd", asbytes=True)})
    with pytest.raises(CacheError, match=r"cp0_dp0__1\.tar member 1\.pt\.zst is damaged"):
        list(Megatron([tmp_path]))
    assert "unpickled" not in capsys.readouterr().out


def test_megatron_gaps_and_missing_ranks_are_refused(tmp_path):
    data = payload([[truth(2)]], 4)
    write_tar(tmp_path / "cp0_dp0__3.tar", {"1.pt.zst": data, "3.pt.zst": data})
    with pytest.raises(CacheError, match=r"cp0_dp0__3\.tar: iteration 3 follows 1"):
        list(Megatron([tmp_path]))
    write_tar(tmp_path / "cp0_dp2__1.tar", {"1.pt.zst": data})
    with pytest.raises(CacheError, match=r"no cp0_dp1__\*\.tar"):
        Megatron([tmp_path])
    write_tar(tmp_path / "cp0_dp1__1.tar", {"1.pt.zst": data})
    with pytest.raises(CacheError, match="cp0_dp1 has no more, cp0_dp0 has iteration 3"):
        list(Megatron([tmp_path]))


def test_a_tar_cut_between_members_is_refused(tmp_path):
    data = payload([[truth(2)]], 4)
    write_tar(tmp_path / "cp0_dp0__2.tar", {"1.pt.zst": data})
    with pytest.raises(CacheError, match=r"cp0_dp0__2\.tar is damaged: by its name"):
        list(Megatron([tmp_path]))


# --- damage -----------------------------------------------------------------------------------------------------------


def cases(folder) -> dict:
    """A whole file of each format, and how it is opened."""
    rows, tokens = truth(3), [1, 2, 3, 4]
    write_distillkit(folder / "dk", BASE, rows, tokens)
    pq.write_table(pa.table({"input_ids": [tokens], "logits": [rows]}), folder / "plain.parquet")
    (folder / "v.jsonl").write_text(json.dumps(request(rows, tokens, 5)) + "\n")
    write_tar(folder / "cp0_dp0__1.tar", {"1.pt.zst": payload([[rows]], 4)})
    return {
        "distillkit": (folder / "dk" / "data_0.parquet", DistillKit),
        "plain": (folder / "plain.parquet", PlainParquet),
        "vllm": (folder / "v.jsonl", Vllm),
        "megatron": (folder / "cp0_dp0__1.tar", Megatron),
    }


@pytest.mark.parametrize("name", ["distillkit", "plain", "vllm", "megatron"])
def test_files_cut_short_are_refused_by_name(tmp_path, name):
    path, reader = cases(tmp_path)[name]
    whole = path.read_bytes()
    assert len(list(reader([path]))) == 1
    end = len(whole.rstrip(b"\0"))  # a tar ends with zeros that nothing needs
    for size in (0, 1, end // 3, end // 2, end - 40, end - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CacheError, match=path.name):
            list(reader([path]))


@pytest.mark.parametrize("name", ["distillkit", "plain", "vllm", "megatron"])
def test_flipped_bits_never_give_a_traceback(tmp_path, name):
    path, reader = cases(tmp_path)[name]
    whole = path.read_bytes()
    draw, refused = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draw.integers(len(whole))] ^= 1 << int(draw.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            list(reader([path]))
        except CacheError as error:
            assert path.name in str(error)
            refused += 1
    assert refused  # formats without checksums let most of them pass, which is said in their bias


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([5, 6, 5], "position 1: id 5 comes twice"),
        ([5, -6, 7], "position 1: id is -6"),
        ([5, 2**24, 7], "below 2\\*\\*24"),
    ],
)
def test_ids_that_cannot_be(tmp_path, ids, named):
    values = [[-1.0, -2.0, -3.0]] * 2
    table = {"input_ids": [[1, 2]], "topk_ids": [[[1, 2, 5], ids]], "topk_logprobs": [values]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(CacheError, match=rf"a\.parquet row 0.*{named}"):
        list(PlainParquet([tmp_path]))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(CacheError, match="nowhere: no such file"):
        PlainParquet([tmp_path / "nowhere"])
    with pytest.raises(CacheError, match=r"no \*\.parquet"):
        PlainParquet([tmp_path])
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CacheError, match="has no column input_ids, topk_ids, topk_logprobs; its columns are text"):
        PlainParquet([tmp_path])
    pq.write_table(pa.table({"input_ids": ["a"], "logits": [[[0.5]]]}), tmp_path / "a.parquet")
    with pytest.raises(CacheError, match="column input_ids is string; it must be a list of integers"):
        PlainParquet([tmp_path])
