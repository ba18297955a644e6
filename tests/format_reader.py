"""A slow reader of caches, written from docs/cache.md alone, in plain integers."""

import json
from fractions import Fraction

import numpy as np
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
    """As docs/cache.md defines them, in the floating point of Python; of topk before scaling."""
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


def cache(folder):
    """All newest records of a local cache: sample id -> (step, token digest, tokens)."""
    header = sealed((folder / "cache.json").read_bytes())
    with safe_open(folder / f"ranks-{header['ranks']}.safetensors", "np") as file:
        id_of_rank = file.get_tensor("ids_by_rank").tolist()
    found, retired = {}, set()
    ledgers = {ledger: ledger.read_bytes().splitlines(keepends=True) for ledger in (folder / "ledger").glob("*.jsonl")}
    for line in (line for lines in ledgers.values() for line in lines):
        for gone in sealed(line).get("retired", []):
            retired |= {(gone["ledger"], seq) for seq in range(gone["first"], gone["last"] + 1)}
    for ledger, lines in sorted(ledgers.items()):
        for seq, line in enumerate(lines):
            row = sealed(line)
            assert (row["writer"], row["seq"]) == (ledger.stem, seq)
            if row["kind"] != "shard" or (ledger.stem, seq) in retired:
                continue
            path = folder / "shards" / row["shard"]
            assert xxhash.xxh3_64_hexdigest(path.read_bytes()) == row["file_digest"]
            with safe_open(path, "np") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ends = [0, *columns["ends"].tolist()]
            for i, sample in enumerate(columns["sample_ids"].tolist()):
                data = columns["records"][ends[i] : ends[i + 1]].tobytes()
                key = (int(columns["steps"][i]), ledger.stem, seq)
                tail = np.uint64(sample).tobytes() + columns["digests"][i].tobytes()
                assert xxhash.xxh3_64_intdigest(data + tail) == columns["checks"][i]
                if sample not in found or found[sample][0] < key:
                    tokens = record(data, header["sample_tokens"], header["codec"], id_of_rank)
                    found[sample] = (key, int(columns["digests"][i]), tokens)
    return {sample: (key[0], digest, tokens) for sample, (key, digest, tokens) in found.items()}
