"""Ranks that come late, die, hang or lag, their launcher, and who owns out_dir: seen as the person who started them."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import train_adam
from tests.conftest import ROOT, read_lines, tiny_words, torchrun
from tests.test_crash import kill_all, ranks_of, same_end, start, wait_for_step
from training.checkpoint import load_checkpoint, read_checkpoint
from training.errors import UserError
from training.lock import RunLock

ENDLESS = ["--max_iters=1000000", "--eval_interval=1000000", "--batch_size=4"]


def script(folder, body):
    """A training script: `body` is Python that runs before train_adam.main, with RANK in `rank`."""
    path = folder / "script.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, time\nimport train_adam\n"
        "from training.errors import command\nfrom training.run import Run\nfrom training import checkpoint\n"
        f"rank = int(os.environ.get('RANK', 0))\n{body}\ncommand(lambda: train_adam.main(sys.argv[1:]))\n"
    )
    return path


def ended(process, timeout):
    """Its output, when it has ended."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    return output


@pytest.mark.parametrize(
    "ranks, more",
    [
        (3, []),
        pytest.param(4, ["--fsdp=True", "--hess_bs=24"], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
    ],
)
def test_ranks_give_the_same_bits_after_torchrun_restarted_them(corpus, tmp_path, ranks, more):
    """One rank is killed, the others name it; torchrun restarts all on its old store, and they resume by themselves."""
    run = ["--max_iters=40", "--eval_interval=10", "--batch_size=2", "--dropout=0.1", *more]
    done = torchrun(ranks, "train_sophiag.py", [*tiny_words(corpus, tmp_path / "whole"), *run])
    assert done.returncode == 0, done.stderr
    words = [*tiny_words(corpus, tmp_path / "killed"), *run, "--init_from=auto"]
    process = start(ranks, words, options=["--max-restarts=2"])
    wait_for_step(process, 15)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = ended(process, 90)
    assert process.returncode == 0, output
    assert "resumed at step" in output, output
    assert output.count("error: the run ends, because rank 1 died") == 1, "by one rank for all"
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("fsdp", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ranks_whose_torchrun_is_killed_checkpoint_and_leave(corpus, tmp_path, fsdp):
    words = [*tiny_words(corpus, tmp_path / "out"), *ENDLESS, f"--fsdp={fsdp}"]
    process = start(2, words)
    wait_for_step(process, 10)
    process.kill()
    output = ended(process, 30)  # which is complete when the ranks have ended too
    assert len(re.findall(r"error: torchrun is gone and step \d+ is checkpointed", output)) == 1, output
    assert "Traceback" not in output
    assert load_checkpoint(tmp_path / "out")[0]["step"] >= 10
    newest = "ckpt" if fsdp else "ckpt.pt"
    assert sorted(os.listdir(tmp_path / "out")) == [newest, "config.json", "metrics.jsonl"], "the lock is gone"


def test_a_rank_that_is_stopped_is_named_and_one_that_lags_is_logged(corpus, tmp_path):
    slow = script(
        tmp_path,
        "step = Run.backward\n"
        "if rank == 2:\n    Run.backward = lambda run, batch: (time.sleep(0.05), step(run, batch))",
    )
    words = [*tiny_words(corpus, tmp_path / "out"), *ENDLESS, "--log_interval=5", "--nccl_timeout=4"]
    process = start(3, words, script=slow)
    wait_for_step(process, 15)
    stopped, output = ranks_of(process)[1], ""
    os.kill(stopped, signal.SIGSTOP)
    while "error: the run" not in output:
        output += (line := process.stdout.readline())
        assert line, output
    os.kill(stopped, signal.SIGCONT)  # or torchrun waits 30 s for it
    output += ended(process, 60)
    assert process.returncode != 0 and "Traceback" not in output.split("elastic")[0], output
    named = re.findall(r"error: the run ends, because rank 1 has not answered for \d+ s \(last known at", output)
    assert len(named) == 1, output
    assert re.search(r"warning: rank 1 has been silent for \d s", output)
    assert "because rank 2" not in output and "because rank 0" not in output
    lines = [line for line in read_lines(tmp_path / "out") if "slowest_rank" in line]
    assert {line["slowest_rank"] for line in lines[1:]} == {2}
    assert 0.15 < lines[-1]["seconds_behind"] < 2, "5 steps of 0.05 s"


@pytest.mark.slow
def test_ranks_leave_when_rank_0_is_stopped_while_it_writes(corpus, tmp_path):
    """It serves the store by which the writers of a checkpoint folder agree, which is silent then."""
    slow = script(
        tmp_path,
        "save = checkpoint.save_checkpoint\n"
        "def slow_save(*arguments):\n    print('writing', flush=True); time.sleep(5); save(*arguments)\n"
        "checkpoint.save_checkpoint = slow_save",
    )
    words = [*tiny_words(corpus, tmp_path / "out"), *ENDLESS, "--eval_interval=10", "--nccl_timeout=4", "--fsdp=True"]
    process = start(3, words, script=slow)
    for line in process.stdout:
        if line == "writing\n":
            break
    os.kill(ranks_of(process)[0], signal.SIGSTOP)
    output = ended(process, 90)  # torchrun kills rank 0 after 30 s
    assert len(re.findall(r"error: the run ends, because rank 0 has not answered for \d+ s", output)) == 1, output
    assert output.count("warning: rank 0 has been silent") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_that_is_stuck_in_its_step_is_named(corpus, tmp_path, stuck):
    """It lives and its heart beats, but the others wait for it."""
    hangs = script(
        tmp_path,
        "step, steps = Run.optimizer_step, []\n"
        "def optimizer_step(run):\n    steps.append(1)\n"
        f"    time.sleep(60 * (rank == {stuck} and len(steps) > 5))\n    step(run)\n"
        "Run.optimizer_step = optimizer_step",
    )
    words = [*tiny_words(corpus, tmp_path / "out"), *ENDLESS, "--nccl_timeout=4"]
    process = start(3, words, script=hangs)
    output = ended(process, 60)
    assert process.returncode != 0
    assert len(re.findall(rf"error: the run ends, because rank {stuck} has not answered for \d+ s", output)) == 1, (
        output
    )
    assert not re.search(rf"because rank [^{stuck}]", output), output


def alone(rank, size, words, port, **environment):
    """One rank without torchrun, not waited for."""
    env = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_adam.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in env.items()}},
    )  # fmt: skip


