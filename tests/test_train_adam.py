"""Runs with the first-order optimizers: resuming is exact, and all of them train."""

import json
import sys

import pytest
import torch

import train_adam
from tests.conftest import ROOT, interrupt, read_lines, write_corpus
from train_adam import AdamConfig
from training.checkpoint import read_checkpoint
from training.config import load_config
from training.errors import command
from training.run import Run

TIMES = ("seconds", "tokens_per_second", "memory_gib")
RATES = {"sgd": 0.3, "lion": 3e-4, "muon": 1e-3, "whitened_muon": 1e-3, "nadamw": 1e-3, "soap": 1e-3}


def argv(tiny, name):
    return [*tiny, f"--optimizer_name={name}", f"--learning_rate={RATES[name]}", "--max_iters=30", "--log_interval=1"]


def tensors(state):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in inside for tensor in tensors(value)]


@pytest.mark.parametrize("name", RATES)
def test_resume_equals_the_uninterrupted_run(tiny, tmp_path, monkeypatch, name):
    arguments = [*argv(tiny, name), "--dropout=0.1", "--grad_clip=0.5"]
    train_adam.main([*arguments, f"--out_dir={tmp_path / 'whole'}"])
    interrupt(monkeypatch, train_adam.main, [*arguments, f"--out_dir={tmp_path / 'broken'}"], steps=17)
    torch.manual_seed(99)
    train_adam.main([*arguments, f"--out_dir={tmp_path / 'broken'}", "--init_from=resume"])
    streams = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_lines(tmp_path / run)]
        for run in ("whole", "broken")
    ]
    assert streams[0] == streams[1] and streams[0][-1]["step"] == 30
    assert all(line["momentum_norm"] > 0 for line in streams[0][:-1])
    first, second = (read_checkpoint(tmp_path / run / "ckpt.pt") for run in ("whole", "broken"))
    for part in ("model", "optimizer"):
        pairs = list(zip(tensors(first[part]), tensors(second[part]), strict=True))
        assert len(pairs) > 10 and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", RATES)
def test_it_learns(tiny, tmp_path, name):
    """Eight tokens of 64 occur: from log(64) = 4.2 towards log(8) = 2.1."""
    corpus = write_corpus(tmp_path / "corpus", vocab_size=8)
    (corpus / "meta.json").write_text('{"vocab_size": 64, "tokenizer": "gpt2"}')
    rate = {"sgd": RATES["sgd"]}.get(name, 1e-2)
    train_adam.main([*argv(tiny, name), f"--dataset={corpus}", f"--learning_rate={rate}"])
    val = [line["val/loss"] for line in read_lines(tmp_path / "out") if "val/loss" in line]
    assert val[0] > 4 and val[-1] < 2.6


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_notes_whether_it_shared_its_device(tiny, tmp_path, monkeypatch, shared):
    monkeypatch.delenv("SHARED_DEVICE", raising=False)
    if shared:
        monkeypatch.setenv("SHARED_DEVICE", "1")
    train_adam.main([*tiny, "--max_iters=3"])
    monkeypatch.delenv("SHARED_DEVICE", raising=False)
    config = tmp_path / "out" / "config.json"
    assert json.loads(config.read_text())["shared_device"] is shared
    train_adam.main([*tiny, "--max_iters=5", "--init_from=resume"])  # its seconds go on from those of the first part
    assert json.loads(config.read_text())["shared_device"] is shared


@pytest.mark.parametrize("name", RATES)
def test_embeddings_have_a_rate_of_their_own(tiny, tmp_path, monkeypatch, name):
    """Ten times the rate moves the embeddings ten times as far in the first step, and nothing else."""
    moved, optimizer_step = [], Run.optimizer_step

    def watched(run):
        before = [p.detach().clone() for p in run.model.parameters()]
        optimizer_step(run)
        named = zip(before, run.model.named_parameters(), strict=True)
        moved.append({name: (p.detach() - old).norm().item() for old, (name, p) in named})

    monkeypatch.setattr(Run, "optimizer_step", watched)
    settings = ["--learning_rate=1e-3", "--max_iters=1", "--decay_lr=False"]
    train_adam.main([*argv(tiny, name), *settings])
    train_adam.main([*argv(tiny, name), *settings, "--embedding_lr=1e-2", "--overwrite=True"])
    for parameter in moved[0]:
        times = 10 if ".wte." in parameter or ".wpe." in parameter else 1
        assert moved[1][parameter] == pytest.approx(times * moved[0][parameter], rel=1e-3), parameter


@pytest.mark.parametrize(
    "name, module, package",
    [("lion", "lion_pytorch.foreach", "lion_pytorch"), ("soap", "pytorch_optimizer", "pytorch_optimizer")],
)
def test_a_package_that_is_missing(tiny, monkeypatch, capsys, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):
        command(lambda: train_adam.main(argv(tiny, name)))
    assert f"pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["30m", "small"])
@pytest.mark.parametrize("name", ["sgd", "lion", "muon"])
def test_baselines_differ_from_adamw_in_the_optimizer_only(size, name):
    ours, theirs = (
        vars(load_config(AdamConfig, [str(ROOT / f"config/train_gpt2_{size}_{optimizer}.py")]))
        for optimizer in (name, "adam")
    )
    assert ours["optimizer_name"] == name
    differing = {key for key in ours if ours[key] != theirs[key]}
    of_optimizer = {"optimizer_name", "learning_rate", "min_lr", "weight_decay", "beta1", "beta2", "momentum"}
    assert differing <= of_optimizer | {"out_dir"}
