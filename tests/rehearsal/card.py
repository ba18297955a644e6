"""A GPU that is not there: torch's fake tensors on a CUDA device, and what must not happen on one, as errors.

Tensors on the CPU are real and so is all work on them; what is moved to the device has shapes, dtypes and a device, but
no values. Inside of `Card.step` whatever makes the host wait for the device, or copies from memory that is not pinned,
raises `Waits` with the line of ours that did it, unless a place of `distill.engine.waits` is on the stack.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # has subclasses of torch.Event, so it comes before a stand-in
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.engine.waits import MAY_WAIT

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) + "/" for name in ("distill", "losses", "student", "teacher"))
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
NUMBERS = {aten._local_scalar_dense.default}
HOST_READS = {*NUMBERS, aten.equal.default, aten.allclose.default}
MASKS = (torch.bool, torch.uint8)
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
TAKES_HOST_SCALARS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, *COPIES, *INDEXING}
"""A number on the host is one of the arguments of the kernel; so it is of all pointwise operations."""
MOST = {
    aten.nonzero.default: lambda x: x.new_zeros((x.numel(), x.ndim), dtype=torch.int64),
    aten.masked_select.default: lambda x, mask: x.new_empty(mask.numel()),
    aten.unique_consecutive.default: lambda x, *_: (x.clone(), *(x.new_empty(x.numel(), dtype=torch.int64),) * 2),
    aten._unique2.default: lambda x, *_: (x.clone(), *(x.new_empty(x.numel(), dtype=torch.int64),) * 2),
    aten.bincount.default: lambda x, _=None, minlength=0: x.new_empty(minlength, dtype=torch.int64),
    aten.repeat_interleave.Tensor: lambda x: x.clone(),
}
"""Of operations whose results have as many elements as the values say: results in the places that may wait."""


class RehearsalError(AssertionError):
    """What would crash on a GPU, or make it wait, and where."""


def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@cache
def register_guard() -> None:
    """Lets a build of torch without CUDA take a CUDA device for fake tensors."""
    if torch.backends.cuda.is_built():
        return  # FakeTensorMode does it
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        command = ["c++", "-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch_folder}/include", str(source)]
        subprocess.run([*command, "-o", str(library), f"-L{torch_folder}/lib", "-lc10"], check=True)
        ctypes.CDLL(str(library))


KERNELS = {
    "distill.model.casts._triton": lambda: None,
    "distill.cache.codecs.search._HAS_TRITON": False,
}
"""Triton's kernels need values; the same in torch, which stands for them here, does not."""

SYNCHRONIZE = ("torch.cuda.synchronize", "torch.accelerator.synchronize")
TIMELINES = (
    *(f"torch.cuda.{name}" for name in ("Event", "Stream", "current_stream", "default_stream")),
    *("torch.Event", "torch.Stream", "torch.accelerator.current_stream"),
)


@contextmanager
def inserted() -> Iterator["Card"]:
    """A card for the code within; `DEVICE` is its device."""
    register_guard()
    card = Card()
    of_values = {
        "numpy": lambda tensor, **_: tensor.cpu().numpy(),
        "__format__": lambda tensor, spec: format(repr(tensor) if tensor.ndim else tensor.item(), spec),
        "__repr__": lambda tensor, **_: card.shown(tensor),
    }
    with ExitStack() as stack:
        for place, stand_in in KERNELS.items():
            stack.enter_context(mock.patch(place, stand_in))
        for name, stand_in in of_values.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, stand_in, create=True))
        for place in SYNCHRONIZE:
            stack.enter_context(mock.patch(place, card.synchronize))
        for place in TIMELINES:
            stack.enter_context(mock.patch(place, card.timeline))
        for part in (FakeTensorMode(allow_non_fake_inputs=True), card):
            stack.enter_context(part)
        yield card


