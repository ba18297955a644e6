"""What other processes do with a reader that they were given."""

import os

import numpy as np
import torch

from tests.workers.cache_writers import SAMPLES, batch, digests

ALL = np.arange(SAMPLES)


def right(reader, expected) -> bool:
    """Whether a reader has exactly these samples, {id: step}, each with the teacher's targets of that step."""
    if reader.steps(ALL).tolist() != [expected.get(i, -1) for i in range(SAMPLES)]:
        return False
    ids = sorted(expected)
    result = reader.read(ids, digests(ids))
    decoded = [reader.codec.decode(batch([i], step=expected[i]).atoms) for i in ids]
    width = result.targets.ids_TK.shape[1]
    want = torch.cat([torch.nn.functional.pad(probs, (0, width - probs.shape[1])) for _, probs in decoded])
    sums = (result.targets.probs_TK.sum(1), want.sum(1) * result.targets.covered_T)
    return torch.equal(*sums) and len({bytes(s.data) for s in reader.records(ids)}) == len(ids)


def answer(reader, before, after, refresh, queue, folder=None) -> None:
    """Whether a reader is right before and after a refresh, in this process."""
    torch.set_num_threads(1)  # as workers of a DataLoader do: OpenMP's threads do not survive a fork
    try:
        if folder is not None:
            os.chdir(folder)
        found = [right(reader, before)]
        if refresh:
            reader.refresh()
            found.append(right(reader, after))
        queue.put(found)
    except BaseException as error:
        queue.put(repr(error))
        raise
