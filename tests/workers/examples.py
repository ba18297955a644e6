"""Prints what hypothesis draws and a test finds in its generators, once the modules named are loaded: JSON.

python -m tests.workers.examples [MODULE ...]
"""

import importlib
import json
import random
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import conftest

drawn = []


@given(st.integers(), st.text(), st.floats(), st.sets(st.text(max_size=2)))
def draw(number, text, real, texts):
    drawn.append(repr([number, text, real, sorted(texts)]))
    drawn.append(repr([random.random(), np.random.rand(), torch.rand(1).item()]))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    draw()
    conftest.pytest_runtest_call()
    print(json.dumps([*drawn, random.random(), np.random.rand(), torch.rand(1).item()]))