class Card(TorchDispatchMode):
    """Looks at every operation."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[StorageWeakRef, None] = {}
        self._strict = False
        self.waited: set[str] = set()
        """Places of `MAY_WAIT` that did."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, nothing may wait."""
        self._strict = True
        try:
            yield
        finally:
            self._strict = False

    # ------------------------------------------------------------ operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # elsewhere autograd has taken it apart already
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        if not any(isinstance(t, FakeTensor) for t in tensors) and (target is None or target.type == "cpu"):
            return self._on_host(func, args, kwargs)
        if func in COPIES:
            return self._copy(func, args, kwargs)
        self._check_devices(func, args, tensors)
        try:
            return self._on_device(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError) as error:
            raise self._error(f"{func}: {error}") from error

    def _on_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in HOST_READS:
            self._wait(f"{func} reads a value on the host")
            dtype = args[0].dtype
            return True if dtype is torch.bool or func not in NUMBERS else 1.0 if dtype.is_floating_point else 1
        if func in INDEXING and (masks := [i for i in args[1] if i is not None and i.dtype in MASKS]):
            self._wait("a boolean mask as an index: its number of elements is read on the host")
            return args[0].flatten(0, masks[0].ndim - 1).clone() if func is aten.index.Tensor else args[0]
        if func in MOST and kwargs.get("output_size") is None:
            self._wait(f"{func}: the size of its result is read on the host")
            return MOST[func](*args, **kwargs)
        if func is aten._grouped_mm.default and args[0].dtype is torch.float32:
            # CUDA has it; the shapes that torch checks without a device are those of bf16.
            return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).float()
        return func(*args, **kwargs)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Work on the CPU, for real; memory that is pinned in name only."""
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        with unset_fake_temporarily():
            if func is aten._pin_memory.default:
                return self._pin(args[0].clone())
            if kwargs.get("pin_memory"):
                return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
            return func(*args, **kwargs)

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[StorageWeakRef(tensor.untyped_storage())] = None
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._pinned

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        to, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
        target = to.device if to is not None else kwargs.get("device") or source.device
        waits_not = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if source.device.type == "cpu" and target.type == "cuda":
            if not self._is_pinned(source):
                self._wait("a copy from pageable memory to the device")
            elif not source.is_contiguous():
                self._wait("a copy to the device in pieces, which goes through pageable memory")
            elif not waits_not:
                self._wait("a copy to the device that blocks")
        if source.device.type == "cuda" and target.type == "cpu":
            if not waits_not or (to is not None and not self._is_pinned(to)):
                self._wait("a copy from the device to the host")
            if to is not None:
                return to
            dtype = kwargs.get("dtype") or source.dtype
            with unset_fake_temporarily():
                return self._pin(torch.ones(source.shape, dtype=dtype))
        return func(*args, **kwargs)

    def _check_devices(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        host = [t for t in tensors if t.device.type == "cpu"]
        if func in INDEXING and any(i is t for i in args[1] for t in host):
            self._wait("an index on the host, which is copied from pageable memory")
            host = [t for t in host if all(i is not t for i in args[1])]
        scalars = torch.Tag.pointwise in func.tags or func in TAKES_HOST_SCALARS
        if any(t.ndim or not scalars for t in host):
            raise self._error(f"{func} mixes tensors on the CPU with tensors on {DEVICE}")

    # ------------------------------------------------------------ waits

    def _wait(self, what: str) -> None:
        if not self._strict:
            return
        places = {name for frame in _frames() if (name := _name(frame)) in MAY_WAIT}
        self.waited |= places
        if not places:
            raise self._error(what)

    def synchronize(self, *_: Any) -> None:
        self._wait("a synchronization with the device")

    def timeline(self, *_: Any, **__: Any) -> Any:
        """An event or a stream."""
        made = mock.Mock()
        made.synchronize = lambda: self._wait("a wait for an event or a stream of the device")
        made.query = lambda: True
        return made

    def shown(self, tensor: FakeTensor) -> str:
        self._wait("a value is printed")
        return f"{type(tensor).__name__}({tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"

    def _error(self, what: str) -> RehearsalError:
        for frame in _frames():
            if frame.f_code.co_filename.startswith(OURS):
                path = Path(frame.f_code.co_filename)
                line = path.read_text().splitlines()[frame.f_lineno - 1].strip()
                return RehearsalError(f"{path.relative_to(ROOT)}:{frame.f_lineno}: {what}\n    {line}")
        return RehearsalError(what)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _name(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    if not path.startswith(OURS):
        return ""
    return f"{Path(path).relative_to(ROOT)}:{frame.f_code.co_qualname}"
