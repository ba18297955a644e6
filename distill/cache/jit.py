"""Compiles the cache's inner loops by numba, without the GIL; keeps the machine code on disk where it can.

Places are numba's: NUMBA_CACHE_DIR, beside the module, the user's cache folder. Numba raises an error where none of
them can be written, where the disk is full and where a kept file is damaged; here the function is then compiled anew.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, UserWideCacheLocator
from numba.core.dispatcher import Dispatcher


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of arrays: compiled at its first call, or taken from disk."""
    dispatcher = njit(nogil=True)(function)
    if isinstance(dispatcher, Dispatcher):  # not so under NUMBA_DISABLE_JIT
        with contextlib.suppress(RuntimeError):  # none of the places can be written
            dispatcher._cache = _Kept(function)  # type: ignore[attr-defined]
    return dispatcher


class _UserWide(UserWideCacheLocator):  # type: ignore[misc]
    def ensure_cache_path(self) -> None:
        if not os.path.isabs(self.get_cache_path()):  # a user without a home: it would be a folder named "~" right here
            raise FileNotFoundError(self.get_cache_path())
        super().ensure_cache_path()


class _Places(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [  # noqa: RUF012
        _UserWide if place is UserWideCacheLocator else place for place in CompileResultCacheImpl._locator_classes
    ]


class _Kept(FunctionCache):  # type: ignore[misc]
    _impl_class = _Places

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # bytes that are no pickle can raise anything
            with contextlib.suppress(OSError):
                self.flush()  # or the damaged index would stay for ever
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)
