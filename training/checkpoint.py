"""Checkpoints that survive a crash and detect damage: ckpt.pt (newest), ckpt_prev.pt, ckpt_best.pt, ckpt_STEP.pt.

    save_checkpoint(out_dir, {"model": ..., "optimizer": ..., "step": 1000, ...})
    CheckpointWriter(out_dir).save(...)                     # the same, while training goes on
    checkpoint, path = load_checkpoint(out_dir)

A file is torch.save's, which torch.load reads, followed by its SHA-256. Loading runs no code from the file.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import threading
from pathlib import Path

import torch

from training.errors import UserError
from training.foreign import checked_checkpoint, load_tensors
from training.terminal import warn

NEWEST, PREVIOUS, BEST = "ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt"
_MARK = b"sha256: "
_TRAILER = len(_MARK) + hashlib.sha256().digest_size


class _HashingFile:
    """A binary file for appending that keeps the SHA-256 of its content."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises a RuntimeError instead of it
            raise

    def flush(self):
        self.file.flush()


def save_checkpoint(out_dir, checkpoint, keep=0):
    """Write `checkpoint` as ckpt.pt. The one before becomes ckpt_prev.pt; the last `keep` stay as ckpt_STEP.pt too.

    One whose "is_best" is true becomes ckpt_best.pt too.

    At every moment one of the two names has a complete checkpoint: a file gets its name when all of it is on disk.
    """
    out_dir = Path(out_dir)
    newest, temporary = out_dir / NEWEST, out_dir / f"{NEWEST}.tmp"
    with contextlib.suppress(OSError):
        temporary.unlink()  # of a run that was killed; opening a FIFO would block
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(checkpoint, hashing)
        except RuntimeError as error:
            raise hashing.error or error from None
        file.write(_MARK + hashing.digest.digest())
        file.flush()
        os.fsync(file.fileno())
    if newest.exists():
        _link(newest, out_dir / PREVIOUS)
    if keep:
        _link(temporary, out_dir / f"ckpt_{checkpoint['step']}.pt")
    if checkpoint.get("is_best"):
        _link(temporary, out_dir / BEST)
    os.replace(temporary, newest)
    with contextlib.suppress(OSError):  # the checkpoint is complete; not every file system can sync a folder
        for old in kept_checkpoints(out_dir)[:-keep] if keep else ():
            old.unlink()
        folder = os.open(out_dir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class CheckpointWriter:
    """Write checkpoints in a thread, one at a time. A write that fails warns, leaves the last good checkpoint and is
    tried again until it succeeds, a newer checkpoint arrives, or the run ends. No error ends the thread.

    Training waits for the copy to host memory, never for the disk. While a checkpoint is being written, only the newest
    of those that arrive, and the best, are kept for the next writes; the others are skipped with a warning.

    step: of the newest checkpoint on disk, None before the first. error: of the last write, None if it succeeded.
    """

    RETRY, LAST_RETRY, LAST_TRIES = 30, 0.5, 3  # seconds between tries; at the end of the run; tries then

    def __init__(self, out_dir, keep=0, step=None):
        self.out_dir, self.keep, self.step, self.error = out_dir, keep, step, None
        self._lock, self._next, self._thread = threading.Condition(), None, None
        self._best = None  # one that waits for its write although a newer one does too
        self._tries = None  # that are left; None: no limit
        self._warned = None  # the step whose failure was printed

    def save(self, checkpoint):
        """Copy `checkpoint` to host memory and leave it to the thread."""
        with self._lock:
            skipped, self._next = self._next, None  # freed before its successor takes as much memory
            if skipped and skipped.get("is_best") and not checkpoint.get("is_best"):
                skipped, self._best = self._best, skipped
        if skipped and skipped["step"] != self._warned:
            warn(
                f"the checkpoint of step {skipped['step']} is skipped, because the one before it is still "
                "being written; use a larger --eval_interval."
            )
        del skipped
        copy = copy_to_host(checkpoint)
        with self._lock:
            self._next = copy
            self._lock.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint")
                self._thread.start()

    def mark_best(self, path):
        """Make the checkpoint at `path`, which the run resumed, the best one."""
        try:
            _link(path, Path(self.out_dir) / BEST)
        except OSError as error:
            warn(f"{BEST} cannot be written ({error}).")

    def _work(self):
        while True:
            with self._lock:
                checkpoint, self._best = self._best, None  # the older one
                if checkpoint is None:
                    checkpoint, self._next = self._next, None
                if checkpoint is None:
                    self._thread = None
                    return
            self._write(checkpoint)
            with self._lock:
                slot = "_next" if self._next is None else "_best" if checkpoint.get("is_best") else None
                again = slot and getattr(self, slot) is None
                if self.error and again and self._tries != 0 and threading.main_thread().is_alive():
                    setattr(self, slot, checkpoint)
                    del checkpoint  # its successor takes as much memory
                    self._lock.wait(self.LAST_RETRY if self._tries else self.RETRY)
                    if self._tries:
                        self._tries -= 1

    def _write(self, checkpoint):
        try:
            save_checkpoint(self.out_dir, checkpoint, self.keep)
            self.step, self.error = checkpoint["step"], None
        except Exception as error:  # a full disk, mostly
            with contextlib.suppress(OSError):
                (Path(self.out_dir) / f"{NEWEST}.tmp").unlink()
            self.error = error
            if self._warned != checkpoint["step"]:
                self._warned = checkpoint["step"]
                warn(
                    f"the checkpoint of step {checkpoint['step']} could not be written ({error}); the newest good one "
                    f"is of step {self.step}, training goes on and the write is tried again."
                )

    def wait(self):
        """Wait until nothing is being written. A write that fails is given up after LAST_TRIES more tries."""
        with self._lock:
            self._tries = self.LAST_TRIES
            self._lock.notify_all()
        while thread := self._thread:
            thread.join()
        self._tries = None

    def newest(self):
        """Wait until nothing is being written; return the step of the newest checkpoint on disk, or None."""
        self.wait()
        return self.step


def copy_to_host(thing, seen=None, keep=True):
    """Copy nested dicts and lists, with every tensor in host memory. Tensors that share memory share it in the copy.

    Sharded tensors are gathered one by one, so every rank has to call this, with keep=False if it needs no copy.
    """
    seen = {} if seen is None else seen
    if hasattr(thing, "full_tensor"):  # a DTensor
        if id(thing) not in seen:
            full = thing.detach().full_tensor()
            seen[id(thing)] = full.to("cpu", copy=True) if keep else None
        return seen[id(thing)]
    if isinstance(thing, torch.Tensor):
        if not keep:
            return None
        key = (thing.device, thing.data_ptr(), thing.dtype, thing.shape, thing.stride())
        if key not in seen:
            seen[key] = thing.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(thing, dict):
        return {key: copy_to_host(value, seen, keep) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(copy_to_host(value, seen, keep) for value in thing)
    return thing


def _link(source, name):
    """Give `source` a second name, atomically. On a file system without links the name gets a copy."""
    temporary = name.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, name)


def kept_checkpoints(out_dir):
    """The ckpt_STEP.pt of a run, in the order in which they were written."""
    found = [path for path in Path(out_dir).glob("ckpt_*.pt") if path.stem[5:].isdecimal()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, int(path.stem[5:])))


