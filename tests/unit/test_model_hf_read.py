"""Reading by slice: any part of any parameter, every way that experts are stored, and what it costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config.errors import CheckpointError
from distill.config.schema import VisionConfig
from distill.model import Transformer, hf
from tests.cli import PATIENCE, environment
from tests.unit.test_model_attention import config_of

EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
VISION = VisionConfig(hidden_size=16, layers=1, heads=2, mlp_hidden=64, tile_size=8, patch_size=2, adapter_hidden=8,
                      adapter_out=8, image_token_id=63)  # fmt: skip


def model_of(**changes):
    torch.manual_seed(0)
    return Transformer(config_of(eos_ids=[3], bos_id=1, pad_id=None, **changes))


def rewrite(folder, change):
    """Passes every tensor through `change(key, tensor)`, which yields what takes its place."""
    tensors = load_file(folder / "model.safetensors")
    changed = {k: t.contiguous() for key, tensor in tensors.items() for k, t in change(key, tensor)}
    save_file(changed, folder / "model.safetensors")


def one_by_one(key, tensor):
    """The layout of checkpoints whose experts are linear layers, (out, in) each."""
    found = EXPERTS.fullmatch(key)
    if not found:
        yield key, tensor
        return
    for e, matrix in enumerate(tensor):
        parts = {"down_proj": matrix.T}
        if found[2] == "gate_up_proj":
            half = matrix.shape[1] // 2
            parts = {"gate_proj": matrix[:, :half].T, "up_proj": matrix[:, half:].T}
        yield from ((f"{found[1]}.{e}.{name}.weight", part) for name, part in parts.items())


def in_fp8(scales, only="proj.weight"):
    """Matrices in FP8 with scales beside them, as compressed-tensors stores them."""

    def change(key, tensor):
        for name, part in one_by_one(key, tensor):
            if not name.endswith(only):
                yield name, part
                continue
            scale = part.abs().amax(1, keepdim=True) / 448 if scales == "rows" else part.abs().max().reshape(1) / 448
            yield name, (part / scale).to(torch.float8_e4m3fn)
            yield name + "_scale", scale.bfloat16()

    return change


def quantized(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}, "ignore": []}
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": settings | changes}))


@pytest.fixture
def folder(tmp_path):
    hf.save(model_of(), tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------- parts


LAYOUTS = {"fused": None, "one by one": one_by_one, "fp8": in_fp8("rows")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_make_the_whole(folder, layout, monkeypatch):
    if LAYOUTS[layout]:
        rewrite(folder, LAYOUTS[layout])
        quantized(folder)
    whole = dict(hf.load(folder).named_parameters())
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(hf.read_checkpoint, "_BLOCK", 64)  # so that a matrix takes several
    with hf.Reader(folder) as reader:
        assert reader.shapes == {name: parameter.shape for name, parameter in whole.items()}
        for name, parameter in whole.items():
            flat = parameter.detach().flatten()
            for world in (1, 3, 4):  # shares of equal length, the last one shorter, as ZeRO-3 cuts them
                size = -(-len(flat) // world)
                shares = [torch.empty(max(0, min(size, len(flat) - r * size))) for r in range(world)]
                joined = torch.cat([reader.read(name, share, r * size) for r, share in enumerate(shares)])
                assert torch.equal(joined, flat), (name, world)
            first, last = sorted(torch.randint(0, len(parameter) + 1, (2,), generator=generator).tolist())
            rows = rows_of(reader, name, first, last, torch.float64)
            assert rows.dtype == torch.float64 and torch.equal(rows, parameter[first:last].double()), name


def rows_of(reader, name, first, last, dtype=None):
    """Rows [first, last) of a parameter's leading dimension."""
    shape = reader.shapes[name]
    out = torch.empty((last - first, *shape[1:]), dtype=dtype)
    reader.read(name, out.view(-1), first * shape[1:].numel())
    return out


def test_only_the_bytes_of_the_part_are_touched(tmp_path):
    # 64 MB of experts: a rank that keeps two of sixteen maps in an eighth, and what the kernel reads around it.
    config = config_of(vocab_size=64, hidden_size=256, layers=1, experts=16, moe_step=1, expert_hidden=1536)
    model = Transformer(config)
    hf.save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    size = {name: p.nbytes for name, p in model.named_parameters()}
    name = "layers.0.feed_forward.experts.gate_up_proj"
    with hf.Reader(tmp_path / "model") as reader:
        part = rows_of(reader, name, 6, 8)
        assert torch.equal(part, model.layers[0].feed_forward.experts.gate_up_proj[6:8])
        touched = resident(file)
        assert size[name] / 8 <= touched < size[name] / 4
        rows_of(reader, name, 0, 16)
        assert resident(file) >= size[name]  # so it is this file's mapping that is looked at


