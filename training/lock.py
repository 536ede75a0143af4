"""A lock file, so that only one run writes to an out_dir. It names the run's host and process.

lock = RunLock("out/run")      # UserError if another run is alive there
lock.release()
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

from training.errors import UserError
from training.foreign import parse_json
from training.terminal import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # Lustre, FUSE, Windows


def lock_file(file, taken, without):
    """Lock an open file until this process, and those that inherit it, have ended or closed it.

    UserError with the text `taken` if another process holds it. A warning, `without`, where there are no file locks.
    """
    try:
        _flock(file)
    except BlockingIOError:
        raise UserError(taken) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn(f"no file locks here ({error.strerror}): {without}")


def _flock(file):
    if fcntl is None:
        raise OSError(errno.ENOLCK, "not on this system")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """The lock of `folder`, taken for this process. A dead owner's lock is taken over, a live one's is waited for.

    The system drops a file lock with the process that holds it. Where it is missing or not shared between hosts, the
    owner's heartbeat, the file's modification time, tells whether it lives. On the same host its process id does.
    owner: this process, as the file names it.
    Raises UserError, which names the other owner's host and process, if it is still there after WAIT seconds.
    """

    WAIT, HEARTBEAT = 5, 10  # seconds

    def __init__(self, folder):
        self.path = Path(folder) / LOCK
        self._file, self._seen, self._warned = None, None, False
        self.owner = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}
        self._released = threading.Event()
        deadline = time.monotonic() + self.WAIT
        while (owner := self._take()) is not None:
            if self._undecided(owner):
                deadline = max(deadline, time.monotonic() + 1)
            elif time.monotonic() > deadline:
                run = f"the run of process {owner.get('process')} on {owner.get('host')}"
                raise UserError(f"{folder} is in use by {run}; let it end, or name another --out_dir.")
            time.sleep(0.1)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self):
        """Remove the lock, if it is still this process's."""
        self._released.set()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file), os.stat(self.path)):
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.close(self._file)
            if os.name != "posix":  # Windows removes no file that is open
                os.unlink(self.path)

    def _take(self):
        """None, and the lock is this process's; or the owner, {} if unknown, who is or may be alive."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            owner = self._locked_by(file)
            if owner is None:
                self._file, file = file, None
            return owner
        except OSError as error:  # a full disk, or no file
            os.unlink(self.path)
            error.filename = str(self.path)
            raise
        finally:
            if file is not None:
                os.close(file)

    def _locked_by(self, file):
        locks = True
        try:
            _flock(file)
        except BlockingIOError:
            return _read(file) or {}
        except OSError as error:
            locks = False
            if not self._warned:
                self._warned = True
                warn(f"{self.path} cannot be locked ({error.strerror}); do not start two runs in one out_dir.")
        with contextlib.suppress(OSError):
            if not os.path.samestat(os.fstat(file), os.stat(self.path)):
                return {}  # its owner has just removed it
        owner = _read(file)
        if owner and self._alive(owner, file, locks):
            return owner
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)  # Windows has no pwrite
        os.write(file, json.dumps(self.owner).encode())
        if not locks:  # of two that start at once the one that wrote last has it
            time.sleep(1)
            owner = _read(file)
            return None if owner == self.owner else owner or {}
        return None

    def _alive(self, owner, file, locks):
        if owner.get("host") == self.owner["host"] and os.name == "posix":
            return not locks and owner["process"] != os.getpid() and _started(owner["process"]) == owner["started"]
        changed = os.fstat(file).st_mtime_ns
        if self._seen is None or self._seen[0] != (owner, changed):
            moves = self._seen is not None and self._seen[0][0] == owner
            self._seen = ((owner, changed), time.monotonic(), moves)
        (_, since, moves) = self._seen
        return moves or time.monotonic() - since < 2.5 * self.HEARTBEAT

    def _undecided(self, owner):
        """Whether a heartbeat may yet tell that the owner, on another host, is alive."""
        return self._seen is not None and self._seen[0][0] == owner and not self._seen[2]

    def _beat(self):
        while not self._released.wait(self.HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def check_shared(folder, owner, patience=20):
    """UserError if `folder` on this machine is not that in which `owner`, a RunLock's, has its lock.

    A network file system may show the file late, hence `patience`, in seconds.
    """
    deadline, found = time.monotonic() + patience, None
    while found != owner:
        if time.monotonic() > deadline:
            other = f"is not the folder of rank 0 on {owner['host']} (it does not hold the same {LOCK})"
            remedy = "out_dir must be one folder that all machines see"
            raise UserError(f"{folder} on {socket.gethostname()} {other}; {remedy}.")
        with contextlib.suppress(OSError, ValueError):
            found = parse_json((Path(folder) / LOCK).read_bytes())
        time.sleep(0.1 * (found != owner))


def _started(process):
    """When the process was started, in the kernel's clock; "" without /proc, None if there is no such process."""
    if type(process) is not int or process <= 0:  # which stand for many processes
        return None
    try:
        os.kill(process, 0) if os.name == "posix" else None
    except PermissionError:
        pass  # another user's
    except (OSError, OverflowError):
        return None
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _read(file):
    """What the owner wrote, {} if it is not readable, None if nothing."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        text = os.read(file, 4096)
        owner = parse_json(text) if text else None
        return owner if owner is None or {"host", "process", "started"} <= owner.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}