def all_checkpoints(out_dir):
    """The paths of all checkpoints of a run, the newest first."""
    named = [Path(out_dir) / name for name in (NEWEST, PREVIOUS, BEST)]
    return [path for path in named if os.path.lexists(path)] + kept_checkpoints(out_dir)[::-1]


def load_checkpoint(out_dir, map_location="cpu", which="newest"):
    """(checkpoint, its path). The newest is ckpt.pt or, if that is missing or damaged, ckpt_prev.pt with a warning.

    which: "newest", "best", the number of a step, or the path of a file.
    Raises UserError if there is none, or if it (of the newest: both) is damaged.
    """
    if which != "newest":
        path = _find(out_dir, which)
        return read_checkpoint(path, map_location), path
    problems = []
    for name in (NEWEST, PREVIOUS):
        path = Path(out_dir) / name
        if not os.path.lexists(path):
            continue
        try:
            checkpoint = read_checkpoint(path, map_location)
        except UserError as error:
            problems.append(str(error))
            warn(error)
            continue
        return checkpoint, path
    if problems:
        raise UserError(f"{out_dir}: no checkpoint can be read. {' '.join(problems)}")
    if found := [path for path in all_checkpoints(out_dir) if path.name not in (NEWEST, PREVIOUS)]:
        raise UserError(f"{out_dir} holds no {NEWEST}; go on from another of its checkpoints: --checkpoint={found[0]}.")
    raise UserError(f"{out_dir} holds no checkpoint; start a run with --init_from=scratch, or name another --out_dir.")


def _find(out_dir, which):
    """The path of the checkpoint `which`. UserError where it is missing."""
    found, path = all_checkpoints(out_dir), Path(which)
    if which == "best":
        path = Path(out_dir) / BEST
    elif which.isdecimal():
        path = next((path for path in found if str(_step_of(path)) == which), None)
    if path is None or not os.path.lexists(path):
        steps = ", ".join(f"{path.name} of step {_step_of(path)}" for path in found) or "none"
        raise UserError(f"checkpoint = {which!r} is not among those of {out_dir} ({steps}); name one of them.")
    return path


def _step_of(path):
    """The step of a checkpoint; None if it cannot be read. It is not checked for damage."""
    try:
        if not path.is_file():  # a FIFO would block
            return None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:
        return None


def make_newest(path, out_dir):
    """Make the checkpoint at `path` the newest one of `out_dir`. Those of later steps get the name ckpt_STEP.pt."""
    step, out_dir = _step_of(path), Path(out_dir)
    try:
        temporary = out_dir / f"{NEWEST}.link"
        _link(path, temporary)
        for other in (out_dir / name for name in (NEWEST, PREVIOUS, BEST)):
            if (later := _step_of(other)) is not None and later > step:
                os.replace(other, out_dir / f"ckpt_{later}.pt")
        os.replace(temporary, out_dir / NEWEST)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written ({error.strerror}); name another --out_dir.") from None


def read_checkpoint(path, map_location="cpu"):
    """The checkpoint in one file. Raises UserError if it cannot be read or a bit has changed since it was written."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would block
            raise UserError(f"{path} cannot be read (it is not a file).")
        digest, left = hashlib.sha256(), status.st_size - _TRAILER
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 24))):
                digest.update(block)
                left -= len(block)
            if left or file.read() != _MARK + digest.digest():
                raise UserError(f"{path} is damaged: it is not what was written (its SHA-256 differs).")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    return checked_checkpoint(load_tensors(path, map_location), path)


def checkpoint_sha256(path):
    """The SHA-256 that a checkpoint which was read ends with."""
    with open(path, "rb") as file:
        file.seek(-hashlib.sha256().digest_size, os.SEEK_END)
        return file.read().hex()


def set_aside_unreadable(out_dir):
    """Rename a ckpt.pt that cannot be read. It must not become ckpt_prev.pt, and a folder could not be replaced."""
    path = Path(out_dir) / NEWEST
    if not os.path.lexists(path):
        return
    try:
        os.replace(path, path.with_name(f"{NEWEST}.unreadable"))
    except OSError as error:
        raise UserError(f"{path} cannot be read or renamed ({error.strerror}); move it elsewhere.") from None
