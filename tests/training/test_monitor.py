"""The monitor of the ranks, in one process: which rank it names, whatever addresses and files there are."""

import contextlib
import os
import queue
import resource
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from training.monitor import RankMonitor, Signals


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
    messages, made, never = queue.Queue(), {}, lambda: time.sleep(10**6)  # so that no monitor ends this process

    def hear(_):
        word = messages.get(timeout=10)
        before(word[0])
        return [word]

    def make(rank):
        gather = (lambda word: [messages.put(word) or word]) if rank == 0 else hear
        made[rank] = RankMonitor(
            SimpleNamespace(rank=rank, size=2, is_rank0=rank == 0, gather=gather, timeout=60, finish=never)
        )
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
        assert "the run ends, because rank 1 died" in monitor.message()


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


def test_nohup_is_respected_and_a_closed_terminal_does_not_matter(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

        def closed(*arguments):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "write", closed)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.received == signal.SIGUSR2
        signals.restore()
        os.kill(os.getpid(), signal.SIGTERM)  # late: the checkpoint is written, and the exit code stays 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("lost, ends", [(False, [143]), (True, [])])
def test_the_sigterm_that_torchrun_sends_for_a_lost_rank_is_no_second_signal(monkeypatch, lost, ends):
    codes, signals = [], Signals()
    monkeypatch.setattr(os, "_exit", codes.append)
    try:
        signals.rank_lost = lambda: lost
        signals._note(signal.SIGUSR1, None)
        signals._since -= 2
        signals._note(signal.SIGTERM, None)
        assert codes == ends
        signals._note(signal.SIGTERM, None)
        assert codes == [*ends, 143], "the next one is the user's"
    finally:
        signals.restore()


def test_the_rank_that_the_others_wait_for_is_accused_and_no_other(monkeypatch):
    """Rank 1 works on while rank 0 waits; where rank 0 itself does not wait, nobody is accused."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("training.monitor.LEAVE_TIME", 10**6)
    monkeypatch.setattr("training.monitor.HEARTBEAT", 0.1)
    monitor, other = two_monitors()
    other.step, other.busy_since = 7, time.monotonic() - 50
    monitor.busy_since = time.monotonic() - 60
    time.sleep(0.8)
    monitor.accuse()
    assert not monitor.broken.is_set()
    monitor.busy_since = None
    monitor.accuse()
    assert monitor.dead == 1 and "rank 1 has not answered for 5" in monitor.message() and "step 7" in monitor.message()
    assert other.broken.wait(5) and other.message() == monitor.message()