def test_ranks_that_do_not_arrive_are_named(corpus, tmp_path):
    """Of three ranks rank 1 is missing; of two others rank 0, which would have served the store."""
    words, started = [*tiny_words(corpus, tmp_path / "out"), "--nccl_timeout=8"], time.monotonic()
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
    processes = [alone(0, 3, words, ports[0]), alone(2, 3, words, ports[0]), alone(1, 2, words, ports[1])]
    for process, missing in zip(processes, (1, 1, 0), strict=True):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.fullmatch(rf"error: rank {missing} did not arrive within 8 s.*; start all ranks .*\n", errors), errors
    assert time.monotonic() - started < 40


def test_an_error_of_one_rank_is_printed_by_it(corpus, tmp_path):
    """Of any rank, if torchrun started them; else by rank 0 of a machine for all."""
    apart = script(tmp_path, "sys.argv += ['--seed=zwei'][:rank]")
    done = torchrun(3, apart, [*tiny_words(corpus, tmp_path / "out"), "--nccl_timeout=3"])
    messages = "error: --seed=zwei: wants a whole number.", "error: ranks 1, 2 did not arrive within 3 s"
    assert done.returncode and [done.stderr.count(message) for message in messages] == [1, 1], done.stderr


@pytest.mark.slow  # waits for slow files twice
def test_ranks_wait_for_slow_files_and_a_write_is_finished_after_a_rank_died(corpus, tmp_path):
    """Both take thrice nccl_timeout. Rank 1 dies during the last write, and torchrun signals rank 0 once more."""
    slow = script(
        tmp_path,
        "save, load = checkpoint.save_checkpoint, checkpoint.torch.load\n"
        "def slow_save(*arguments):\n    print('writing', flush=True); time.sleep(6); save(*arguments)\n"
        "checkpoint.save_checkpoint = slow_save\n"
        "def slow_load(*arguments, **settings):\n"
        "    time.sleep(6 * (not settings.get('mmap'))); return load(*arguments, **settings)\n"
        "checkpoint.load_checkpoint.__globals__['torch'].load = slow_load",
    )
    words = [*tiny_words(corpus, tmp_path / "out"), "--batch_size=4", "--eval_interval=1000", "--nccl_timeout=2"]
    process = start(2, [*words, "--max_iters=10"], script=slow)
    output = ended(process, 60)
    assert process.returncode == 0, output
    assert load_checkpoint(tmp_path / "out")[0]["step"] == 10

    resumed = [*words, "--max_iters=1000000", "--eval_interval=1000000", "--init_from=resume"]
    process = start(2, resumed, script=slow)
    wait_for_step(process, 20)
    ranks = ranks_of(process)
    os.kill(ranks[0], signal.SIGTERM)
    for line in process.stdout:
        if line == "writing\n":
            break
    time.sleep(1.5)  # now a second signal counts
    os.kill(ranks[1], signal.SIGKILL)
    output = ended(process, 60)
    assert load_checkpoint(tmp_path / "out")[0]["step"] >= 20, output