def resident(file):
    """Bytes of a mapped file in this process' memory, as the kernel counts them."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


# ---------------------------------------------------------------- layouts


def test_experts_stored_one_by_one(folder):
    expected = hf.load(folder).state_dict()
    rewrite(folder, one_by_one)
    assert "model.layers.1.feed_forward.experts.3.up_proj.weight" in load_file(folder / "model.safetensors")
    found = hf.load(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["one by one", "fp8"])
def test_a_single_expert_stored_alone(tmp_path, layout):
    hf.save(model_of(experts=1), tmp_path / "model")
    expected = dict(hf.load(tmp_path / "model").named_parameters())
    rewrite(tmp_path / "model", LAYOUTS[layout])
    quantized(tmp_path / "model")
    for name, parameter in hf.load(tmp_path / "model").named_parameters():
        assert (parameter - expected[name]).norm() <= (0.04 if layout == "fp8" else 0) * expected[name].norm(), name


@pytest.mark.parametrize("scales", ["rows", "one"])
@pytest.mark.parametrize("only", ["proj.weight", "experts.0.up_proj.weight"])
def test_fp8_weights_are_scaled(folder, scales, only):
    exact = dict(hf.load(folder).named_parameters())
    rewrite(folder, in_fp8(scales, only))
    quantized(folder)
    stored = load_file(folder / "model.safetensors")

    def value(key):
        weight, scale = stored[key], stored.get(key + "_scale")
        return weight.double() * scale.double().reshape(-1, 1) if scale is not None else weight.double()

    for dtype in (torch.float32, torch.bfloat16):
        found = dict(hf.load(folder, dtype).named_parameters())
        for layer in (1, 3):
            at = f"layers.{layer}.feed_forward."
            for e in range(4):
                gate, up, down = (value(f"model.{at}experts.{e}.{p}_proj.weight") for p in ("gate", "up", "down"))
                expected = torch.cat([gate.T, up.T], 1).float().to(dtype)
                assert torch.equal(found[at + "experts.gate_up_proj"][e], expected)
                assert torch.equal(found[at + "experts.down_proj"][e], down.T.float().to(dtype))
        for key in ("layers.0.self_attn.q_proj.weight", "layers.1.feed_forward.shared_expert.down_proj.weight",
                    "layers.0.feed_forward.up_proj.weight", "layers.1.feed_forward.router.weight"):  # fmt: skip
            assert torch.equal(found[key], value("model." + key).float().to(dtype))
    for name, parameter in exact.items():  # e4m3 has three bits of mantissa, the scale is bf16
        error = (found[name].float() - parameter).norm() / parameter.norm()
        assert error < 0.04, f"{name}: {error:.3f}"


def test_fp8_needs_scales_that_fit(folder):
    rewrite(folder, in_fp8("rows"))
    said = refusal(folder)  # the configuration says nothing of it
    assert "q_proj.weight is stored as F8_E4M3; allowed: F64, F32, F16, BF16" in said
    assert "model.layers.0.self_attn.q_proj.weight_scale is unknown to the model" in said
    quantized(folder)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.feed_forward.experts.2.down_proj.weight"
    tensors["model.layers.0.self_attn.k_proj.weight_scale"] = torch.ones(3, 1)
    tensors["model.layers.0.self_attn.v_proj.weight_scale"] = torch.ones(16, 1, dtype=torch.int32)
    tensors["model.layers.0.self_attn.v_proj.input_scale"] = torch.ones(1)  # of activations: not read, not refused
    del tensors[key + "_scale"]
    save_file(tensors, folder / "model.safetensors")
    attention = "model.safetensors: model.layers.0.self_attn."
    assert refusal(folder).splitlines() == [
        attention + "k_proj.weight_scale has shape [3, 1]; allowed: [1] or one for each row, [16, 1]",
        attention + "v_proj.weight_scale is stored as I32; allowed: F64, F32, F16, BF16",
        f"model.safetensors: {key} is stored as F8_E4M3; {key}_scale is in no file",
    ]


def test_a_missing_expert_is_named(folder):
    rewrite(folder, lambda k, t: (pair for pair in one_by_one(k, t) if "1.feed_forward.experts.3.gate" not in pair[0]))
    key = "model.layers.1.feed_forward.experts.3.gate_proj.weight"
    assert refusal(folder) == f"{folder}: {key} [24, 32] is in no file"
    rewrite(folder, lambda k, t: [] if "1.feed_forward.experts.0" in k else [(k, t)])
    key = key.replace("3.gate", "0.gate")
    assert len(refusal(folder).splitlines()) == 4 and f"{key} [24, 32] is in no file" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_as_asked(folder, dtype):
    model = hf.load(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(r.bias.dtype == torch.float32 and not r.bias.any() for r in model.routers)
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(model.parameters(), hf.load(folder).parameters()))


# ---------------------------------------------------------------- vision


def test_text_and_vision_round_trip(tmp_path):
    model = model_of(vision=VISION)
    hf.save(model, tmp_path / "both", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "both" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    prefixes = {key.split(".")[0] for key in index["weight_map"]}
    assert prefixes == {"language_model", "vision_model", "multi_modal_projector"}
    loaded = hf.load(tmp_path / "both")
    assert loaded.config == model.config
    assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in model.state_dict().items())
    text = hf.load(tmp_path / "both", vision=False)
    assert text.config.vision is None and text.vision_model is None
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in text.state_dict().items())


def test_vision_is_looked_for_unless_it_is_not_wanted(tmp_path):
    hf.save(model_of(vision=VISION), tmp_path / "both")
    file = tmp_path / "both" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if k.startswith("language_model.")}, file)
    said = refusal(tmp_path / "both")
    assert "vision_model.class_embedding [16] is in no file" in said and "linear_1.weight [32, 8] is in no" in said
    hf.load(tmp_path / "both", vision=False)
    save_file(tensors | {"vision_model.colour": torch.ones(1)}, file)
    assert "vision_model.colour is unknown to the model" in refusal(tmp_path / "both")
    hf.load(tmp_path / "both", vision=False)
    # A text-only folder has no vision to leave out.
    hf.save(model_of(), tmp_path / "text")
    rewrite(
        tmp_path / "text", lambda k, t: [(k, t), *([("vision_model.x", t + 1)] if k == "model.norm.weight" else [])]
    )
    with pytest.raises(CheckpointError, match=r"vision_model\.x is unknown to the model"):
        hf.load(tmp_path / "text", vision=False)


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        hf.load(folder)
    return str(error.value)


# ---------------------------------------------------------------- files as they come


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 20112345\n"


def sharded(folder):
    """The folder in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    return {"metadata": {"total_size": 1}, "weight_map": where}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("here", ["", "./"])
