"""The first-order optimizers in the loop: what a step does, that resuming is exact, and that all of them train."""

import json
import math
import sys

import pytest
import torch

import train_adam
from tests.conftest import ROOT, read_lines, write_corpus
from train_adam import AdamConfig, make_optimizer
from training.checkpoint import read_checkpoint
from training.config import load_config
from training.errors import command
from training.run import Run

TIMES = ("seconds", "tokens_per_second", "memory_gib")
RATES = {"sgd": 0.3, "lion": 3e-4, "muon": 1e-3, "nadamw": 1e-3, "soap": 1e-3}


def words(tiny, name):
    return [*tiny, f"--optimizer_name={name}", f"--learning_rate={RATES[name]}", "--max_iters=30", "--log_interval=1"]


def tensors(state):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in inside for tensor in tensors(value)]


@pytest.mark.parametrize("name", RATES)
def test_resume_equals_the_uninterrupted_run(tiny, tmp_path, monkeypatch, name):
    arguments = [*words(tiny, name), "--dropout=0.1", "--grad_clip=0.5"]
    train_adam.main([*arguments, f"--out_dir={tmp_path / 'whole'}"])
    clip, calls = Run.clip_gradients, []

    def fails_at_17(run):
        calls.append(run)
        if len(calls) == 18:
            raise InterruptedError
        clip(run)

    monkeypatch.setattr(Run, "clip_gradients", fails_at_17)
    with pytest.raises(InterruptedError):
        train_adam.main([*arguments, f"--out_dir={tmp_path / 'broken'}"])
    monkeypatch.setattr(Run, "clip_gradients", clip)
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
    train_adam.main([*words(tiny, name), f"--dataset={corpus}", f"--learning_rate={rate}"])
    val = [line["val/loss"] for line in read_lines(tmp_path / "out") if "val/loss" in line]
    assert val[0] > 4 and val[-1] < 2.6


def groups():
    torch.manual_seed(0)
    shapes = {"matrices": [(24, 8), (32, 8), (8, 8)], "embeddings": [(16, 8)], "vectors": [(8,)]}
    decay = {"matrices": 0.1, "embeddings": 0.0, "vectors": 0.0}
    made = []
    for name, sizes in shapes.items():
        params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
        for p in params:
            p.grad = torch.randn(p.shape)
        made.append({"name": name, "params": params, "weight_decay": decay[name]})
    return made


def stepped(name, rate, steps=1, **settings):
    """(parameters before, after, gradients) by group of `steps` steps on the same gradients."""
    made = groups()
    optimizer = make_optimizer(AdamConfig(optimizer_name=name, **settings), made, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = rate
    before = {g["name"]: [p.detach().clone() for p in g["params"]] for g in made}
    for _ in range(steps):
        optimizer.step()
    return before, {g["name"]: g["params"] for g in made}, {g["name"]: [p.grad for p in g["params"]] for g in made}


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


def test_sgd_is_nesterovs():
    """v = mu v + g, p <- p - lr (g + mu v): two steps on one g move lr (g (1 + mu) + g (1 + mu (mu + 1)))."""
    before, after, grads = stepped("sgd", 0.1, steps=2, momentum=0.9)
    moved = 0.1 * grads["embeddings"][0] * (1 + 0.9 + 1 + 0.9 * 1.9)
    torch.testing.assert_close(after["embeddings"][0].detach(), before["embeddings"][0] - moved)


def test_nadamw_looks_ahead_and_its_decay_is_decoupled():
    """torch's, with the first of Dozat's momenta mu_t = beta1 (1 - 0.96^(0.004 t) / 2)."""
    before, after, grads = stepped("nadamw", 0.01)
    mu = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2)]
    for name, decay in (("matrices", 0.1), ("vectors", 0.0)):
        p, g = before[name][0], grads[name][0]
        moved = (mu[1] * 0.1 / (1 - mu[0] * mu[1]) + (1 - mu[0]) / (1 - mu[0])) * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after[name][0].detach(), p * (1 - 0.01 * decay) - 0.01 * moved)


