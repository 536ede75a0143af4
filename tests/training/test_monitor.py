"""The monitor of the ranks, in one process: which rank it names, whatever addresses and files there are."""

import contextlib
import os
import queue
import resource
import socket
import threading
from types import SimpleNamespace

import pytest

from training.monitor import RankMonitor


@contextlib.contextmanager
def many_files(count):
    """So many files are open that the next ones have numbers above `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 200:
        pytest.skip("not so many files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    try:
        yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def two_monitors(before=lambda port: None):
    """The monitors of ranks 0 and 1, both marked as leaving, so that neither ends this process.

    before: called with rank 0's port before rank 1 connects to it.
    """
    messages, made = queue.Queue(), {}

    def hear(_):
        word = messages.get(timeout=10)
        before(word[0])
        return [word]

    def make(rank):
        gather = (lambda word: [messages.put(word) or word]) if rank == 0 else hear
        made[rank] = RankMonitor(SimpleNamespace(rank=rank, size=2, is_rank0=rank == 0, gather=gather, timeout=60))
        made[rank].leaving.set()

    first = threading.Thread(target=make, args=(0,), daemon=True)
    first.start()
    make(1)
    first.join()
    return made[0], made[1]


@pytest.mark.parametrize("address, files", [("127.0.0.1", 0), ("::1", 0), ("127.0.0.1", 1100)])
def test_a_rank_that_leaves_is_named(monkeypatch, address, files):
    """On IPv4 and IPv6, and where rank 0 has more files open than select() can wait for, as one of many ranks has."""
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setattr("training.monitor.LEAVE_TIME", 10**6)
    with many_files(files):
        monitor, other = two_monitors()
        other.close(well=False)
        assert monitor.broken.wait(5) and monitor.dead == 1
        assert "rank 0 ends, because rank 1 died" in monitor.message()


def test_a_rank_that_is_done_is_not(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monitor, other = two_monitors()
    other.close(well=True)
    monitor._thread.join(5)
    assert not monitor._thread.is_alive() and not monitor.broken.is_set()


@pytest.mark.parametrize("word", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(20)])
def test_strangers_take_no_ranks_place(monkeypatch, word):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("training.monitor.LEAVE_TIME", 10**6)

    def stranger(port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(word)

    monitor, other = two_monitors(stranger)
    assert list(monitor._ranks.values()) == [1]
    other.close(well=False)
    assert monitor.broken.wait(5) and monitor.dead == 1
