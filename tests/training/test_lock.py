"""The lock of an out_dir: a live owner is named, a dead one's lock is taken over, wherever it ran."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT
from training import lock
from training.errors import UserError
from training.lock import RunLock


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(RunLock, "WAIT", 0.3)
    monkeypatch.setattr(RunLock, "HEARTBEAT", 0.2)


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def flock(request, monkeypatch):
    """Whether the file system has file locks."""
    if not request.param:

        def none(*arguments):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "flock", none)
    return request.param


def hold(folder):
    """Another process that holds the lock of `folder` until it is killed."""
    code = f"from training.lock import RunLock\nRunLock({str(folder)!r})\nprint(1, flush=True)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.readline()
    return process


def test_a_live_owner_is_named_and_a_dead_one_is_not_in_the_way(tmp_path, flock, capsys):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"in use by the run of process {process.pid} on {socket.gethostname()}"):
        RunLock(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["process"] == process.pid, "left as it was"
    process.kill()
    process.communicate()
    RunLock(tmp_path).release()
    assert os.listdir(tmp_path) == []
    warnings = capsys.readouterr().err.count("cannot be locked (No locks available)")
    assert warnings == (0 if flock else 2), "one for each try"


def test_another_process_with_the_owners_number_is_not_the_owner(tmp_path, flock):
    me = {"host": socket.gethostname(), "process": os.getppid(), "started": "1"}
    (tmp_path / "run.lock").write_text(json.dumps(me))
    RunLock(tmp_path).release()


def test_an_owner_on_another_host_lives_as_long_as_it_touches_the_file(tmp_path, flock):
    """As on a file system whose locks are not seen by other hosts."""
    path, ended = tmp_path / "run.lock", threading.Event()
    path.write_text(json.dumps({"host": "node7", "process": 4711, "started": "9"}))

    def beat():
        while not ended.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="in use by the run of process 4711 on node7"):
        RunLock(tmp_path)
    ended.set()
    thread.join()
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert 0.3 < time.monotonic() - started < 3


def test_of_many_that_start_at_once_one_has_it(tmp_path):
    taken, refused = [], []

    def start():
        try:
            taken.append(RunLock(tmp_path))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    taken[0].release()


OWN_HOST = json.dumps({"host": socket.gethostname(), "process": -1, "started": ""}).encode()
TORN = [b"", b"\0" * 100, b"{}", b"[1]", b'{"host": 1, "process": "x", "started": []}', b"[" * 4000, OWN_HOST]


@pytest.mark.parametrize("content", TORN, ids=range(len(TORN)))
def test_a_torn_lock_file_is_nobodys(tmp_path, flock, content):
    (tmp_path / "run.lock").write_bytes(content)
    RunLock(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_removed_and_made_anew_is_another_owners(tmp_path):
    first = RunLock(tmp_path)
    (tmp_path / "run.lock").unlink()
    second = RunLock(tmp_path)
    first.release()
    assert (tmp_path / "run.lock").exists()
    second.release()


def test_a_full_disk_leaves_no_empty_lock(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space left"):
        RunLock(tmp_path)
    assert os.listdir(tmp_path) == []
