"""A slow reader of caches, written from docs/cache.md alone, in plain integers."""

import json
import struct
from fractions import Fraction
from itertools import pairwise

import xxhash
from safetensors import safe_open


class Bits:
    """One record's two streams."""

    def __init__(self, data):
        self.data, self.at, self.bit = data, 4, 0
        self.width, self.code = 2**32 - 1, int.from_bytes((data + b"\0" * 4)[:4], "big")
        self.models = [[[1024 * i for i in range(33)], 0] for _ in range(111)]

    def symbol(self, number):
        model, uses = self.models[number]
        unit = self.width >> 15
        s = max(i for i in range(32) if model[i] <= self.code // unit)
        self.code -= unit * model[s]
        self.width = unit * (model[s + 1] - model[s])
        while self.width < 2**24:
            self.code = self.code << 8 | (self.data[self.at] if self.at < len(self.data) else 0)
            self.at += 1
            self.width <<= 8
        rate = min(2 + (uses >> 2).bit_length(), 7)
        for i in range(1, 32):
            model[i] += ((i if i <= s else 32768 - 32 + i) - model[i]) >> rate
        self.models[number][1] = uses + 1
        return s

    def raw(self, count):
        value = 0
        for i in range(count):
            byte = self.data[len(self.data) - 1 - self.bit // 8]
            value |= (byte >> self.bit % 8 & 1) << i
            self.bit += 1
        return value

    def number(self, model):
        s = self.symbol(model)
        return s if s < 8 else 1 << (s - 5) | self.raw(s - 5)

    def byte(self, model):
        return self.symbol(model) << 3 | self.raw(3)


def record(data, tokens, codec, id_of_rank):
    """For each token None, or (entropy code, label code, residual code, [(id, code)])."""
    bits, found = Bits(data), []
    draws = codec.get("draws")
    for _ in range(tokens):
        n = bits.number(0) - 1
        if n < 0:
            found.append(None)
            continue
        entropy = bits.byte(1 + min(n, 15))
        label = bits.byte(17 + (entropy >> 3))
        rest = bits.byte(110) if codec["name"] == "topk" else None
        rank, atoms, implied = -1, [], None
        for i in range(n):
            rank += 1 + bits.number(49 + (rank + 1).bit_length())
            ahead = draws and implied is None
            code = bits.number(101 + min(n - i, 8) if ahead else 75 + (rank + 1).bit_length())
            if ahead and code == 0:
                implied = i
            atoms.append([id_of_rank[rank], code])
        if draws and atoms:
            atoms[implied][1] = draws - sum(code for _, code in atoms)
        found.append((entropy, label, rest, [tuple(atom) for atom in atoms]))
    return found


def probability(code, codec):
    """As the page says, in the floating point of Python; of topk before scaling."""
    if "draws" in codec:
        return float(Fraction(code, codec["draws"]))
    if codec["name"] == "threshold":
        low = codec["tau"] * (1 - 2**-16)
        return codec["tau"] if code == 0 else low ** (1 - (code - 1) / 255)
    return 10 ** (-6 * (1 - code / 255))


def sealed(data):
    """The object of sealed JSON, checked."""
    digest = json.loads(data)["digest"]
    front = data[: data.rindex(b'"digest"')]
    assert digest == xxhash.xxh3_64_hexdigest(front) and data.endswith(b'"}\n')
    return json.loads(data)


TOOLS = ("compact", "index", "merge", "repair", "tools")
INDEX = {
    "sample_ids": "<i8", "digests": "<u8", "checks": "<u8", "ends": "<u4", "steps": "<u4", "atoms": "<u4",
    "origins": "<u2",
}  # fmt: skip
ENTRY = struct.Struct("<qQQIIIII")
FENCE = struct.Struct("<qQ")
ROW = struct.Struct("<IIIHBBIIIIQQddQQI")


class ShardFile:
    """One verified shard: its header, columns, and where `records` lie in the file."""

    def __init__(self, path, identity):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        outer = json.loads(data[8 : 8 + size])
        self.header = sealed(outer["__metadata__"]["shard"].encode())
        assert (self.header["format"], self.header["cache"]) == (3, identity)
        assert (self.header["writer"], self.header["seq"]) == (path.parts[-3], int(path.stem))
        assert path.parts[-2] == f"{self.header['seq'] // 1000:06d}" and size % 8 == 0
        assert list(outer) == ["__metadata__", *INDEX, "records"]
        with safe_open(path, "np") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        index = b"".join(columns[name].astype(kind).tobytes() for name, kind in INDEX.items())
        assert xxhash.xxh3_64_hexdigest(index) == self.header["index"]
        self.records_at = 8 + size + len(index)
        assert data[8 + size : self.records_at] == index and data[self.records_at :] == columns["records"].tobytes()
        self.columns = {name: column.tolist() for name, column in columns.items() if name != "records"}
        ends = [0, *self.columns["ends"]]
        self.starts, self.data = ends[:-1], [columns["records"][a:b].tobytes() for a, b in pairwise(ends)]
        for i, sample in enumerate(self.columns["sample_ids"]):
            tail = struct.pack("<qQ", sample, self.columns["digests"][i])
            assert xxhash.xxh3_64_intdigest(self.data[i] + tail) == self.columns["checks"][i]


def header_of(folder):
    """The header of a cache, and its identity."""
    data = (folder / "cache.json").read_bytes()
    return sealed(data), xxhash.xxh3_64_hexdigest(data)


def shards(folder):
    """The shards that count, by writer and number."""
    found = [ShardFile(path, header_of(folder)[1]) for path in sorted(folder.glob("shards/*/*/*.safetensors"))]
    gone = {
        (each["writer"], seq)
        for shard in found
        for each in shard.header["replaces"]
        for seq in range(each["first"], each["last"] + 1)
    }
    by_place = {(shard.header["writer"], shard.header["seq"]): shard for shard in found}
    for writer, seq in by_place:
        assert all((writer, before) in by_place or (writer, before) in gone for before in range(seq))
    return {place: shard for place, shard in by_place.items() if place not in gone}


def newest(folder, of=None):
    """Of each sample in these shards, default all that count, step, check and place of the record that counts."""
    found = {}
    for place, shard in (shards(folder) if of is None else of).items():
        for i, sample in enumerate(shard.columns["sample_ids"]):
            key = (shard.columns["steps"][i], shard.columns["checks"][i], place[0] in TOOLS, *place, i)
            found[sample] = max(found.get(sample, key), key)
    return found


def cache(folder):
    """All newest records of a local cache: sample id -> (step, token digest, tokens)."""
    header, _ = header_of(folder)
    id_of_rank = range(header["vocab_size"])
    if header["ranks"]:
        path = folder / f"ranks-{header['ranks']}.safetensors"
        assert xxhash.xxh3_64_hexdigest(path.read_bytes()) == header["ranks"]
        with safe_open(path, "np") as file:
            id_of_rank = file.get_tensor("ids_by_rank").tolist()
    there, found = shards(folder), {}
    for sample, (step, _, _, writer, seq, i) in newest(folder, there).items():
        shard = there[writer, seq]
        tokens = record(shard.data[i], header["sample_tokens"], header["codec"], id_of_rank)
        assert sum(len(token[3]) for token in tokens if token) == shard.columns["atoms"][i]
        found[sample] = (step, shard.columns["digests"][i], tokens)
    return found


def listing(folder, ref, identity):
    """A listing's entries as (sample, digest, check, start, size, step, atoms, origin row), its rows and its footer."""
    data = (folder / ref["name"]).read_bytes()
    assert len(data) == ref["bytes"] and xxhash.xxh3_64_hexdigest(data[ref["footer_at"] :]) == ref["digest"]
    footer = sealed(data[ref["footer_at"] :])
    assert (footer["cache"], footer["entries"]) == (identity, ref["entries"])
    entries_end = ENTRY.size * footer["entries"]
    fences_end = entries_end + FENCE.size * -(-footer["entries"] // 256)
    assert fences_end + ROW.size * footer["origins"] == ref["footer_at"]

    def blocks(start, end, size):
        return [data[at : min(at + size, end)] for at in range(start, end, size)]

    of_entries, of_fences = blocks(0, entries_end, 256 * ENTRY.size), blocks(entries_end, fences_end, 1024 * FENCE.size)
    of_rows = blocks(fences_end, ref["footer_at"], 256 * ROW.size)
    fences = list(FENCE.iter_unpack(b"".join(of_fences)))
    assert fences == [(ENTRY.unpack_from(b)[0], xxhash.xxh3_64_intdigest(b)) for b in of_entries]
    assert footer["fences"] == [[FENCE.unpack_from(b)[0], xxhash.xxh3_64_hexdigest(b)] for b in of_fences]
    assert footer["origin_blocks"] == [xxhash.xxh3_64_hexdigest(b) for b in of_rows]
    return list(ENTRY.iter_unpack(b"".join(of_entries))), list(ROW.iter_unpack(b"".join(of_rows))), footer


def catalog(folder):
    """By the newest snapshot and the shards after it: sample id -> step, check and place, as `newest`."""
    _, identity = header_of(folder)
    there = {
        (s.header["writer"], s.header["seq"]): s
        for s in map(lambda p: ShardFile(p, identity), folder.glob("shards/*/*/*.s*"))
    }
    path = max(folder.glob("catalog/*.json"), key=lambda path: int(path.stem))
    snapshot = sealed(path.read_bytes())
    assert (snapshot["format"], snapshot["cache"], snapshot["number"]) == (3, identity, int(path.stem))
    counts = {writer: state["count"] for writer, state in snapshot["streams"].items()}
    tail = {
        place: shard
        for place, shard in there.items()
        if place[0] not in TOOLS and place[1] >= counts.get(place[0], 0)
    }  # fmt: skip
    found = newest(folder, tail)
    for ref in snapshot["listings"]:
        entries, rows, footer = listing(folder, ref, identity)
        assert [entry[0] for entry in entries] == sorted({entry[0] for entry in entries})
        for sample, digest, check, start, size, step, atoms, origin in entries:
            writer, seq, records_at, number, source, seen_before, teacher = rows[origin][:7]
            place = (footer["writers"][writer], seq)
            shard = there[place]
            i = shard.starts.index(start) if size else shard.columns["sample_ids"].index(sample)
            of = shard.header["origins"][number]
            assert (of["teacher"], bool(seen_before)) == (footer["teachers"][teacher], of["seen_before"])
            assert of["source"] == ("capture", "backfill", "import")[source] and records_at == shard.records_at
            columns = {name: column[i] for name, column in shard.columns.items()}
            assert (sample, digest, check) == (columns["sample_ids"], columns["digests"], columns["checks"])
            assert (start + size, step, atoms, number) == tuple(
                columns[n] for n in ("ends", "steps", "atoms", "origins")
            )
            key = (step, check, place[0] in TOOLS, *place, i)
            found[sample] = max(found.get(sample, key), key)
    return found


def loss_sums(tokens):
    """Rows of `losses` of (teacher, source, step, label loss) of tokens."""
    sums = {}
    for teacher, source, step, loss in tokens:
        s = max(step.bit_length() - 6, 0)
        count, total = sums.get((teacher, source, 32 * s + (step >> s)), (0, 0))
        sums[teacher, source, 32 * s + (step >> s)] = (count + 1, total + round(min(max(loss, 0.0), 32.0) * 2**20))
    return [[*key, *value] for key, value in sorted(sums.items())]
