"""Bytes per token of records, by codec, its parameter, vocabulary and the rows' entropy: the table of `estimate`.

1,024 rows of the yardstick, one sample, their exponents scaled to each entropy, are put through the real codec and
coder. Writes distill/tools/bytes_per_token.json.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

from tests.bench._codec_meter import CodecSetting, on_rows, sweep
from tests.bench._yardstick import VOCAB, scaled

COMMAND = "make bench ONLY=record_bytes"
TABLE = Path(__file__).parents[2] / "distill" / "tools" / "bytes_per_token.json"
TOKENS = 1024
VOCABULARIES = (1024, 32_768, VOCAB)
ENTROPIES = (0.1, 0.6, 1.9, 3.2, 5.0, 8.0)
"""Nats; those that a vocabulary cannot have are left out, and 90 % of its most is added."""
PARAMETERS = {
    "systematic": (5, 10, 20, 50, 200),
    "threshold": (0.004, 0.02, 0.05, 0.12, 0.3),
    "multinomial": (5, 10, 20, 50, 200),
    "topk": (1, 4, 12, 50, 200),
}
"""Values of each codec's one parameter."""


def run() -> dict[str, float]:
    results, vocabularies = {}, []
    for vocab in VOCABULARIES:
        most = 0.9 * math.log(vocab)
        entropies = [*(entropy for entropy in ENTROPIES if entropy < most), most]
        columns = [measure(vocab, entropy) for entropy in entropies]
        sizes = {codec: [[column[CodecSetting(codec, value)] for column in columns] for value in values]
                 for codec, values in PARAMETERS.items()}  # fmt: skip
        vocabularies.append({"vocab_size": vocab, "entropy": [round(each, 3) for each in entropies]} | sizes)
        for setting, (entropy, column) in itertools.product(columns[0], zip(entropies, columns, strict=True)):
            results[f"V {vocab}, {setting.codec} {setting.value}, {entropy:.1f} nats"] = column[setting]
    lines = [json.dumps(each).replace('], "', '],\n   "') for each in vocabularies]
    TABLE.write_text(
        f'{{"command": {json.dumps(COMMAND)},\n "parameters": {json.dumps(PARAMETERS)},\n "vocabularies": [\n  '
        + ",\n  ".join(lines)
        + "\n ]}\n"
    )
    return results


def measure(vocab: int, entropy: float) -> dict[CodecSetting, float]:
    """Bytes per token of every codec at rows of this mean entropy."""
    meters = on_rows(sweep(PARAMETERS), 0, TOKENS, TOKENS, scaled(vocab, entropy), vocab)
    return {setting: round(meter.bytes().records, 3) for setting, meter in meters.items()}
