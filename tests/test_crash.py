"""Runs that are killed, stopped, starved of disk, or lose a rank; each is started again and must lose nothing."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.conftest import ROOT, read_lines, tiny_words, torchrun, write_corpus
from training.checkpoint import load_checkpoint

RUN = [
    "--max_iters=120",
    "--batch_size=4",
    "--eval_interval=4",
    "--log_interval=2",
    "--hess_interval=5",
    "--dropout=0.1",
]


SOAK = [
    "--dataset=python",
    "--total_bs=64",
    "--batch_size=32",
    "--max_iters=400",
    "--warmup_iters=200",
    "--learning_rate=1.5e-4",  # calm: at 5e-4 runs with the same seed came to differ by 0.3 on their own
    "--eval_interval=50",
    "--eval_tokens=524288",
    "--log_interval=5",
]


def start(ranks, argv, script=ROOT / "train_sophiag.py", options=(), **environment):
    """A torchrun, with its own `options`, of a script in a process group of its own, not waited for."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*command, *options, str(script), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
    )  # fmt: skip


def ranks_of(process):
    """The process ids of the ranks that torchrun started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in children.stdout.split()]


def wait_for_step(process, step):
    """Read its output until a line of a step >= `step`; the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = re.match(r"step +(\d+)/", line)
        if found and int(found[1]) >= step:
            break
    return lines


def kill_all(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in ranks_of(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def same_end(first, second):
    a, b = load_checkpoint(first)[0], load_checkpoint(second)[0]
    assert a["step"] == b["step"]
    different = [name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])]
    assert not different
    steps = [line["step"] for line in read_lines(second)]
    assert steps == [line["step"] for line in read_lines(first)], "each step stands once"
    key = "train/loss"
    assert [line.get(key) for line in read_lines(first)] == [line.get(key) for line in read_lines(second)]


