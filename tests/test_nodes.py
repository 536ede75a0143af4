"""Two nodes of two ranks each: two torchrun agents on this machine that meet by the c10d rendezvous."""

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


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def node(port, words, *options, script=ROOT / "train_sophiag.py"):
    """An agent with two ranks, not waited for. The first of two serves the rendezvous."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_id=7"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", *options, str(script), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


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
    nodes = [node(port, words, *options), node(port, words, *options)]
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


def test_a_rank_dies_and_torchrun_restarts_both_nodes(corpus, tmp_path, undisturbed):
    outputs, out_dir = rehearse(corpus, tmp_path, kill_rank, "--max-restarts=3")
    assert re.search(r"error: rank \d ends, because rank 3 died; restart with --init_from=auto", "".join(outputs))
    assert "resumed at step" in outputs[0]
    same_end(undisturbed, out_dir)


def test_without_restarts_the_dead_rank_is_named_and_the_next_start_goes_on(corpus, tmp_path, undisturbed):
    """The other agent learns of it by its own ranks."""
    outputs, out_dir = rehearse(corpus, tmp_path, kill_rank)
    for output in outputs:
        assert "because rank 3 died" in output and "Traceback" not in output.split("elastic")[0], output
    rehearse(corpus, tmp_path, lambda port, words, nodes: None)
    same_end(undisturbed, out_dir)


def lose_node(port, words, nodes, agent_only):
    wait_for_step(nodes[0], 15)
    if agent_only:
        nodes[1].kill()
    else:
        kill_all(nodes[1])
    nodes[1].wait()
    time.sleep(1)
    nodes[1] = node(port, words, "--max-restarts=3")


@pytest.mark.parametrize("agent_only", [False, True])
def test_a_node_is_lost_and_comes_back(corpus, tmp_path, undisturbed, agent_only):
    outputs, out_dir = rehearse(corpus, tmp_path, lambda *a: lose_node(*a, agent_only), "--max-restarts=3")
    cause = "torchrun is gone" if agent_only else r"rank \d ends, because rank [23] died"
    print(outputs[0], "=====", outputs[1])
    assert re.search(f"error: {cause}", "".join(outputs)), outputs
    assert "resumed at step" in "".join(outputs)
    same_end(undisturbed, out_dir)


def test_a_node_comes_late(corpus, tmp_path, undisturbed):
    out_dir = tmp_path / "out"
    words, port = [*tiny_words(corpus, out_dir), *RUN], free_port()
    first = node(port, words)
    time.sleep(8)
    second = node(port, words)
    assert "step 60/60" in ended(first, 100)
    ended(second, 100)
    same_end(undisturbed, out_dir)


def test_a_node_comes_too_late(corpus, tmp_path):
    words, port = [*tiny_words(corpus, tmp_path / "out"), *RUN], free_port()
    output = ended(node(port, words, "--rdzv_conf=join_timeout=3,last_call_timeout=1"), 60)
    print(output)
    assert 0


def test_an_out_dir_that_one_node_does_not_see(corpus, tmp_path):
    apart = script(
        tmp_path,
        "folder = sys.argv.pop(1) + os.environ['GROUP_RANK']\nos.makedirs(folder, exist_ok=True)\nos.chdir(folder)\n"
        "from training import lock\nlock.check_shared.__defaults__ = (1,)",
    )
    words, port = [str(tmp_path / "node"), *tiny_words(corpus, "out"), *RUN], free_port()
    nodes = [node(port, words, script=apart) for _ in range(2)]
    for process in nodes:
        output = ended(process, 60)
        assert process.returncode
        message = r"error: out on \S+ is not the folder of rank 0 on \S+ \(it does not hold the same run.lock\)"
        assert len(re.findall(message, output)) == 1 and "Traceback" not in output.split("elastic")[0]
    assert os.listdir(tmp_path / "node1") == [] and os.listdir(tmp_path / "node0" / "out") == []
