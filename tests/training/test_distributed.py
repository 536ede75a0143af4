"""The lifeline between ranks, in one process: whom it names, wherever its connections come to be."""

import contextlib
import os
import queue
import resource
import socket
import threading
from types import SimpleNamespace

import pytest

from training.distributed import Distributed, RankMonitor
from training.errors import UserError


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


def two_lifelines(before=lambda port: None):
    """Those of ranks 0 and 1; both are marked as leaving, so that neither ends this process.

    before: called with rank 0's port before rank 1 connects to it.
    """
    said, made = queue.Queue(), {}

    def hear(_):
        word = said.get(timeout=10)
        before(word[0])
        return [word]

    def make(rank):
        gather = (lambda word: [said.put(word) or word]) if rank == 0 else hear
        made[rank] = RankMonitor(SimpleNamespace(rank=rank, size=2, is_rank0=rank == 0, gather=gather))
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
    monkeypatch.setattr("training.distributed.LEAVE_TIME", 10**6)
    with many_files(files):
        ours, theirs = two_lifelines()
        theirs.close(well=False)
        assert ours.broken.wait(5) and ours.dead == 1
        assert "rank 0 ends, because rank 1 died" in ours.sentence()


def test_a_rank_that_is_done_is_not(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ours, theirs = two_lifelines()
    theirs.close(well=True)
    ours._thread.join(5)
    assert not ours._thread.is_alive() and not ours.broken.is_set()


@pytest.mark.parametrize("word", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(20)])
def test_strangers_take_no_ranks_place(monkeypatch, word):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("training.distributed.LEAVE_TIME", 10**6)

    def stranger(port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(word)

    ours, theirs = two_lifelines(stranger)
    assert list(ours._ranks.values()) == [1]
    theirs.close(well=False)
    assert ours.broken.wait(5) and ours.dead == 1


@pytest.mark.parametrize(
    "device, ranks, gpus, said",
    [
        ("cuda", 4, 2, r"too few GPUs \(2, ranks: 4\); start --nproc_per_node=2, or"),
        ("cuda", 1, 0, r"too few GPUs \(0, ranks: 1\); use --device=cpu"),
        ("cuda:3", 1, 2, r"too few GPUs \(2, the first is number 0\); name another, or use"),
    ],
)
def test_too_few_gpus_are_noticed_on_the_rank_that_has_one(monkeypatch, device, ranks, gpus, said):
    """On local rank 0, which is the one that speaks; or it would wait for the others, who have left without a word."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=said):
        Distributed(device)


@pytest.mark.parametrize("local, one_machine", [(None, True), (8, True), (4, False)])
def test_one_machine_or_several(monkeypatch, local, one_machine):
    monkeypatch.setenv("WORLD_SIZE", "8")
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert Distributed("cpu").one_machine == one_machine
