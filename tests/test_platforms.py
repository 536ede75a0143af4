"""Windows, where parts of POSIX are missing, and macOS, where the device is mps: every script starts and trains."""

import json
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import evaluate
import sample
import train_adam
import train_sophiag
from tests.conftest import ROOT, losses, read_lines, write_corpus
from training.errors import UserError

WITHOUT = """
import os, pathlib, signal, sys
sys.path.insert(0, ROOT)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM", "SIGPIPE"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "pread", "pwrite", "sysconf", "statvfs", "getuid", "mkfifo", "killpg", "fork"):
    delattr(os, name)
import bench, compare, evaluate, export_hf, sample, sweep, train_adam, train_sophiag
import data.corpus, data.sources, experiments.collect, experiments.results
from training.errors import command
command(lambda: train_adam.main(sys.argv[2:]))
with sweep.locked(pathlib.Path(sys.argv[1])):
    pass
"""


def test_a_run_and_a_sweep_without_posix_signals_and_locks(tiny, tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT.replace("ROOT", repr(str(ROOT))))
    words = [sys.executable, tmp_path / "script.py", tmp_path / "sweep", *tiny, "--max_iters=4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "out")[-1]["step"] == 4
    first, second = done.stderr.splitlines()
    assert first.startswith("warning: ") and "run.lock cannot be locked" in first
    assert second.startswith("warning: no file locks here") and str(tmp_path / "sweep") in second


class Mps(TorchFunctionMode):
    """The CPU in the place of an mps device, which has neither float64 nor pinned memory.

    A copy to it that the host does not wait for may read memory that was freed.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, on_mps = kwargs or {}, []
        if function is torch.device:
            return function(*args, **kwargs)

        def moved(thing):
            if isinstance(thing, torch.device | str) and str(thing) == "mps":
                on_mps.append(thing)
                return torch.device("cpu")
            return thing

        args, kwargs = tree_map(moved, (args, dict(kwargs)))
        assert function not in (torch.Tensor.pin_memory, torch.Tensor.double), function
        if on_mps:
            assert torch.float64 not in (*args, *kwargs.values()) and not kwargs.get("non_blocking")
        return function(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@pytest.fixture
def mps(monkeypatch):
    """A machine whose device is mps; returns the list that grows with each wait for it."""
    waits, autocast = [], torch.autocast.__init__

    def never(name):
        def call(*arguments, **settings):
            raise AssertionError(f"torch.cuda.{name} was called")

        return call

    def checked(self, device_type, *arguments, **settings):
        assert device_type == "mps" or not settings.get("enabled", True)
        autocast(self, device_type, *arguments, **settings)

    for name in (
        "synchronize",
        "empty_cache",
        "max_memory_allocated",
        "reset_peak_memory_stats",
        "set_device",
        "current_stream",
        "get_device_properties",
        "get_device_name",
        "get_rng_state",
        "set_rng_state",
        "is_bf16_supported",
        "Stream",
        "CUDAGraph",
    ):
        monkeypatch.setattr(torch.cuda, name, never(name))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.autocast, "__init__", checked)
    with Mps():
        yield waits


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag", "sophiah"])
def test_a_run_on_mps_makes_no_call_for_cuda(tiny, tmp_path, mps, monkeypatch, optimizer, capsys):
    script = train_sophiag if optimizer.startswith("sophia") else train_adam
    made, make = [], script.make_optimizer
    monkeypatch.setattr(script, "make_optimizer", lambda *arguments: made.append(make(*arguments)) or made[-1])
    words = ["--device=auto", f"--optimizer_name={optimizer}", "--lr_decay_iters=12", "--batch_size=auto"]
    folder = write_corpus(tmp_path / "corpus")
    meta = {"vocab_size": 64, "tokenizer": {"characters": "".join(map(chr, range(64, 128)))}}
    (folder / "meta.json").write_text(json.dumps(meta))
    words = [*tiny, f"--dataset={folder}", *words]
    for start, steps in (("scratch", 6), ("resume", 12)):
        script.main([*words, f"--init_from={start}", f"--max_iters={steps}"])
    config = read_config(tmp_path / "out")
    assert (config["device"], config["dtype"]) == ("mps", "float32") and len(mps) >= 4
    assert not any(optimizer.defaults.get("fused") for optimizer in made)
    assert len(losses(tmp_path / "out")) == 12 and "memory_gib" not in read_lines(tmp_path / "out")[-2]
    sample.main([f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=3", "--start=A"])
    evaluate.main([f"--out_dir={tmp_path / 'out'}", "--dtype=bfloat16"])
    assert "float32 on mps" in capsys.readouterr().out


def read_config(folder):
    return json.loads((folder / "config.json").read_text())["config"]


@pytest.mark.parametrize("words", [["--dtype=float16"], ["--fp8=True"]])
def test_what_mps_cannot_do_is_refused(tiny, mps, words):
    with pytest.raises(UserError):
        train_adam.main([*tiny, "--device=mps", *words])


def test_mps_takes_one_process(tiny, mps, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="works in one process"):
        train_adam.main([*tiny, "--device=mps"])