def test_lion_is_the_sign_and_its_decay_is_decoupled():
    before, after, grads = stepped("lion", 0.01, beta1=0.9, beta2=0.99)
    for name, decay in (("matrices", 0.1), ("vectors", 0.0)):
        expected = before[name][0] * (1 - 0.01 * decay) - 0.01 * grads[name][0].sign()
        torch.testing.assert_close(after[name][0].detach(), expected)


def test_muon_moves_matrices_orthogonally_and_the_rest_as_adamw():
    rate = 0.01
    before, after, _ = stepped("muon", rate)
    for p, q in zip(before["matrices"], after["matrices"], strict=True):
        update = (p * (1 - rate * 0.1) - q.detach()) / rate
        assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3), "the root mean square of AdamW's"
        for piece in update.split(8) if len(update) == 24 else [update]:  # query, key and value
            singular = torch.linalg.svdvals(piece) / (0.2 * math.sqrt(max(piece.shape)))
            assert singular.min() > 0.5 and singular.max() < 1.5, "Newton-Schulz as torch has it ends in (0.5, 1.5)"
    _, adamw, _ = stepped("adamw", rate)
    assert torch.equal(after["embeddings"][0], adamw["embeddings"][0])
    assert torch.equal(after["vectors"][0], adamw["vectors"][0])


def test_soap_moves_matrices_by_adam_in_an_eigenbasis_and_the_rest_as_adamw():
    """Its first call only makes the bases; the next moves along the eigenvectors by about the rate."""
    rate = 0.01
    before, after, grads = stepped("soap", rate, steps=2)
    for p, q, g in zip(before["matrices"], after["matrices"], grads["matrices"], strict=True):
        for old, new, gradient in zip(*(x.split(8) if len(x) == 24 else [x] for x in (p, q.detach(), g)), strict=True):
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            moved = (left.T @ (old * (1 - rate * 0.1) - new) @ right.T).diagonal()
            torch.testing.assert_close(moved, torch.full((8,), rate), rtol=0.05, atol=0)
    _, adamw, _ = stepped("adamw", rate, steps=2)
    assert torch.equal(after["embeddings"][0], adamw["embeddings"][0])


@pytest.mark.parametrize("name", RATES)
def test_embeddings_have_a_rate_of_their_own(tiny, tmp_path, monkeypatch, name):
    """Ten times the rate moves the embeddings ten times as far in the first step, and nothing else."""
    moved, apply = [], Run.apply

    def watched(run, method, **arguments):
        before = [p.detach().clone() for p in run.model.parameters()]
        apply(run, method, **arguments)
        named = zip(before, run.model.named_parameters(), strict=True)
        moved.append({name: (p.detach() - old).norm().item() for old, (name, p) in named})

    monkeypatch.setattr(Run, "apply", watched)
    settings = ["--learning_rate=1e-3", "--max_iters=1", "--decay_lr=False"]
    train_adam.main([*words(tiny, name), *settings])
    train_adam.main([*words(tiny, name), *settings, "--embedding_lr=1e-2", "--overwrite=True"])
    for parameter in moved[0]:
        times = 10 if ".wte." in parameter or ".wpe." in parameter else 1
        assert moved[1][parameter] == pytest.approx(times * moved[0][parameter], rel=1e-3), parameter


def test_muon_has_the_matrices_and_frees_all_gradients():
    made = groups()
    optimizer = make_optimizer(AdamConfig(optimizer_name="muon"), made, fused=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "embeddings", "vectors"]
    assert [list(p.shape) for p in optimizer.parts["muon"].state] == [[8, 8]] * 3 + [[32, 8], [8, 8]]
    assert [sorted(optimizer.state[p]) for p in optimizer.parts["muon"].state] == [["momentum_buffer"]] * 5
    others = [sorted(optimizer.state[p]) for group in made[1:] for p in group["params"]]
    assert others == [["exp_avg", "exp_avg_sq", "step"]] * 2
    optimizer.zero_grad()
    assert all(p.grad is None for group in made for p in group["params"])


@pytest.mark.parametrize(
    "name, module, package",
    [("lion", "lion_pytorch.foreach", "lion-pytorch"), ("soap", "pytorch_optimizer", "pytorch_optimizer")],
)
def test_a_package_that_is_missing(tiny, monkeypatch, capsys, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):
        command(lambda: train_adam.main(words(tiny, name)))
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
