"""One process owns a folder that a run writes into; a second one is refused, by the owner's name, and changes nothing.

A file in the folder names its owner, who holds an flock on it. The kernel drops the lock when the process ends, however
it ends; a clean end removes the file, too. It is flock and not a POSIX lock, since those are lost as soon as anything
in the process closes the file; a child that is forked without an exec gives up its share.

Where the file system has no locks, the owner is the process that the file names, by its number and start time on the
same host. Where locks do not reach other hosts, a file that another host left is for the user to remove.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from distill.config.errors import ConfigError

NAME = ".owner"

_TOKEN = secrets.token_hex(3)
# Two runs that start in one second, here or on another host, have folders of their own.
OmegaConf.register_new_resolver("token", lambda: _TOKEN, use_cache=True, replace=True)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_LOCAL = ["ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay"]
_SHARED = ["ceph", "gpfs", "ocfs2", "gfs2"]
"""File systems of one kernel, and those whose flock is the same for all hosts."""


@dataclass(frozen=True)
class _Owner:
    """A process, as the file names it."""

    host: str
    pid: int
    job: str
    since: str
    boot: str
    """Names the running kernel: containers of one host share it, and its locks."""
    pids: str
    """Names the set of processes that `pid` is a number of."""
    started: str | None
    """When the process was started, by its kernel's clock."""


_held: dict[Path, int] = {}
"""The locked descriptor of each file that names this process as an owner."""
_made: list[Path] = []
"""Folders that were not there before, the deepest first."""


def own(folder: Path, key: str, job: str, *, will_appear: bool = False) -> None:
    """Makes the folder if need be and owns it, with all below it, until `release_all` or the end of the process.

    Args:
        will_appear: the folder itself comes later, by a rename: the owner's file lies beside it, and only the folder's
            own name counts.

    Raises:
        ConfigError: another process owns it, or a folder above or (down to two levels) below it; or no permission.
    """
    folder = Path(os.path.realpath(folder))
    lock = folder.with_name(f".{folder.name}{NAME}") if will_appear else folder / NAME
    if lock in _held:
        return

    def look_around() -> None:
        above = [] if will_appear else [parent / NAME for parent in folder.parents]
        below = [] if will_appear else [*folder.glob(f"*/{NAME}"), *folder.glob(f"*/*/{NAME}")]
        for other in (*above, *below):
            if other not in _held and other.exists() and (owner := _owner(other)) is not None:
                where = "above" if other in above else "below"
                raise ConfigError(f"{key} is {folder}; {other.parent} {where} it {owner}")

    try:
        look_around()
        _made[:0] = [p for p in (lock.parent, *lock.parent.parents) if not p.exists()]
        lock.parent.mkdir(parents=True, exist_ok=True)
        _held[lock] = _take(lock, key, folder, job)
        look_around()  # again: of two that start at once, above and below, each may have missed the other
    except (ConfigError, OSError) as error:
        release_all()
        if isinstance(error, OSError):
            raise ConfigError(f"{key} is {folder}; cannot write there: {error.strerror}") from error
        raise


def release_all() -> None:
    """Gives up what this process owns, and removes folders that it made and left empty."""
    while _held:
        lock, fd = _held.popitem()
        with contextlib.suppress(OSError):
            if _is_still(fd, lock):
                lock.unlink()  # before the close: another process that has opened it meanwhile finds the name gone
        os.close(fd)
    while _made:
        with contextlib.suppress(OSError):
            _made.pop(0).rmdir()


class OwnRunFolder(Callback):  # type: ignore[misc]
    """Hydra's hook before it makes a run's folder: owns the folder first, or has Hydra make none."""

    refusal: ClassVar[ConfigError | None] = None
    """Why the folder that Hydra was to make for this run is not this process's."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if int(os.environ.get("RANK", "0")) > 0:
            return
        HydraConfig.instance().set_config(config)
        try:
            own(Path(config.hydra.run.dir), "hydra.run.dir", f"job={config.job}")
        except ConfigError as error:
            OwnRunFolder.refusal = error
            with read_write(config.hydra):
                config.hydra.run.dir = "."


def _take(lock: Path, key: str, folder: Path, job: str) -> int:
    """An open file that is this process's; ConfigError: it is another's."""
    while True:
        new = not lock.exists()
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0), 0o666)
        except FileExistsError:
            continue
        except PermissionError:  # another user's, and not for us to write
            if (owner := _owner(lock)) is not None:
                raise ConfigError(f"{key} is {folder}; it {owner}") from None
            raise
        try:
            locked = _lock(fd, fcntl.LOCK_EX)
            if (not new or locked is False) and (owner := _judge(fd, lock, locked)) is not None:
                raise ConfigError(f"{key} is {folder}; it {owner}")
            if locked is None and not new:  # left by a dead process: of several that see it, one makes it anew
                lock.unlink(missing_ok=True)
            if not _is_still(fd, lock):  # so it is, too, where an owner has just ended
                os.close(fd)
                continue
            with contextlib.suppress(OSError):  # a full disk must not keep the lock from being held
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(asdict(_me(job))).encode(), 0)
            return fd
        except BaseException:
            os.close(fd)
            raise


def _owner(lock: Path) -> str | None:
    """A sentence about a live owner, or one that may live; None: there is none. Changes nothing."""
    try:
        fd = os.open(lock, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _judge(fd, lock, _lock(fd, fcntl.LOCK_SH))
    finally:
        os.close(fd)


def _judge(fd: int, lock: Path, locked: bool | None) -> str | None:
    """The same of an open file; locked: what `_lock` returned."""
    owner = _read(fd)
    name = f"host {owner.host}, pid {owner.pid}, {owner.job}, since {owner.since}" if owner else "it has just started"
    live = f"belongs to a process that is still running ({name}): wait for its end, stop it, or choose another folder"
    unsure = (
        f"belongs to a process that may still be running ({name}), which cannot be seen from here: if it is not, "
        f"remove {lock} and start again"
    )
    if locked is False:
        return live
    same_kernel = owner is not None and owner.boot == _boot()
    if locked:
        return None if owner is None or same_kernel or _reaches_all_hosts(lock) else unsure
    if owner is None or not same_kernel or owner.pids != _pids():
        return unsure
    return live if _started(owner.pid) == owner.started else None


def _lock(fd: int, kind: int) -> bool | None:
    """False: another process has it; None: the file system has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(fd: int) -> _Owner | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return _Owner(**json.loads(os.pread(fd, 4096, 0)))
    return None


def _me(job: str) -> _Owner:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return _Owner(socket.gethostname(), pid, job, since, _boot(), _pids(), _started(pid))


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _pids() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """When a process was started, so that a later one of its number is not taken for it; None: there is none."""
    if not psutil.pid_exists(pid):
        return None
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _is_still(fd: int, path: Path) -> bool:
    """An open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _reaches_all_hosts(path: Path) -> bool:
    """No process on another host can hold an flock on this file that this kernel does not see."""
    mounts = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    if not mounts:
        return False
    mount = max(reversed(mounts), key=lambda each: len(each.mountpoint))  # of several in one place the last counts
    options = mount.opts.split(",")
    if mount.fstype.startswith("nfs"):
        return not {"local_lock=all", "local_lock=flock", "nolock"} & {*options}
    if mount.fstype == "lustre":
        return "flock" in options
    return mount.fstype in (*_LOCAL, *_SHARED)


def _forget() -> None:
    """A forked child owns nothing; closing its copies leaves the parent's lock."""
    for fd in _held.values():
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()
    _made.clear()


os.register_at_fork(after_in_child=_forget)