def test_ranks_with_different_checkpoints_do_not_train(corpus, tmp_path):
    """out_dir is a folder of one name on two machines. On rank 1 it holds an older checkpoint, or a damaged one."""
    apart = script(tmp_path, "os.chdir(sys.argv.pop(1) + str(rank))")
    for rank, steps in enumerate((20, 10)):
        train_adam.main([*tiny_words(corpus, tmp_path / f"node{rank}" / "out"), f"--max_iters={steps}"])
    words = [*tiny_words(corpus, "out"), "--init_from=auto"]
    done = torchrun(2, apart, [str(tmp_path / "node"), *words])
    assert done.returncode != 0
    assert (
        "error: ranks 0 and 1 read different checkpoints from out/ckpt.pt, with another step (20 and 10)" in done.stderr
    )
    (tmp_path / "node1" / "out" / "ckpt.pt").write_bytes(b"damaged")
    done = torchrun(2, apart, [str(tmp_path / "node"), *words])
    assert done.returncode != 0
    assert "error: out/ckpt.pt is damaged" in done.stderr, "rank 1 does not fall back for itself"
    assert read_checkpoint(tmp_path / "node0" / "out" / "ckpt.pt")["step"] == 20


@pytest.mark.parametrize("split", ["train", "val"])
def test_ranks_with_different_data_do_not_train(corpus, tmp_path, split):
    """The dataset is a folder of one name on two machines; one token of a split differs. Then rank 1 lacks a file."""
    apart = script(tmp_path, "os.chdir(sys.argv.pop(1) + str(rank))")
    for rank in range(2):
        shutil.copytree(corpus, tmp_path / f"node{rank}" / "text")
    file = tmp_path / "node1" / "text" / f"{split}.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    words = [str(tmp_path / "node"), *tiny_words("./text", tmp_path / "out")]
    for problem in (f"ranks 0 and 1 read different files of dataset = ./text, with another {split}_sha256", "missing"):
        done = torchrun(2, apart, words)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1 and problem in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("form", ["ckpt", pytest.param("import", marks=pytest.mark.slow)])