def killed_run(corpus, tmp_path, kills, seed, *argv):
    """Kill a 2-rank run `kills` times at random moments, then let it end; compare with one that was let alone."""
    run = [*RUN, f"--max_iters={20 * kills}", *argv]
    done = torchrun(2, "train_sophiag.py", [*tiny_words(corpus, tmp_path / "whole"), *run])
    assert done.returncode == 0, done.stderr
    draw, argv = random.Random(seed), [*tiny_words(corpus, tmp_path / "killed"), *run, "--init_from=auto"]
    reached = []
    for kill in range(kills):
        process = start(2, argv)
        wait_for_step(process, reached[-1] if reached else 0)  # it has begun to do something new
        time.sleep(draw.uniform(0.0, 0.15))
        ranks = ranks_of(process)
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(draw.choice(ranks), signal.SIGKILL)  # one rank dies first, torchrun and the other soon after
        time.sleep(draw.uniform(0.0, 0.1))
        kill_all(process)
        steps = [line["step"] for line in read_lines(tmp_path / "killed")]
        reached.append(max(steps, default=0))
        print(f"kill {kill + 1}: metrics up to step {max(steps, default=None)}")
    done = torchrun(2, "train_sophiag.py", argv)
    assert done.returncode == 0, done.stderr
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_three_times_loses_nothing(corpus, tmp_path):
    killed_run(corpus, tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--fsdp=True", "--optimizer_name=sophia_muon"])
def test_a_run_whose_ranks_hold_parts_of_it_loses_nothing_when_killed_twice(corpus, tmp_path, how):
    killed_run(corpus, tmp_path, 2, 2, how)


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_loses_nothing(corpus, tmp_path):
    killed_run(corpus, tmp_path, kills=100, seed=1)


def test_a_signal_to_one_rank_ends_all_well(corpus, tmp_path):
    argv = [*tiny_words(corpus, tmp_path / "stopped"), *RUN, "--max_iters=2000", "--eval_interval=1000"]
    process = start(2, argv)
    wait_for_step(process, 10)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 0, output
    checkpoint = load_checkpoint(tmp_path / "stopped")[0]
    assert 10 <= checkpoint["step"] < 1000
    assert f"stopped before step {checkpoint['step']}" in output and "SIGTERM" in output
    assert read_lines(tmp_path / "stopped")[-1]["step"] < checkpoint["step"]


def test_a_second_signal_ends_at_once(corpus, tmp_path):
    """One process that is stuck in its step (here: asleep) does not get to the end of it."""
    script = (
        "import sys, time, train_adam\nfrom training.run import Run\n"
        "Run.optimizer_step = lambda run: (print('asleep', flush=True), [time.sleep(0.2) for _ in range(300)])\n"
        "train_adam.main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *tiny_words(corpus, tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while "asleep" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 128 + signal.SIGINT
    process.stdout.close()


def test_a_dead_rank_is_named_by_one_that_hangs(corpus, tmp_path):
    """As NCCL does: the main thread of rank 0 waits for its GPU, that for rank 1, and neither notices."""
    (tmp_path / "hanging.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport time, train_adam\n"
        "from training.errors import command\nfrom training.run import Run\n"
        "Run.optimizer_step = lambda run: (print('asleep', flush=True), time.sleep(300))\n"
        "command(lambda: train_adam.main(sys.argv[1:]))"
    )
    process = start(2, tiny_words(corpus, tmp_path / "out"), script=tmp_path / "hanging.py")
    for line in process.stdout:
        if "asleep" in line:
            break
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert "error: the run ends, because rank 1 died" in output
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "of_rank_1, differing",
    [
        ("--seed=7", "seed (1337 and 7)"),
        ("--optimizer_name=soap", "optimizer_name ('adamw' and 'soap')"),  # which is refused, where all have it
    ],
)
def test_ranks_that_were_started_differently_say_so(corpus, tmp_path, of_rank_1, differing):
    argv = [*tiny_words(corpus, tmp_path / "out"), "--fsdp=True"]
    script = (
        "import os, sys, train_adam\nfrom training.errors import command\n"
        f"argv = [*sys.argv[1:], *[{of_rank_1!r}][: int(os.environ['RANK'])]]\n"
        "command(lambda: train_adam.main(argv))"
    )
    (tmp_path / "differing.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}\n")
    done = torchrun(2, tmp_path / "differing.py", argv)
    message = f"error: ranks 0 and 1 were not started alike: they differ in {differing}; make them equal.\n"
    assert done.returncode == 2 and done.stderr == message and not (tmp_path / "out").exists()


ELASTIC = ["--batch_size=2", "--lr_decay_iters=24", "--eval_interval=4", "--log_interval=2", "--hess_interval=5"]


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory):
    """Folders of a 2-rank run of 24 steps, and of its first 12."""
    folder = tmp_path_factory.mktemp("two")
    for steps in (12, 24):
        argv = [*tiny_words(corpus, folder / str(steps)), *ELASTIC, f"--max_iters={steps}"]
        done = torchrun(2, "train_sophiag.py", argv)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_goes_on_with_the_same_tokens(corpus, two_ranks, tmp_path, ranks):
    out_dir = shutil.copytree(two_ranks / "12", tmp_path / "run")
    argv = [*tiny_words(corpus, out_dir), *ELASTIC, "--max_iters=24", "--init_from=resume"]
    done = torchrun(ranks, "train_sophiag.py", argv)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [line["train/loss"] for line in read_lines(folder) if "train/loss" in line]
        for folder in (out_dir, two_ranks / "24")
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(tmp_path, ranks):
    """A file of one process, or a folder with a shard of each of three."""
    corpus, disk = write_corpus(tmp_path / "corpus"), tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        argv = [*tiny_words(corpus, disk / "out"), "--n_embd=64", "--max_iters=40"]  # a checkpoint is 1.3 MB
        argv += ["--batch_size=4", f"--fsdp={ranks > 1}"]
        filler = disk / "filler"
        process = start(ranks, argv, ROOT / "train_adam.py")
        wait_for_step(process, 11)
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        output, _ = process.communicate(timeout=60)
        assert load_checkpoint(disk / "out")[0]["step"] >= 10
        assert re.search(r"warning: the checkpoint of step \d+ could not be written .*training goes on", output), output
        assert output.count("error: the last checkpoint could not be written") == 1
        assert "Traceback" not in output.split("elastic")[0], "but for that of torchrun"
        filler.unlink()
        again = torchrun(ranks, "train_adam.py", [*argv, "--init_from=resume"])
        assert again.returncode == 0, again.stderr
        assert load_checkpoint(disk / "out")[0]["step"] == 40
        assert [line["step"] for line in read_lines(disk / "out")] == list(range(41))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.slow
