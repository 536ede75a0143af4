"""The optimizers of the registry: what a step does, containers, states from checkpoints of any age."""

import math

import pytest
import torch

from train_adam import AdamConfig
from training.optimizers import (
    make_optimizer,
)

CPU = torch.device("cpu")


def groups():
    torch.manual_seed(0)
    shapes = {"matrices": [(24, 8), (32, 8), (8, 8)], "embeddings": [(16, 8)], "scalars": [(8,)]}
    decay = {"matrices": 0.1, "embeddings": 0.0, "scalars": 0.0}
    made = []
    for name, sizes in shapes.items():
        params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
        for p in params:
            p.grad = torch.randn(p.shape)
        made.append({"name": name, "params": params, "weight_decay": decay[name]})
    made[0]["split"] = [3, 1, 1]
    return made


def stepped(name, rate, steps=1, **settings):
    """(parameters before, after, gradients) by group of `steps` steps on the same gradients."""
    made = groups()
    optimizer = make_optimizer(AdamConfig(optimizer_name=name, **settings), made, CPU)
    for group in optimizer.param_groups:
        group["lr"] = rate
    before = {g["name"]: [p.detach().clone() for p in g["params"]] for g in made}
    for _ in range(steps):
        optimizer.step()
    return before, {g["name"]: g["params"] for g in made}, {g["name"]: [p.grad for p in g["params"]] for g in made}


def test_sgd_is_nesterovs():
    """v = mu v + g, p <- p - lr (g + mu v): two steps on one g move lr (g (1 + mu) + g (1 + mu (mu + 1)))."""
    before, after, grads = stepped("sgd", 0.1, steps=2, momentum=0.9)
    moved = 0.1 * grads["embeddings"][0] * (1 + 0.9 + 1 + 0.9 * 1.9)
    torch.testing.assert_close(after["embeddings"][0].detach(), before["embeddings"][0] - moved)


def test_nadamw_looks_ahead_and_its_decay_is_decoupled():
    """torch's, with the first of Dozat's momenta mu_t = beta1 (1 - 0.96^(0.004 t) / 2)."""
    before, after, grads = stepped("nadamw", 0.01)
    mu = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2)]
    for name, decay in (("matrices", 0.1), ("scalars", 0.0)):
        p, g = before[name][0], grads[name][0]
        moved = (mu[1] * 0.1 / (1 - mu[0] * mu[1]) + (1 - mu[0]) / (1 - mu[0])) * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after[name][0].detach(), p * (1 - 0.01 * decay) - 0.01 * moved)


def test_lion_is_the_sign_and_its_decay_is_decoupled():
    before, after, grads = stepped("lion", 0.01, beta1=0.9, beta2=0.99)
    for name, decay in (("matrices", 0.1), ("scalars", 0.0)):
        expected = before[name][0] * (1 - 0.01 * decay) - 0.01 * grads[name][0].sign()
        torch.testing.assert_close(after[name][0].detach(), expected)


def test_muon_moves_matrices_orthogonally_and_the_rest_as_adamw():
    rate = 0.01
    before, after, _ = stepped("muon", rate)
    for p, q in zip(before["matrices"], after["matrices"], strict=True):
        update = (p * (1 - rate * 0.1) - q.detach()) / rate
        assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3), "the root mean square of AdamW's"
        for block in update.split(8) if len(update) == 24 else [update]:  # query, key and value
            singular = torch.linalg.svdvals(block) / (0.2 * math.sqrt(max(block.shape)))
            assert singular.min() > 0.5 and singular.max() < 1.5, "Newton-Schulz as torch has it ends in (0.5, 1.5)"
    _, adamw, _ = stepped("adamw", rate)
    assert torch.equal(after["embeddings"][0], adamw["embeddings"][0])
    assert torch.equal(after["scalars"][0], adamw["scalars"][0])


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


def test_muon_has_the_matrices_and_frees_all_gradients():
    made = groups()
    optimizer = make_optimizer(AdamConfig(optimizer_name="muon"), made, CPU)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "embeddings", "scalars"]
    assert [list(p.shape) for p in optimizer.optimizers["muon"].state] == [[8, 8]] * 3 + [[32, 8], [8, 8]]
    assert [sorted(optimizer.state[p]) for p in optimizer.optimizers["muon"].state] == [["momentum_buffer"]] * 5
    others = [sorted(optimizer.state[p]) for group in made[1:] for p in group["params"]]
    assert others == [["exp_avg", "exp_avg_sq", "step"]] * 2
    optimizer.zero_grad()
    assert all(p.grad is None for group in made for p in group["params"])
