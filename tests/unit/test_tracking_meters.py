import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.tracking.meters import Meters


class HostReads(TorchDispatchMode):
    """Refuses whatever would wait for a device: `item`, comparisons of values, `nonzero`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_weighted_means_equal_numpy():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(20, 7)), rng.integers(1, 9, size=(20, 7)).astype(float)
    meters = Meters("cpu")
    for value, weight in zip(values, weights, strict=True):
        meters.add("loss", torch.tensor((value * weight).sum()), torch.tensor(weight.sum()))
    means, histograms = meters.flush()
    assert means["loss"] == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert histograms == {}


def test_many_small_float32_sums_keep_their_precision():
    meters = Meters("cpu")
    for _ in range(10_000):
        meters.add("x", torch.tensor(0.1), torch.tensor(1.0))
    assert meters.flush()[0]["x"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_counts_and_bools_are_summed():
    meters = Meters("cpu")
    for _ in range(3):
        meters.add("agreement", torch.tensor([True, False, True]).sum(), torch.tensor(3))
        meters.histogram("alpha", torch.tensor([1, 0, 2]))
    assert meters.flush() == ({"agreement": pytest.approx(2 / 3)}, {"alpha": [3.0, 0.0, 6.0]})


def test_weight_zero_is_left_out():
    meters = Meters("cpu")
    meters.add("soft_loss", torch.tensor(0.0), torch.tensor(0))
    meters.add("loss", 6.0, 2)
    assert meters.flush()[0] == {"loss": 3.0}


def test_flush_starts_again():
    meters = Meters("cpu")
    meters.add("loss", torch.tensor(4.0), torch.tensor(2.0))
    meters.flush()
    assert meters.flush() == ({}, {})
    meters.add("loss", torch.tensor(9.0), torch.tensor(3.0))
    assert meters.flush()[0] == {"loss": 3.0}


def test_nothing_is_read_before_flush_and_flush_reads_once(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    meters = Meters("cpu")
    with HostReads():
        for name in ("a", "b"):
            meters.add(name, torch.tensor(1.0, requires_grad=True), torch.tensor(2))
        meters.histogram("alpha", torch.ones(20))
        meters.flush()
    assert reads == [(2 + 2 + 20,)]


def test_two_ranks_reduce_once_as_one_tensor():
    ranks = [Meters("cpu"), Meters("cpu")]
    # The order in which a rank meets names must not matter.
    ranks[0].add("loss", 10.0, 4)
    ranks[0].add("soft", 0.0, 0)
    ranks[1].add("soft", 3.0, 2)
    ranks[1].add("loss", 2.0, 2)
    for rank, meters in enumerate(ranks):
        meters.histogram("alpha", torch.tensor([1.0, float(rank)]))
    flats = []
    for meters in ranks:
        meters.flush(lambda flat: flats.append(flat.clone()))
    assert len(flats) == 2 and flats[0].dtype == torch.float64

    again = Meters("cpu")
    again.add("soft", 0.0, 0)
    again.add("loss", 10.0, 4)
    again.histogram("alpha", torch.tensor([1.0, 0.0]))
    means, histograms = again.flush(lambda flat: flat.add_(flats[1]))
    assert means == {"loss": 2.0, "soft": 1.5}
    assert histograms == {"alpha": [2.0, 1.0]}


def test_a_histogram_cannot_change_its_bins():
    meters = Meters("cpu")
    meters.histogram("alpha", torch.ones(20))
    with pytest.raises(AssertionError, match="alpha"):
        meters.histogram("alpha", torch.ones(10))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adding_on_a_gpu_never_waits():
    meters = Meters("cuda")
    value, counts = torch.tensor(3.0, device="cuda"), torch.ones(20, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meters.add("loss", value, 2)
            meters.add("lr", torch.tensor(0.5), torch.tensor(1.0))
            meters.histogram("alpha", counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meters.flush() == ({"loss": 1.5, "lr": 0.5}, {"alpha": [3.0] * 20})