def test_memory_and_files_do_not_grow(corpus, tmp_path):
    """10,000 steps of a toy run, its resident memory and open files looked at from outside."""
    argv = [*tiny_words(corpus, tmp_path / "out"), "--max_iters=10000", "--eval_interval=500", "--log_interval=50"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_adam.py"), *argv], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seen = []
    for line in process.stdout:
        if re.match(r"step +\d+000/", line):
            status = open(f"/proc/{process.pid}/status").read()
            resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            seen.append((resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
    assert process.wait() == 0
    process.stdout.close()
    print(seen)
    first, last = seen[1], seen[-2]
    assert last[0] < first[0] * 1.03 + 5000 and last[1] <= first[1] + 1


def soak(out_dir, kills, script, config):
    """A run of SOAK on two GPUs, ended `kills` times (a rank dies, all die, a signal) and started again each time."""
    draw, output_so_far = random.Random(0), []
    argv, script = [*config, *SOAK, f"--out_dir={out_dir}", "--init_from=auto"], ROOT / script
    for kill in range(kills):
        process = start(2, argv, script)
        output_so_far += wait_for_step(process, 60 * (kill + 1) + draw.randrange(30))
        how = ("one rank", "all ranks", "a signal")[kill % 3]
        if how == "all ranks":
            kill_all(process)
        else:
            os.kill(ranks_of(process)[1], signal.SIGKILL if how == "one rank" else signal.SIGTERM)
            output, _ = process.communicate(timeout=120)
            output_so_far.append(output)
            assert ("the run ends, because rank 1 died" if how == "one rank" else "stopped before step") in output
            assert (process.returncode == 0) == (how == "a signal")
        print(f"{out_dir.name}: {how} ended, metrics up to step {read_lines(out_dir)[-1]['step']}", flush=True)
    process = start(2, argv, script)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, "".join(output_so_far) + output
    return {line["step"]: line["train/loss"] for line in read_lines(out_dir) if "train/loss" in line}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "run",
    [
        ("train_sophiag.py", ["config/train_gpt2_small_sophiag.py", "--beta1=0.9"]),
        ("train_adam.py", ["config/train_gpt2_small_muon.py", "--optimizer_name=whitened_muon"]),
    ],
    ids=["sophiag", "whitened_muon"],
)
def test_soak_on_two_gpus(tmp_path, run):
    """GPT-2 of 124M killed and resumed five times; two runs that were let alone say what bf16 and atomics differ by."""
    with ThreadPoolExecutor() as pool:  # they share the GPUs: most of a restart is the host's work
        killed = pool.submit(soak, tmp_path / "killed", 5, *run)
        alone = pool.submit(lambda: [soak(tmp_path / name, 0, *run) for name in ("whole", "again")])
    killed, (whole, again) = killed.result(), alone.result()
    assert list(killed) == list(whole) == list(again)
    noise, difference = ([abs(a[step] - b[step]) for step in whole] for a, b in ((again, whole), (killed, whole)))
    for step in list(whole)[:: len(whole) // 10]:
        print(f"step {step}: whole {whole[step]:.5f}, again {again[step]:.5f}, killed {killed[step]:.5f}")
    print(f"largest difference: {max(difference):.5f}; of two runs let alone: {max(noise):.5f}")
    assert max(difference) <= 2 * max(noise) + 1e-3
