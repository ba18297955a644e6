"""Damaged Hugging Face folders: whatever is wrong, one error that names the file and the key; nothing half-written."""

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config.errors import CheckpointError
from distill.config.schema import VisionConfig
from distill.model import Transformer, hf
from tests.unit.test_model_attention import config_of

VISION = VisionConfig(hidden_size=16, layers=1, heads=2, mlp_hidden=64, tile_size=8, patch_size=2, adapter_hidden=8,
                      adapter_out=8, image_token_id=63)  # fmt: skip
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(config_of(layers=2, vision=VISION))  # a dense layer and a MoE layer


@pytest.fixture
def folder(model, tmp_path):
    hf.save(model, tmp_path / "model")
    return tmp_path / "model"


def kinds():
    """One key for each kind of tensor that a checkpoint has."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Transformer(config_of(layers=2, vision=VISION)), Path(folder) / "model")
        keys = sorted(load_file(Path(folder) / "model" / FILE))
    return sorted({re.sub(r"layers\.\d+", "layers.#", key): key for key in keys}.values())


KINDS = kinds()


def parsed(path):
    """Header, data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change(folder, key, tensor):
    """Puts another tensor (None: none) in a key's place."""
    tensors = load_file(folder / FILE)
    tensors |= {key: tensor}
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / FILE)


def refusals(folder):
    with pytest.raises(CheckpointError) as error:
        hf.load(folder)
    return str(error.value).splitlines()


def refusal(folder):
    (line,) = refusals(folder)
    return line


def test_every_kind_of_tensor_is_here():
    assert len(KINDS) == 44
    assert sum(key.startswith("vision_model.") for key in KINDS) == 25


# ---------------------------------------------------------------- one tensor


