"""Checkpoints: whole or not there, damage noticed, no code run."""

import builtins
import os
import random
import threading
import time

import pytest
import torch

from training.checkpoint import (
    CheckpointWriter,
    checkpoint_sha256,
    copy_to_host,
    kept_checkpoints,
    load_checkpoint,
    make_newest,
    read_checkpoint,
    save_checkpoint,
    set_aside_unreadable,
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


def test_a_second_name_for_a_checkpoint_that_has_it_already_leaves_no_third(tmp_path):
    """os.replace() does nothing where both are names of one file."""
    save_checkpoint(tmp_path, checkpoint(1))
    for _ in range(2):
        CheckpointWriter(tmp_path).mark_best(tmp_path / "ckpt.pt")
    make_newest(tmp_path / "ckpt_best.pt", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_best.pt"]


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
    with pytest.raises(UserError, match="no checkpoint can be read as the newest"):
        load_checkpoint(tmp_path)
    (tmp_path / "ckpt_1.pt").write_bytes(whole)
    with pytest.raises(UserError, match=r"--checkpoint=.*ckpt_1\.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling"])
@pytest.mark.parametrize(
    "name",
    ["ckpt.pt.tmp", "ckpt.tmp", "ckpt.tmp.gone", "ckpt_prev.pt.aside", "ckpt_prev.link", "ckpt_best.pt", "ckpt_9.pt"],
)
def test_nothing_in_out_dir_is_in_the_way_of_a_checkpoint(tmp_path, name, kind):
    """Opening a FIFO would wait for ever, and no open() gets past a folder."""
    if kind == "folder":
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / "notes").touch()
    elif kind == "fifo":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("nowhere")
    for step in (1, 2):
        save_checkpoint(tmp_path, {**checkpoint(step), "is_best": True}, keep=2)
        assert load_checkpoint(tmp_path)[0]["step"] == step == read_checkpoint(tmp_path / "ckpt_best.pt")["step"]
    assert read_checkpoint(tmp_path / "ckpt_prev.pt")["step"] == 1
    if (name, kind) == ("ckpt.pt.tmp", "folder"):
        assert len(list(tmp_path.glob("ckpt.pt.tmp.*/inside/notes"))) == 1, "what is not ours is not removed"


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

    def slow(out_dir, checkpoint, keep, *_):
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


def cannot_open(monkeypatch, name, error):
    """open() of a file with this name raises `error`, as mode 000 does for a user and a bad sector for everyone."""
    original = builtins.open

    def fails(path, *arguments, **settings):
        if os.path.basename(os.fspath(path) if not isinstance(path, int) else "") == name:
            raise error
        return original(path, *arguments, **settings)

    monkeypatch.setattr(builtins, "open", fails)


@pytest.mark.parametrize("kind", ["folder", "FIFO", "dangling link", "link to itself", "mode 000", "bad sector"])
def test_an_unreadable_checkpoint_falls_back_to_the_previous_one(tmp_path, monkeypatch, capsys, kind):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    newest = tmp_path / "ckpt.pt"
    if kind == "mode 000":
        cannot_open(monkeypatch, "ckpt.pt", PermissionError(13, "Permission denied"))
    elif kind == "bad sector":
        cannot_open(monkeypatch, "ckpt.pt", OSError(5, "Input/output error"))
    else:
        newest.unlink()
    if kind == "folder":
        newest.mkdir()
    elif kind == "FIFO":
        os.mkfifo(newest)
    elif kind == "dangling link":
        newest.symlink_to(tmp_path / "nowhere")
    elif kind == "link to itself":
        newest.symlink_to(newest)
    loaded, path = load_checkpoint(tmp_path)
    assert (loaded["step"], path.name) == (1, "ckpt_prev.pt")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {newest} cannot be read (") and said.count("\n") == 1

    monkeypatch.undo()
    set_aside_unreadable(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        save_checkpoint(tmp_path, checkpoint(3))
    assert load_checkpoint(tmp_path)[0]["step"] == 1, "the unreadable file never takes the good one's place"
    save_checkpoint(tmp_path, checkpoint(3))
    assert load_checkpoint(tmp_path)[0]["step"] == 3
    assert read_checkpoint(tmp_path / "ckpt_prev.pt")["step"] == 1
    assert checkpoint_sha256(newest) != checkpoint_sha256(tmp_path / "ckpt_prev.pt")


@pytest.fixture
def obstacle(tmp_path, monkeypatch):
    """A mount point named ckpt.pt.tmp, which can be neither opened, unlinked nor renamed."""
    path, replace = tmp_path / "ckpt.pt.tmp", os.replace

    def busy(source, target):
        if source == path and path.is_dir():
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    (path / "file").mkdir(parents=True)
    return path


def test_what_is_in_the_way_of_a_write_ends_neither_the_thread_nor_the_wait(tmp_path, obstacle, monkeypatch, capsys):
    monkeypatch.setattr(CheckpointWriter, "RETRY", 0.05)
    monkeypatch.setattr(CheckpointWriter, "LAST_RETRY", 0.01)
    writer = CheckpointWriter(tmp_path)
    writer.save(checkpoint(1))
    writer.wait()
    assert writer.error.errno == 16 and writer.step is None
    writer.save(checkpoint(2))
    time.sleep(0.3)  # several tries, of which one is told
    assert capsys.readouterr().err.count("could not be written") == 2
    obstacle.rename(tmp_path / "elsewhere")
    for _ in range(100):
        if writer.step == 2:
            break
        time.sleep(0.05)
    assert writer.error is None and load_checkpoint(tmp_path)[0]["step"] == 2, "without another save()"
    os.mkfifo(obstacle)
    writer.save(checkpoint(3))
    writer.wait()
    assert writer.error is None and load_checkpoint(tmp_path)[0]["step"] == 3


@pytest.mark.parametrize("number", [5, 28, 116], ids=["EIO", "ENOSPC", "ESTALE"])
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", "link"])
def test_no_error_of_the_disk_ends_the_thread(tmp_path, monkeypatch, call, number):
    """Every call fails until the second try; stderr is closed all the while."""
    save_checkpoint(tmp_path, checkpoint(1))
    monkeypatch.setattr(CheckpointWriter, "LAST_RETRY", 0.01)
    original, failures = getattr(os, call), []

    def fails(*arguments, **settings):
        if len(failures) < 3:
            failures.append(arguments)
            raise OSError(number, os.strerror(number))
        return original(*arguments, **settings)

    writer = CheckpointWriter(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        patch.setattr("sys.stderr", open(os.devnull))  # not writable
        writer.save(checkpoint(2))
        writer.wait()
        assert writer.error is None and writer.step == 2
    assert load_checkpoint(tmp_path)[0]["step"] == 2
    assert read_checkpoint(tmp_path / "ckpt_prev.pt")["step"] == 1


def test_a_newer_checkpoint_takes_the_place_of_one_that_could_not_be_written(tmp_path, obstacle, monkeypatch, capsys):
    monkeypatch.setattr(CheckpointWriter, "RETRY", 60)
    writer = CheckpointWriter(tmp_path)
    writer.save(checkpoint(1))
    while writer.error is None:
        time.sleep(0.01)
    obstacle.rename(tmp_path / "elsewhere")
    writer.save(checkpoint(2))
    while writer.step != 2:  # at once, not after RETRY
        time.sleep(0.01)
    assert writer.error is None
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "step 1 could not be written" in said


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
