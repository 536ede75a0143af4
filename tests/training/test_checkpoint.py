"""Checkpoints: whole or not there, damage noticed, no code run."""

import os
import random
import threading
import time

import pytest
import torch

from training.checkpoint import (
    CheckpointWriter,
    copy_to_host,
    kept_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from training.errors import UserError


def checkpoint(step):
    return {"step": step, "model": {"w": torch.full((50, 40), float(step))}, "rng": [[torch.get_rng_state()]]}


def test_newest_previous_and_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    loaded, path = load_checkpoint(tmp_path)
    assert (loaded["step"], path.name) == (40, "ckpt.pt")
    assert torch.equal(loaded["model"]["w"], torch.full((50, 40), 40.0))
    assert read_checkpoint(tmp_path / "ckpt_prev.pt")["step"] == 30
    assert [path.name for path in kept_checkpoints(tmp_path)] == ["ckpt_30.pt", "ckpt_40.pt"]
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_30.pt", "ckpt_40.pt", "ckpt_prev.pt"], "nothing left over"
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 40, "plain torch.load reads it"


def test_every_damage_falls_back_to_the_previous_one(tmp_path, capsys):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    newest = tmp_path / "ckpt.pt"
    whole = newest.read_bytes()
    place = random.Random(0)
    damaged = [b"", whole[:-1], whole[: len(whole) // 2], (tmp_path / "ckpt_prev.pt").read_bytes()[::-1], whole + b"x"]
    for _ in range(200):
        spoiled = bytearray(whole)
        spoiled[place.randrange(len(whole))] ^= 1 << place.randrange(8)
        damaged.append(bytes(spoiled))
    for content in damaged:
        newest.unlink()  # not the file that ckpt_prev.pt may share
        newest.write_bytes(content)
        assert load_checkpoint(tmp_path)[0]["step"] == 1
    assert capsys.readouterr().err.count("warning: ") == len(damaged)
    (tmp_path / "ckpt_prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        load_checkpoint(tmp_path)


def test_none_there(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, checkpoint(2))
    assert load_checkpoint(tmp_path)[0]["step"] == 1


def test_without_hard_links_copies_serve(tmp_path, monkeypatch):
    def no_links(*names):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert load_checkpoint(tmp_path)[0]["step"] == 2
    assert read_checkpoint(tmp_path / "ckpt_prev.pt")["step"] == 1


def test_writing_goes_on_beside_training_one_at_a_time(tmp_path, monkeypatch, capsys):
    """However slow the disk is. Of those that arrive meanwhile the newest is written, the others are skipped."""
    written, gate, writing = [], threading.Event(), threading.Lock()

    def slow(out_dir, checkpoint, keep):
        assert writing.acquire(blocking=False), "one at a time"
        gate.wait(5)
        written.append((checkpoint["step"], checkpoint["model"]["w"][0, 0].item()))
        writing.release()

    monkeypatch.setattr("training.checkpoint.save_checkpoint", slow)
    writer, first = CheckpointWriter(tmp_path), checkpoint(1)
    writer.save(first)
    first["model"]["w"].zero_()  # training goes on and changes its weights: the copy is what is written
    while writer._next:  # until the thread has it
        time.sleep(0.01)
    for step in (2, 3, 4):
        writer.save(checkpoint(step))
    assert written == [], "save() did not wait for the disk"
    message = capsys.readouterr().err
    assert "step 2 is skipped" in message and "step 3 is skipped" in message and "step 4" not in message
    gate.set()
    writer.wait()
    assert written == [(1, 1.0), (4, 4.0)] and writer.step == 4
    writer.save(checkpoint(5))
    writer.wait()
    assert writer.step == 5 and writer.error is None


def test_tied_weights_stay_tied_in_the_copy():
    weight = torch.randn(3, 4)
    copy = copy_to_host({"a": weight, "b": [weight], "c": weight[:2], "n": 3})
    assert copy["a"] is copy["b"][0] and copy["a"] is not weight and torch.equal(copy["a"], weight)
    assert torch.equal(copy["c"], weight[:2]) and copy["n"] == 3


def test_a_write_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    writer = CheckpointWriter(tmp_path)
    writer.save(checkpoint(1))
    writer.wait()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        writer.save(checkpoint(2))
        writer.wait()
    assert (
        "step 2 could not be written" in (message := capsys.readouterr().err)
        and "newest good one is of step 1" in message
    )
    assert writer.error and load_checkpoint(tmp_path)[0]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt"]
    writer.save(checkpoint(3))
    writer.wait()
    assert writer.error is None and load_checkpoint(tmp_path)[0]["step"] == 3


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_malicious_pickle_is_refused(tmp_path):
    trap = tmp_path / "ran"
    save_checkpoint(tmp_path, {"step": 1, "model": RunsCode(str(trap))})
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    assert not trap.exists()
