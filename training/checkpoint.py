"""Checkpoints that a crash cannot tear and that notice damage: ckpt.pt (newest), ckpt_prev.pt, ckpt_STEP.pt (kept).

    save_checkpoint(out_dir, {"model": ..., "optimizer": ..., "step": 1000, ...})
    checkpoint, path = load_checkpoint(out_dir)

A file is what torch.save writes, so torch.load reads it, followed by its SHA-256. Loading runs no code from the file.
"""

import hashlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import torch

from training.errors import UserError

NEWEST, PREVIOUS = "ckpt.pt", "ckpt_prev.pt"
_MARK = b"sha256: "
_TRAILER = len(_MARK) + hashlib.sha256().digest_size


class _HashingFile:
    """A binary file that is only appended to, and knows the SHA-256 of what went in."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save_checkpoint(out_dir, checkpoint, keep=0):
    """Write `checkpoint` as ckpt.pt; the one before becomes ckpt_prev.pt. The last `keep` stay as ckpt_STEP.pt too.

    At every moment there is a whole checkpoint under one of the two names: the file is complete and on disk before
    it gets its name.
    """
    out_dir = Path(out_dir)
    newest, temporary = out_dir / NEWEST, out_dir / f"{NEWEST}.tmp"
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        torch.save(checkpoint, hashing)
        file.write(_MARK + hashing.digest.digest())
        file.flush()
        os.fsync(file.fileno())
    if newest.exists():
        _link(newest, out_dir / PREVIOUS)
    os.replace(temporary, newest)
    if keep:
        _link(newest, out_dir / f"ckpt_{checkpoint['step']}.pt")
        for old in kept_checkpoints(out_dir)[:-keep]:
            old.unlink()
    folder = os.open(out_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _link(source, name):
    """Give `source` a second name, atomically; where the file system has no links, a copy gets it."""
    temporary = name.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, name)


def kept_checkpoints(out_dir):
    """The ckpt_STEP.pt of a run, oldest first."""
    found = [path for path in Path(out_dir).glob("ckpt_*.pt") if path.stem[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[5:]))


def load_checkpoint(out_dir, map_location="cpu"):
    """(checkpoint, its path): ckpt.pt or, where that is missing or damaged, ckpt_prev.pt with a warning on stderr.

    Raises UserError where there is none, or both are damaged.
    """
    problems = []
    for name in (NEWEST, PREVIOUS):
        path = Path(out_dir) / name
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path, map_location)
        except UserError as error:
            problems.append(str(error))
            print(f"warning: {error}", file=sys.stderr)
            continue
        return checkpoint, path
    if problems:
        raise UserError(f"{out_dir}: no checkpoint can be read. {' '.join(problems)}")
    raise UserError(f"{out_dir} holds no checkpoint; start a run with --init_from=scratch, or name another --out_dir.")


def read_checkpoint(path, map_location="cpu"):
    """The checkpoint in one file. Raises UserError if one bit of it is not as it was written."""
    path = Path(path)
    digest, left = hashlib.sha256(), path.stat().st_size - _TRAILER
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 24))):
            digest.update(block)
            left -= len(block)
        if left or file.read() != _MARK + digest.digest():
            raise UserError(f"{path} is damaged: it is not what was written (its SHA-256 differs).")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no checkpoint of this project ({error}).") from None
