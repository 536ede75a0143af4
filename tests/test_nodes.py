"""Two nodes of two ranks each: two torchrun agents on this machine that meet by the c10d rendezvous.

Each node has a copy of the model, split over its ranks, and a checkpoint is a folder. test_ranks.py has copies alone.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, tiny_words, torchrun
from tests.test_crash import kill_all, ranks_of, same_end, wait_for_step
from tests.test_ranks import ended, script

RUN = ["--max_iters=60", "--eval_interval=10", "--batch_size=2", "--dropout=0.1", "--init_from=auto"]
RUN += ["--fsdp=True", "--fsdp_shard=2", "--hess_bs=12"]  # two copies, as several nodes have them


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def node(port, words, *options, script=ROOT / "train_sophiag.py"):
    """An agent with two ranks, not waited for. The first of two serves the rendezvous."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_id=7"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", *options, str(script), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip


def wait_for_port(port):
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The folder of a run of four ranks under one agent."""
    out_dir = tmp_path_factory.mktemp("nodes") / "whole"
    done = torchrun(4, "train_sophiag.py", [*tiny_words(corpus, out_dir), *RUN])
    assert done.returncode == 0, done.stderr
    return out_dir


def rehearse(corpus, tmp_path, disturb, *options):
    """(output of the first node, of the second, out_dir) of a run that `disturb(port, words, nodes)` disturbs."""
    out_dir = tmp_path / "out"
    words, port = [*tiny_words(corpus, out_dir), *RUN], free_port()
    nodes = [node(port, words, *options)]
    wait_for_port(port)
    nodes.append(node(port, words, *options))
    try:
        disturb(port, words, nodes)
        outputs = [ended(process, 150) for process in nodes]
    finally:
        for process in nodes:
            with contextlib.suppress(ValueError):
                kill_all(process)
    return outputs, out_dir


def kill_rank(port, words, nodes):
    wait_for_step(nodes[0], 15)
    os.kill(ranks_of(nodes[1])[1], signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_dies_and_torchrun_restarts_both_nodes(corpus, tmp_path, undisturbed):
    outputs, out_dir = rehearse(corpus, tmp_path, kill_rank, "--max-restarts=3")
    told = [
        output.count("error: the run ends, because rank 3 died; restart with --init_from=auto") for output in outputs
    ]
    assert told == [1, 1], "once on each node"
    assert "resumed at step" in outputs[0]
    same_end(undisturbed, out_dir)


@pytest.mark.slow
def test_without_restarts_the_dead_rank_is_named_and_the_next_start_goes_on(corpus, tmp_path, undisturbed):
    """The other agent learns of it by its own ranks."""
    outputs, out_dir = rehearse(corpus, tmp_path, kill_rank)
    for output in outputs:
        assert output.count("because rank 3 died") == 1 and "Traceback" not in output.split("elastic")[0], output
    rehearse(corpus, tmp_path, lambda port, words, nodes: None)
    same_end(undisturbed, out_dir)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["agent", "node"])
def test_a_node_is_lost_and_comes_back(corpus, tmp_path, undisturbed, lost):
    """The other agent waits for it. The agent alone is lost, or its ranks too."""

    def lose(port, words, nodes):
        wait_for_step(nodes[0], 15)
        kill_all(nodes[1]) if lost == "node" else nodes[1].kill()
        nodes[1].wait()
        nodes[1] = node(port, words, "--max-restarts=3")

    outputs, out_dir = rehearse(corpus, tmp_path, lose, "--max-restarts=3")
    cause = (
        r"torchrun is gone and step \d+ is checkpointed" if lost == "agent" else r"the run ends, because rank [23] died"
    )
    assert re.search(f"error: {cause}", outputs[0]) and "resumed at step" in outputs[0], outputs
    same_end(undisturbed, out_dir)


@pytest.mark.slow
def test_the_agent_that_serves_the_rendezvous_is_lost(corpus, tmp_path, undisturbed):
    """Then both nodes have to be started again."""

    def lose(port, words, nodes):
        wait_for_step(nodes[0], 15)
        nodes[0].kill()

    outputs, out_dir = rehearse(corpus, tmp_path, lose, "--max-restarts=3")
    assert "error: torchrun is gone and step" in outputs[0]
    rehearse(corpus, tmp_path, lambda port, words, nodes: None)
    same_end(undisturbed, out_dir)


@pytest.mark.slow
def test_a_late_node_is_waited_for(corpus, tmp_path, undisturbed):
    """By torchrun itself, for its join_timeout. Then it ends, and nothing was written."""
    words, port = [*tiny_words(corpus, tmp_path / "out"), *RUN], free_port()
    output = ended(node(port, words, "--rdzv_conf=join_timeout=3"), 60)
    assert "RendezvousTimeoutError" in output and not (tmp_path / "out").exists()
    first = node(port, words)
    time.sleep(8)
    second = node(port, words)
    assert "step 60/60" in ended(first, 100) + ended(second, 100)
    same_end(undisturbed, tmp_path / "out")


def test_an_out_dir_that_one_node_does_not_see(corpus, tmp_path):
    apart = script(
        tmp_path,
        "folder = sys.argv.pop(1) + os.environ['GROUP_RANK']\nos.makedirs(folder, exist_ok=True)\nos.chdir(folder)\n"
        "from training import lock\nlock.check_shared.__defaults__ = (1,)",
    )
    words, port = [str(tmp_path / "node"), *tiny_words(corpus, "out"), *RUN[:-1]], free_port()
    nodes = [node(port, words, script=apart) for _ in range(2)]
    for process in nodes:
        output = ended(process, 60)
        assert process.returncode
        message = r"error: out on \S+ is not the folder of rank 0 on \S+ \(it does not hold the same run.lock\)"
        assert len(re.findall(message, output)) == 1 and "Traceback" not in output.split("elastic")[0]
    assert os.listdir(tmp_path / "node1") == [] and not (tmp_path / "node0" / "out").exists()
