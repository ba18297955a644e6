"""The tools of the cache: a mistake on the way in is one line and exit code 2, and a small cache is none."""

import json
import re

import numpy as np
import pytest

from distill.cache import CacheWriter
from distill.tools.commands import COMMANDS, main
from tests.unit.test_tracking_report import values
from tests.workers.cache_writers import V, header, put


def write(folder, parts):
    """parts: (sample ids, step); one shard each."""
    with CacheWriter(folder, header(), writer="b", counts_V=np.arange(V) % 7, shard_samples=99) as writer:
        for ids, step in parts:
            put(writer, ids, step=step)
            writer.flush()
        writer.finish()
    return str(folder)


@pytest.fixture
def cache(tmp_path):
    return write(tmp_path / "cache", [([1], 0), ([2], 1)])


@pytest.mark.parametrize(
    "parts", [[([1, 2], 0)], [([1], 7)], [], [([1], 0), ([1], 1), ([1], 2)]], ids=["step 0", "one", "none", "equal"]
)
def test_a_page_of_the_smallest_caches(tmp_path, capsys, parts):
    folder = write(tmp_path / "cache", parts)
    assert main(["stats", folder, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert ("loss by its step" in page) == bool(parts)
    drawn = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    ranges = [value for chart in drawn for axis in "xy" for value in chart["layout"][f"{axis}axis"].get("range", [])]
    points = [x for chart in drawn for trace in chart["data"] for axis in "xy" for x in values(trace[axis])]
    assert bool(points) == bool(ranges) == bool(parts) and np.isfinite([*ranges, *points]).all()


WRONG = {
    "": "the following arguments are required: COMMAND; ",
    "nope": "argument COMMAND: invalid choice: 'nope' ",
    "stats": "the following arguments are required: DIR; ",
    "stats CACHE --nope": "unrecognized arguments: --nope; ",
    "stats CACHE --deep x": "argument --deep: invalid int value: 'x'; ",
    "stats CACHE --deep 0": "--deep is 0; it is at least 1",
    "stats CACHE --html TMP/no/page.html": "TMP/no/page.html: No such file or directory",
    "stats CACHE --html TMP": "TMP: Is a directory",
    "stats CACHE --html EMPTY": "html is empty; give it a value",
    "verify CACHE --jobs 0": "--jobs is 0; it is at least 1",
    "verify CACHE --jobs -3": "--jobs is -3; it is at least 1",
    "compare CACHE CACHE --tolerance nan": "--tolerance is nan; allowed is 0 to 1",
    "compare CACHE CACHE --tolerance -1": "--tolerance is -1.0; allowed is 0 to 1",
    "compare CACHE CACHE --tolerance x": "argument --tolerance: invalid float value: 'x'; ",
    "export CACHE TMP": "TMP: is a folder; name a file",
    "export CACHE EMPTY": "FILE is empty; give it a value",
    "export CACHE TMP/x.parquet --per day": "argument --per: invalid choice: 'day' ",
    "compact CACHE --shard-mb 0": "--shard-mb is 0; allowed is 1 to 4000",
    "compact CACHE --shard-mb nan": "argument --shard-mb: invalid int value: 'nan'; ",
    "compact CACHE --purge --into TMP/new": "--purge is no option of --into",
    "compact CACHE --into EMPTY": "into is empty; give it a value",
    "compact CACHE --into CACHE/.": "CACHE/. is both a source and the target",
    "merge CACHE CACHE/": "CACHE/ is both a source and the target",
    "merge CACHE EMPTY": "DIR is empty; give it a value",
    "merge EMPTY TMP/new": "sources is empty; give it a value",
    "estimate": "--tokens is missing",
    "estimate --tokens 0": "argument --tokens: '0' is not a whole number from 1 up; ",
    "estimate --tokens nan": "argument --tokens: 'nan' is not a whole number from 1 up; ",
    "estimate --tokens 9 --codec threshold --tau nan": "--tau is nan; it must be a finite number",
    "estimate --tokens 9 --codec topk --k 300": "--k is 300; allowed: 1 to 255",
    "estimate --tokens 9 --entropy nan": "--entropy is nan; it must be positive",
    "estimate --tokens 9 --entropy inf": "--entropy is inf; 202048 ids have at most 12.22 nats",
    "estimate --tokens 9 --like EMPTY": "like is empty; give it a value",
    "estimate seed=1": "'seed=1' is an override; it needs --config",
    "estimate --config nope": "experiment is nope; allowed: ",
    "import": "the following arguments are required: dir, files, --from, --corpus, --tokenizer, --vocab-size; ",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_argument_is_one_line(command, cache, tmp_path, capsys):
    words = [
        "" if word == "EMPTY" else word.replace("CACHE", cache).replace("TMP", str(tmp_path))
        for word in command.split()
    ]
    try:
        code = main(words)
    except SystemExit as left:  # argparse's way
        code = left.code
    said = capsys.readouterr().err
    want = WRONG[command].replace("CACHE", cache).replace("TMP", str(tmp_path))
    assert code == 2 and said.startswith(f"error: {want}") and said.count("\n") == 1, said


READS = ["stats", "verify", "repair --dry-run", "compact", "index", "estimate --tokens 9 --like"]
FOLDERS = ["TMP/nowhere", "TMP/file", "TMP/file/below", "TMP/empty", "TMP/other", "nope://bucket/x"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_no_cache_is_named_by_every_command(folder, cache, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "folder").mkdir(parents=True)
    folder = folder.replace("TMP", str(tmp_path))
    commands = [[*read.split(), folder] for read in READS]
    commands += [
        ["compare", cache, folder],
        ["merge", folder, f"{tmp_path}/new"],
        ["export", folder, f"{tmp_path}/out"],
    ]
    for words in commands:
        code, said = main(words), capsys.readouterr().err
        assert code == 2 and said.startswith(f"error: {folder}") and said.count("\n") == 1, (words, said)
    assert not (tmp_path / "out").exists()
    assert {words[0] for words in commands} >= COMMANDS.keys() - {"import"}
