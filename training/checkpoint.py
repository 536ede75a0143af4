"""Checkpoints that survive a crash and detect damage: ckpt.pt (newest), ckpt_prev.pt, ckpt_best.pt, ckpt_STEP.pt.

    save_checkpoint(out_dir, {"model": ..., "optimizer": ..., "step": 1000, ...})
    CheckpointWriter(out_dir).save(...)                     # the same, while training goes on
    checkpoint, path = load_checkpoint(out_dir)

A file has the format of torch.save, followed by its SHA-256; torch.load reads it. Loading runs no code from the file.
A checkpoint that no rank holds complete is a folder (`training/shards.py`): ckpt, ckpt_prev, ckpt_best, ckpt_STEP.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import stat
import threading
import time
from pathlib import Path

import torch

from training.errors import UserError
from training.foreign import checked_checkpoint, load_tensors, read_json
from training.shards import (
    MANIFEST,
    PARTS,
    Exchange,
    HashingFile,
    Shards,
    read_folder,
    read_part,
    sync_folder,
    write_folder,
)  # fmt: skip
from training.terminal import warn

NEWEST, PREVIOUS, BEST = "ckpt", "ckpt_prev", "ckpt_best"
_MARK = b"sha256: "
_TRAILER = len(_MARK) + hashlib.sha256().digest_size


def save_checkpoint(out_dir, checkpoint, keep=0, write_parts=None):
    """Write `checkpoint` as the newest. The one before becomes ckpt_prev; the last `keep` stay as ckpt_STEP too.

    One whose "is_best" is true becomes ckpt_best too. {..., "shards": Shards} becomes a folder, into which
    `write_parts(folder, shards)` writes the parts of all ranks.

    At every moment one of the two names has a complete checkpoint: it gets its name when all of it is on disk.
    """
    out_dir = Path(out_dir)
    if "shards" in checkpoint:
        _remove_unfinished(out_dir)
        # A new name each time: for some seconds NFS may lead other machines to the folder that had this name before
        form, temporary = "", out_dir / f"{NEWEST}.{time.time_ns()}.tmp"
        temporary.mkdir()
        write_folder(temporary, checkpoint, write_parts(temporary, checkpoint["shards"]))
    else:
        form, temporary = ".pt", out_dir / f"{NEWEST}.pt.tmp"
        if temporary.is_dir() and not temporary.is_symlink():  # none of ours
            os.replace(temporary, aside := temporary.with_name(f"{temporary.name}.{time.time_ns()}"))
            warn(f"{temporary} is in the way of a checkpoint; it is {aside.name} now.")
        temporary.unlink(missing_ok=True)  # of a run that was killed; opening a FIFO would block
        with HashingFile(temporary) as file:
            file.save(checkpoint)
            file.write(_MARK + bytes.fromhex(file.sha256))
    for newest in (path for path in _present(out_dir, NEWEST)[::-1] if path.exists()):
        as_link = newest.suffix == form == ".pt"  # then both names are there at every moment
        (_link if as_link else _replace)(newest, out_dir / f"{PREVIOUS}{newest.suffix}")
    if keep:
        _link(temporary, out_dir / f"ckpt_{checkpoint['step']}{form}")
    if checkpoint.get("is_best"):
        _link(temporary, out_dir / f"{BEST}{form}")
    _replace(temporary, out_dir / f"{NEWEST}{form}")
    with contextlib.suppress(OSError):  # the checkpoint is complete; not every file system can sync a folder
        for old in kept_checkpoints(out_dir)[:-keep] if keep else ():
            remove(old)
        for path in out_dir.glob("ckpt*"):
            if path.suffix in (".tmp", ".link", ".aside", ".gone"):  # of a run that was killed
                remove(path)
        sync_folder(out_dir)


class CheckpointWriter:
    """Write checkpoints in a thread, one at a time. A write that fails warns, leaves the last good checkpoint and is
    tried again until it succeeds, a newer checkpoint arrives, or the run ends. No error ends the thread.

    Training waits for the copy to host memory, never for the disk. Of the checkpoints that arrive during a write, the
    newest and the best are kept for the next ones. The others are skipped with a warning.

    step: of the newest checkpoint on disk, None before the first. error: of the last write, None if it succeeded.
    """

    RETRY, LAST_RETRY, LAST_TRIES = 30, 0.5, 3  # seconds between tries; at the end of the run; tries then

    def __init__(self, out_dir, keep=0, step=None, world=None):
        """world: the ranks, where `save` will be told that each has a part."""
        self.out_dir, self.keep, self.step, self.error = out_dir, keep, step, None
        self._lock, self._next, self._thread = threading.Condition(), None, None
        self._best = None  # one that waits for its write although a newer one does too
        self._writing = None  # the one that is being written
        self._tries = None  # that are left; None: no limit
        self._warned = None  # the step whose failure was printed
        self._world, self._exchange, self._count, self._last = world, Exchange(world), 0, 0

    def save(self, checkpoint, sharded=False):
        """Copy `checkpoint` to host memory and leave it to the thread. sharded: every rank has a part, and calls it."""
        self._count += 1
        with self._lock:
            skipped, self._next = self._next, None  # freed before its successor takes as much memory
            if skipped and skipped.get("is_best") and not checkpoint.get("is_best"):
                skipped, self._best = self._best, skipped
            alive = self._alive()
        if skipped and skipped["step"] != self._warned:
            warn(
                f"the checkpoint of step {skipped['step']} is skipped, because the one before it is still "
                "being written; use a larger --eval_interval."
            )
        del skipped
        if sharded:
            shards = Shards(checkpoint, self._count, self._world, alive)
            checkpoint = {**shards.rest, "shards": shards}
        copy = copy_to_host(checkpoint)
        with self._lock:
            self._next, self._last = copy, self._count
            self._lock.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint")
                self._thread.start()

    def _alive(self):
        """The numbers of the sharded checkpoints that may still be written."""
        waiting = (self._writing, self._best, self._next)
        return [checkpoint["shards"].number for checkpoint in waiting if checkpoint and "shards" in checkpoint]

    def _tell(self, write, folder=""):
        """Let the other ranks write their parts of the checkpoint number `write`, and free those of no more use."""
        with self._lock:
            self._exchange.send({"write": write, "folder": folder, "alive": self._alive(), "last": self._last})

    def _write_parts(self, folder, shards):
        """Let all ranks write their parts; return what they say of them. OSError if one could not."""
        self._tell(shards.number, folder.name)
        written = [shards.try_to_write(folder), *self._exchange.answers()]
        if errors := [part["error"] for part in written if "error" in part]:
            raise OSError(errors[0] + (f"; {len(errors) - 1} other ranks failed too" if errors[1:] else ""))
        return written

    def mark_best(self, path):
        """Make the checkpoint at `path`, which the run resumed, the best one."""
        try:
            _link(path, Path(self.out_dir) / f"{BEST}{path.suffix}")
        except OSError as error:
            warn(f"{BEST} cannot be written ({error}).")

    def _work(self):
        while True:
            with self._lock:
                checkpoint, self._best = self._best, None  # the older one
                if checkpoint is None:
                    checkpoint, self._next = self._next, None
                self._writing = checkpoint
                if checkpoint is None:
                    self._thread = None
                    return
            self._write(checkpoint)
            with self._lock:
                slot = "_next" if self._next is None else "_best" if checkpoint.get("is_best") else None
                again = self.error and slot and getattr(self, slot) is None and self._tries != 0
                again = again and threading.main_thread().is_alive() and not (self._world and self._world.rank_lost())
                if again:
                    setattr(self, slot, checkpoint)
                self._writing = None
                if "shards" in checkpoint:
                    with contextlib.suppress(RuntimeError):  # the store is gone with its process
                        self._tell(None)
                del checkpoint  # its successor takes as much memory
                if again:
                    self._lock.wait(self.LAST_RETRY if self._tries else self.RETRY)
                    if self._tries:
                        self._tries -= 1

    def _write(self, checkpoint):
        try:
            save_checkpoint(self.out_dir, checkpoint, self.keep, self._write_parts)
            self.step, self.error = checkpoint["step"], None
        except Exception as error:  # a full disk, mostly
            with contextlib.suppress(OSError):
                _remove_unfinished(Path(self.out_dir))
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


def copy_to_host(thing, seen=None):
    """Copy nested dicts and lists, with every tensor in host memory. Tensors that share memory share it in the copy."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        key = (thing.device, thing.data_ptr(), thing.dtype, thing.shape, thing.stride())
        if key not in seen:
            seen[key] = thing.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(thing, dict):
        return {key: copy_to_host(value, seen) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(copy_to_host(value, seen) for value in thing)
    return thing


# ----- names: a checkpoint NAME is the file NAME.pt or the folder NAME


def _forms(out_dir, name):
    return [Path(out_dir) / f"{name}.pt", Path(out_dir) / name]


def _present(out_dir, name):
    """Those forms of a checkpoint that are there. A kill between two renames leaves both; the later step is first."""
    found = [path for path in _forms(out_dir, name) if os.path.lexists(path)]
    return sorted(found, key=lambda path: _step_of(path) or 0, reverse=True) if len(found) > 1 else found


def recover(out_dir):
    """Undo what a killed run had begun: a folder was set aside, and none has taken its place."""
    for aside in filter(Path.is_dir, Path(out_dir).glob("ckpt*.aside")):
        if not _present(out_dir, aside.stem):
            os.replace(aside, aside.with_suffix(""))


def _replace(source, name):
    """Rename `source`, in place of a checkpoint of this name in either form. A file takes a file's place atomically."""
    aside = _set_aside(name, "aside") if name.is_dir() else None
    os.replace(source, name)
    source.unlink(missing_ok=True)  # the system does nothing where both are names of one file
    if aside:
        shutil.rmtree(aside)
    other = name.with_suffix("" if name.suffix else ".pt")
    if name.suffix in ("", ".pt") and os.path.lexists(other):
        remove(other)


def _set_aside(folder, suffix):
    """Give a folder another name, with which no half-removed one is taken for a checkpoint."""
    aside = folder.with_name(f"{folder.name}.{suffix}")
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:  # rmtree would wait at a FIFO
        aside.unlink(missing_ok=True)
    os.replace(folder, aside)
    return aside


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(_set_aside(path, "gone"))
    else:
        path.unlink(missing_ok=True)


def _remove_unfinished(out_dir):
    for path in out_dir.glob(f"{NEWEST}.*.tmp"):
        remove(path)


def _link(source, name):
    """Give `source` a second name, atomically if it is a file. On a file system without links the name gets a copy."""
    temporary = name.with_suffix(".link")
    remove(temporary)
    pairs = [(source, temporary)]
    if source.is_dir():
        temporary.mkdir()
        pairs = [(path, temporary / path.name) for path in source.iterdir()]
    for path, copy in pairs:
        try:
            os.link(path, copy)
        except OSError:
            shutil.copyfile(path, copy)
    _replace(temporary, name)


def kept_checkpoints(out_dir):
    """The ckpt_STEP of a run, in the order in which they were written."""
    found = [path for path in Path(out_dir).glob("ckpt_*") if path.suffix in ("", ".pt") and path.stem[5:].isdecimal()]
    return sorted(found, key=lambda path: (path.lstat().st_mtime_ns, int(path.stem[5:])))


def all_checkpoints(out_dir):
    """The paths of all checkpoints of a run, the newest first."""
    named = [path for name in (NEWEST, PREVIOUS, BEST) for path in _present(out_dir, name)]
    return named + kept_checkpoints(out_dir)[::-1]


def load_checkpoint(out_dir, which="newest", parts=PARTS):
    """(checkpoint, its path). The newest is ckpt or, if that is missing or damaged, ckpt_prev with a warning.

    which: "newest", "best", the number of a step, or the path of a file or folder. parts: as `read_checkpoint` has it.
    Raises UserError if there is none, or if it (of the newest: both) is damaged.
    """
    if which != "newest":
        path = _find(out_dir, which)
        return read_checkpoint(path, parts), path
    problems = []
    for path in [path for name in (NEWEST, PREVIOUS) for path in _present(out_dir, name)]:
        try:
            return read_checkpoint(path, parts), path
        except UserError as error:
            problems.append(str(error))
            warn(error)
    if found := [path for path in all_checkpoints(out_dir) if path.stem not in (NEWEST, PREVIOUS)]:
        problems.append(f"It has others: --checkpoint={found[0]}, or --init_from=ckpt:{found[0]} to start new.")
    if problems:
        raise UserError(f"{out_dir}: no checkpoint can be read as the newest. {' '.join(problems)}")
    if not os.path.isdir(out_dir):
        where = f"there is no such folder on {socket.gethostname()}"
        raise UserError(f"{out_dir} holds no checkpoint, {where}; mount its file system, or name another --out_dir.")
    raise UserError(f"{out_dir} holds no checkpoint; name the folder of a run, or train one with --init_from=scratch.")


def _find(out_dir, which):
    """The path of the checkpoint `which`. UserError where it is missing."""
    found, path = all_checkpoints(out_dir), Path(which)
    if which == "best":
        path = next((path for path in found if path.stem == BEST), None)
    elif which.isdecimal():
        path = next((path for path in found if str(_step_of(path)) == which), None)
    if path is None or not os.path.lexists(path):
        steps = ", ".join(f"{path.name} of step {_step_of(path)}" for path in found) or "none"
        raise UserError(f"checkpoint = {which!r} is none of those in {out_dir} ({steps}); name one of them.")
    return path


def _step_of(path):
    """The step of a checkpoint; None if it cannot be read. It is not checked for damage."""
    try:
        return int((read_json(path / MANIFEST) if path.is_dir() else load_tensors(path, mmap=True))["step"])
    except Exception:
        return None


def make_newest(path, out_dir):
    """Make the checkpoint at `path` the newest one of `out_dir`. Those of later steps get the name ckpt_STEP."""
    step, out_dir = _step_of(path), Path(out_dir)
    try:
        temporary = out_dir / "ckpt_newest.tmp"
        _link(path, temporary)
        for other in (other for name in (PREVIOUS, BEST, NEWEST) for other in _forms(out_dir, name)):
            if (later := _step_of(other)) is not None and later > step:  # a kill must not leave none as the newest
                (_link if other.stem == NEWEST else _replace)(other, out_dir / f"ckpt_{later}{other.suffix}")
        _replace(temporary, out_dir / f"{NEWEST}{path.suffix}")
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written ({error.strerror}); name another --out_dir.") from None


def read_checkpoint(path, parts=PARTS, verify=True):
    """The checkpoint at `path`. UserError if it cannot be read or a bit has changed since it was written.

    parts: those of "model" and "optimizer" whose tensors will be used; the others do not take memory.
    verify: False where another rank has looked for changed bits.
    """
    path = Path(path)
    if path.is_dir():
        content, manifest = read_folder(path, verify)
        checkpoint = checked_checkpoint(content, path)
        checkpoint.manifest = manifest
        for part in parts:
            read_part(checkpoint, part)
        return checkpoint
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would block
            raise UserError(f"{path} cannot be read (it is not a file).")
        if (path.parent / MANIFEST).exists():
            raise UserError(f"{path} is a part of a checkpoint; name its folder, {path.parent}.")
        digest, left = hashlib.sha256(), status.st_size - _TRAILER
        with open(path, "rb") as file:
            while verify and left > 0 and (block := file.read(min(left, 1 << 24))):
                digest.update(block)
                left -= len(block)
            if verify and (left or file.read() != _MARK + digest.digest()):
                raise UserError(f"{path} is damaged: its SHA-256 is not the one stored at its end.")
    except FileNotFoundError:
        where = f"there is none on {socket.gethostname()}"
        raise UserError(f"{path} cannot be read ({where}); mount its file system, or name another one.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    return checked_checkpoint(load_tensors(path, mmap=len(parts) < len(PARTS)), path)


def checkpoint_sha256(path):
    """The SHA-256 that a checkpoint which was read ends with."""
    if path.is_dir():
        return read_json(path / MANIFEST)["sha256"]
    with open(path, "rb") as file:
        file.seek(-hashlib.sha256().digest_size, os.SEEK_END)
        return file.read().hex()


def set_aside_unreadable(out_dir):
    """Rename a newest checkpoint that cannot be read. It must not become the previous one."""
    for path in _present(out_dir, NEWEST):
        try:
            _replace(path, path.with_name(f"{path.name}.unreadable"))
        except OSError as error:
            raise UserError(f"{path} cannot be read or renamed ({error.strerror}); move it elsewhere.") from None
