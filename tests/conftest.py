"""What the tests share: a tiny corpus and model, and ways to start a training script as a person would."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# As torchrun does, and before torch reads it: ranks that are forked from here must round as torchrun's do.
os.environ["OMP_NUM_THREADS"] = "1"
import torch

from tests.forks import run_ranks
from training.monitor import Signals

ROOT = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, and children would too
torch.set_num_threads(1)  # the workers of pytest-xdist share the cores
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton


@pytest.fixture(autouse=True)
def give_signals_back():
    """A run that was stopped keeps them to its end."""
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in Signals.NAMES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_corpus(folder, n_train=6000, n_val=700, vocab_size=64, seed=0):
    """Random tokens as train.bin, val.bin and meta.json."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", n_train), ("val", n_val)):
        generator.integers(0, vocab_size, n).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "tokenizer": "gpt2"}))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(corpus, tmp_path):
    """Command-line words of a run that takes a second; its out_dir is tmp_path / "out"."""
    return tiny_words(corpus, tmp_path / "out")


def tiny_words(corpus, out_dir):
    settings = {
        "dataset": corpus, "out_dir": out_dir, "device": "cpu",
        "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "total_bs": 24, "batch_size": 12,
        "max_iters": 30, "warmup_iters": 3, "learning_rate": 1e-3, "eval_interval": 10, "log_interval": 1,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in settings.items()]


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, main, argv, steps):
    """Run `main(argv)` until it ends by an exception after `steps` updates, in the step after them."""
    from training.run import Run

    optimizer_step, calls = Run.optimizer_step, []

    def fails(run):
        calls.append(run)
        if len(calls) == steps + 1:
            raise Interrupted
        optimizer_step(run)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "optimizer_step", fails)
        main(argv)


def losses(out_dir):
    return [line["train/loss"] for line in read_lines(out_dir) if "train/loss" in line]


def read_lines(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def torchrun(ranks, script, words, timeout=120):
    """Run a script of this project on `ranks` processes, as torchrun does; the finished process, its output as text.

    torchrun itself takes ten seconds more on one core. `tests.test_crash.start` starts it, where a test is of it.
    """
    script, words = str(ROOT / script), list(map(str, words))
    if "--device=cuda" not in words:
        return run_ranks(ranks, script, words, timeout)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        script,
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