def test_ranks_with_different_weights_do_not_train(corpus, tmp_path, form):
    """Each machine has its own copy of the weights. On rank 1 the newest is damaged, or another model."""
    apart = script(tmp_path, "os.chdir(sys.argv.pop(1) + str(rank))")
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        train_adam.main([*tiny_words(corpus, folder / "start"), "--max_iters=20"])
        own = load_checkpoint(folder / "start")[0]
        name = "scale_attn_by_inverse_layer_idx"
        foreign = {"model": own["model"], "model_args": own["model_args"] | {name: False}, "iter_num": rank}
        torch.save(foreign, folder / "foreign.pt")
    (folder / "start" / "ckpt.pt").write_bytes(b"damaged")
    source = {"ckpt": "ckpt:start", "import": "import:foreign.pt"}[form]
    foreign["model"]["lm_head.weight"][0, 0] += 2**-20
    torch.save(foreign, folder / "foreign.pt")
    done = torchrun(2, apart, [str(tmp_path / "node"), *tiny_words(corpus, "out"), f"--init_from={source}"])
    assert done.returncode != 0
    assert f"error: ranks 0 and 1 read different weights from {source}, with another SHA-256 (" in done.stderr
    assert done.stderr.count("error: ") == 1 and not list(tmp_path.glob("node*/out/c*"))


def test_a_second_run_in_out_dir_is_refused_and_removes_nothing(corpus, tmp_path, monkeypatch, capsys):
    words = tiny_words(corpus, tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_adam.py"), *words, *ENDLESS],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # runs respect a nohup
    )  # fmt: skip
    wait_for_step(process, 3)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(RunLock, "WAIT", 0.5)
    owner = f"in use by the run of process {process.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=owner):
        train_adam.main([*words, "--init_from=auto"])
    assert "warning: SLURM_NTASKS = 4, but RANK is not set" in capsys.readouterr().err
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0, "a closed terminal is a reason to checkpoint"
    steps = [line["step"] for line in read_lines(tmp_path / "out")]
    assert steps == list(range(len(steps))) and load_checkpoint(tmp_path / "out")[0]["step"] == len(steps)
    train_adam.main([*words, "--init_from=auto", f"--max_iters={len(steps) + 5}"])
    assert f"resumed at step {len(steps)}" in capsys.readouterr().out


SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
"$@" & first=$!
"$@" & second=$!
for name in USR1 TERM; do trap "kill -$name $first $second" $name; done
for process in $first $second; do
    wait $process || code=$?
    while kill -0 $process 2>/dev/null; do wait $process || code=$?; done
done
exit ${code:-0}"""


@pytest.mark.slow
def test_slurm_script_checkpoints_requeues_and_resumes(corpus, tmp_path):
    """The script itself, with stand-ins for srun, which starts two nodes here, and for scontrol."""
    bin, venv = tmp_path / "bin", tmp_path / ".venv" / "bin"
    for folder in (bin, venv):
        folder.mkdir(parents=True)
    stand_ins = {
        bin / "srun": SRUN,
        bin / "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued',
        venv / "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for path, text in stand_ins.items():
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment["MASTER_PORT"] = str(server.getsockname()[1])
    words = [*tiny_words(corpus, tmp_path / "out"), "--batch_size=4", "--eval_interval=1000", "--lr_decay_iters=30"]

    def submit(*more):
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / "train.sbatch"), str(ROOT / "train_adam.py"), *words, *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment,
            start_new_session=True,
        )  # fmt: skip

    process = submit("--max_iters=1000000")
    wait_for_step(process, 10)
    process.send_signal(signal.SIGUSR1)
    output = ended(process, 60)
    assert process.returncode == 0 and "stopped before step" in output, output
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    step = load_checkpoint(tmp_path / "out")[0]["step"]
    process = submit(f"--max_iters={step + 5}")
    output = ended(process, 60)
    assert process.returncode == 0 and f"resumed at step {step}" in output, output
    assert load_checkpoint(tmp_path / "out")[0]["step"] == step + 5
    assert (tmp_path / "requeued").read_text() == "requeue 77\n", "a run that is done is not"