@pytest.mark.parametrize("key", KINDS)
def test_one_tensor_that_does_not_fit(folder, key):
    tensor = load_file(folder / FILE)[key]
    shape = list(tensor.shape)
    bare = key.removeprefix("language_model.")
    change(folder, key, None)
    assert refusal(folder) == f"{folder}: {bare} {shape} is in no file"
    change(folder, key, torch.zeros(shape[0] + 1, *shape[1:]))
    assert refusal(folder) == f"{FILE}: {key} has shape {[shape[0] + 1, *shape[1:]]}; the model's is {shape}"
    change(folder, key, tensor.unsqueeze(0))
    assert refusal(folder) == f"{FILE}: {key} has shape {[1, *shape]}; the model's is {shape}"
    for dtype, name in ((torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")):
        change(folder, key, tensor.to(dtype))
        assert refusal(folder) == f"{FILE}: {key} is stored as {name}; allowed: F64, F32, F16, BF16"
    change(folder, key, tensor)
    hf.load(folder)


@pytest.mark.parametrize("key", KINDS)
def test_a_file_cut_within_a_tensor(folder, key):
    header, data = parsed(folder / FILE)
    start, stop = header[key]["data_offsets"]
    write(folder / FILE, header, data[: (start + stop) // 2])
    later = sum(entry["data_offsets"][1] > stop for name, entry in header.items() if name != "__metadata__")
    also = f" and {later} more" if later else ""
    there = f"{(start + stop) // 2} of {len(data)} bytes of data are there"
    assert refusal(folder) == f"{FILE} is damaged: {key}{also} would end beyond it; {there}"


@pytest.mark.parametrize("key", [KINDS[3], KINDS[-1]])
@pytest.mark.parametrize(
    "edit, said",
    [
        ({"dtype": "BF16"}, "bytes; BF16"),
        ({"shape": [-1]}, "no valid dtype, shape and data_offsets"),
        ({"shape": "many"}, "no valid dtype, shape and data_offsets"),
        ({"shape": [2.0]}, "no valid dtype, shape and data_offsets"),
        ({"data_offsets": [0]}, "no valid dtype, shape and data_offsets"),
        ({"data_offsets": [8, 4]}, "no valid dtype, shape and data_offsets"),
        ({"dtype": None}, "no valid dtype, shape and data_offsets"),
        ({"dtype": "F4"}, "is stored as F4; allowed: F64, F32, F16, BF16"),
    ],
)
def test_one_entry_of_a_header(folder, key, edit, said):
    header, data = parsed(folder / FILE)
    header[key] |= edit
    write(folder / FILE, header, data)
    said_of_key = [line for line in refusals(folder) if key in line and said in line]
    assert said_of_key and all(FILE in line for line in said_of_key)


def test_tensors_that_overlap_or_leave_a_gap(folder):
    header, data = parsed(folder / FILE)
    inside = sorted((e["data_offsets"], k) for k, e in header.items() if k != "__metadata__")
    second, key = inside[1]
    header[key]["data_offsets"] = [0, second[1] - second[0]]
    write(folder / FILE, header, data)
    assert any(f"{FILE}: {key} begins at byte 0 of the data" in line for line in refusals(folder))
    header[key]["data_offsets"] = second
    write(folder / FILE, header, data + b"more")
    assert refusal(folder) == f"{FILE} is damaged: 4 bytes after its last tensor belong to none"


def test_all_faults_come_at_once(folder):
    tensors = load_file(folder / FILE)
    del tensors["language_model.model.norm.weight"]
    tensors["vision_model.class_embedding"] = torch.zeros(3)
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].int()
    tensors["language_model.model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, folder / FILE)
    assert len(refusals(folder)) == 4


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"", "it has 0 bytes and 8 bytes of header length are due"),
        (b"\x01\x02", "it has 2 bytes and 8 bytes of header length are due"),
        (b"\xff" * 64, "its header would be 18446744073709551615 bytes long"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "its header would be 200000000 bytes long"),
        ((20).to_bytes(8, "little") + b"{}", "it has 10 bytes and its header would be 20 bytes long"),
        ((6).to_bytes(8, "little") + b"nonsen", "its header is no JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "its header is no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no JSON object"),
        (b"<!doctype html><html>a page that was saved by mistake</html>", "its header would be"),
    ],
)
def test_no_safetensors_file(folder, raw, said):
    (folder / FILE).write_bytes(raw)
    line = refusal(folder)
    assert line.startswith(f"{folder / FILE} is damaged or no safetensors file") and said in line


def test_a_header_cut_short(folder):
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(raw[:100])
    line = refusal(folder)
    assert str(folder / FILE) in line and "it has 100 bytes and its header would be" in line


def test_a_key_twice_in_a_header(folder):
    header, data = parsed(folder / FILE)
    text = json.dumps(header)
    entry = json.dumps(header[KINDS[0]])
    write(folder / FILE, f'{text[:-1]}, "{KINDS[0]}": {entry}}}'.encode(), data)
    assert f"{KINDS[0]} more than once" in refusal(folder)


# ---------------------------------------------------------------- shards


@pytest.fixture
def shards(model, tmp_path):
    hf.save(model, tmp_path / "shards", max_shard_bytes=30_000)
    return tmp_path / "shards"


def index_of(folder):
    return json.loads((folder / f"{FILE}.index.json").read_text())


def set_index(folder, weight_map):
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_key_in_two_files(shards):
    weight_map = index_of(shards)["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    key = min(k for k, file in weight_map.items() if file == first)
    save_file(load_file(shards / second) | {key: load_file(shards / first)[key]}, shards / second)
    lines = refusals(shards)
    assert f"{key} is in {first} and in {second}" in lines
    assert f"{second}: {key} is in the file but not in {FILE}.index.json" in lines and len(lines) == 2


def test_a_shard_that_is_gone(shards):
    gone = sorted(shards.glob("model-*"))[1]
    gone.unlink()
    assert refusal(shards) == f"{gone} is named by {FILE}.index.json but is no file of the folder"


def test_an_index_and_files_that_disagree(shards):
    weight_map = index_of(shards)["weight_map"]
    key, file = min(weight_map.items())
    other = next(f for f in sorted(set(weight_map.values())) if f != file)
    set_index(shards, weight_map | {key: other})
    assert refusals(shards) == sorted([
        f"{file}: {key} is in the file but not in {FILE}.index.json",
        f"{other}: {key} is in {FILE}.index.json but not in the file",
    ])  # fmt: skip
    set_index(shards, weight_map | {"lm_head.extra": file})
    assert refusal(shards) == f"{file}: lm_head.extra is in {FILE}.index.json but not in the file"
    for broken in ({}, [], {"a": 3}, None):
        set_index(shards, broken)
        assert str(shards) in refusals(shards)[0]
    (shards / f"{FILE}.index.json").write_text("{")
    assert "model.safetensors.index.json cannot be read" in refusal(shards)


def test_every_damaged_shard_is_told(shards):
    files = sorted(shards.glob("model-*"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-1])
    first, second = refusals(shards)
    assert str(files[0]) in first and f"{files[1].name} is damaged: " in second


def test_a_second_checkpoint_in_the_folder(shards, model):
    save_file({"x": torch.zeros(1)}, shards / FILE)
    assert "remove one of them" in refusal(shards)


@pytest.mark.parametrize(
    "file, said",
    [
        ("pytorch_model.bin", "pickles, which are never loaded"),
        ("consolidated.00.pth", "Meta's own format: convert it first"),
        ("readme.md", "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_other_formats(folder, file, said):
    (folder / FILE).rename(folder / file)
    assert said in refusal(folder)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("when", [0, 1])
def test_a_disk_that_fills_up(model, tmp_path, monkeypatch, when):
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > when:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path, metadata)

    monkeypatch.setattr("distill.model.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        hf.save(model, tmp_path / "out", max_shard_bytes=30_000)
    assert len(calls) == when + 1 and list(tmp_path.iterdir()) == []


def test_further_files_that_fail_take_all_with_them(model, tmp_path):
    def also(folder):
        assert (folder / "config.json").exists() and not (tmp_path / "out").exists()
        raise RuntimeError("no tokenizer")

    with pytest.raises(RuntimeError, match="no tokenizer"):
        hf.save(model, tmp_path / "out", also=also)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_is_swept_away(model, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    hf.save(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json", FILE]