def test_a_byte_order_mark_and_spellings_of_file_names_change_nothing(folder, mark, here):
    want = dict(hf.load(folder).named_parameters())
    index = sharded(folder)
    names = enumerate(index["weight_map"].items())
    index["weight_map"] = {name: here * (i % 3 > 0) + file for i, (name, file) in names}
    config = (folder / "config.json").read_text()
    for name, text in (("model.safetensors.index.json", json.dumps(index)), ("config.json", config)):
        (folder / name).write_text(f"{mark}{text}\r\n \n", encoding="utf-8")
    found = dict(hf.load(folder).named_parameters())
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def test_missing_shards_and_pointers_of_git_lfs_are_each_named(folder):
    index = sharded(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    first, second = sorted(folder.glob("model-*.safetensors"))
    second.write_text(POINTER)
    good = first.read_bytes()
    first.unlink()
    gone, pointer = refusal(folder).splitlines()
    assert gone == f"{first} is named by model.safetensors.index.json but is no file of the folder"
    assert pointer.startswith(f"{second} is a pointer of Git LFS") and "git lfs pull" in pointer
    first.write_bytes(good)
    assert refusal(folder) == pointer
    (folder / "config.json").write_text(POINTER)
    assert refusal(folder).startswith(f"{folder}/config.json is a pointer of Git LFS")


@pytest.mark.parametrize("content", [b"", b"hello", b"[]", b"\xff\xfe{\x00", b'{"a": 1', b"<html>"])
def test_what_is_no_json_is_one_line(folder, content):
    (folder / "config.json").write_bytes(content)
    said = refusal(folder)
    assert str(folder / "config.json") in said and "\n" not in said


# ---------------------------------------------------------------- memory


MB = 2**20
BIG = dict(vocab_size=64, hidden_size=512, layers=1, experts=16, moe_step=1, expert_hidden=4096, dense_hidden=8)


def measured(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.hf_memory", *map(str, arguments)],
        env=environment(MALLOC_ARENA_MAX="1"), capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """One layer with 200 MB of experts in bf16 (an expert: 12.6 MB), fused, and the same in FP8 one by one."""
    place = tmp_path_factory.mktemp("big")
    model = Transformer(config_of(**BIG))
    hf.save(model, place / "bf16", dtype=torch.bfloat16)
    hf.save(model, place / "fp8")
    rewrite(place / "fp8", in_fp8("rows", "_proj.weight"))
    quantized(place / "fp8")
    return place


@pytest.mark.parametrize("layout, dtype, most", [("bf16", "float32", 0.5), ("fp8", "bfloat16", 2)])
def test_loading_holds_an_expert_or_less_beyond_the_model(big, layout, dtype, most):
    """Less than so many of the 16 experts: what the system rounds up to its large pages has room."""
    got = measured("load", big / layout, dtype)
    assert got["model"] > 200 * MB * (2 if dtype == "float32" else 1)
    beyond = (got["peak"] - got["model"]) / (3 * 512 * 4096 * 2)
    assert beyond < most, f"{beyond:.1f} experts"  # fused experts are copied from the file's pages: nothing is held


def test_saving_holds_one_shard_beyond_the_model(big, tmp_path):
    # Two experts tensors of 134 and 67 MB in bf16, from a model in fp32: a shard each.
    got = measured("save", big / "bf16", "bfloat16", 70_000_000, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 2
    assert got["peak"] < 135_000_000 + 16 * MB, f"{got['peak'] / MB:.1f} MB"
