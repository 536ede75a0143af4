"""The optimizers of the registry: what a step does, containers, states from checkpoints of any age."""

import copy
import math
import pickle

import pytest
import torch

from sophia import SophiaG
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.optimizers import (
    FIRST_ORDER,
    OptimizerContainer,
    load_state,
    make_optimizer,
    second_order,
    split_qkv,
    statistics,
)  # fmt: skip

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
    assert [sorted(optimizer.state[p]) for p in made[0]["params"]] == [["momentum_buffer"]] * 3
    others = [sorted(optimizer.state[p]) for group in made[1:] for p in group["params"]]
    assert others == [["exp_avg", "exp_avg_sq", "step"]] * 2
    optimizer.zero_grad()
    assert all(p.grad is None for group in made for p in group["params"])


@pytest.mark.parametrize("name", ["whitened_muon", "sophia_muon"])
def test_the_whitening_settings_reach_the_optimizer(name):
    whitening = {"sides": "input", "exponent": 0.25, "ridge": 0.02, "decay": 0.9, "max_width": 4}
    settings = {f"whiten_{key}": value for key, value in whitening.items()} | {"whiten_interval": 7}
    config_class = SophiaConfig if name == "sophia_muon" else AdamConfig
    optimizer = make_optimizer(config_class(optimizer_name=name, cautious_decay=True, **settings), groups(), CPU)
    group = optimizer.optimizers["muon"].param_groups[0]
    expected = whitening | {"cautious": True, "split": [3, 1, 1]}
    expected |= {"source": "update_factors"} if name == "sophia_muon" else {"source": "gradient", "interval": 7}
    assert {key: group[key] for key in expected} == expected


def test_muons_state_of_blocks_from_older_checkpoints_is_joined():
    """They kept query, key and value as three parameters, the momentum in torch.optim.Muon's state."""
    made = groups()
    blocks = [
        torch.nn.Parameter(b) for p, n in zip(made[0]["params"], [3, 1, 1], strict=True) for b in p.detach().chunk(n)
    ]
    former = torch.optim.Muon(blocks)
    for b in blocks:
        b.grad = torch.randn(b.shape)
    former.step()
    optimizer = make_optimizer(AdamConfig(optimizer_name="muon"), made, CPU)
    load_state(optimizer, {"muon": former.state_dict(), "adamw": optimizer.optimizers["adamw"].state_dict()}, {})
    buffers = [former.state[b]["momentum_buffer"] for b in blocks]
    for p, expected in zip(made[0]["params"], (torch.cat(buffers[:3]), *buffers[3:]), strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], expected)
    assert optimizer.param_groups[0]["momentum"] == 0.95 and optimizer.param_groups[0]["split"] == [3, 1, 1]


def spoil(part, what):
    """Change the state_dict of an optimizer as damage or another program could."""
    first, *_ = part["state"]
    if what == "nothing":
        part["state"].clear()
    elif what == "unknown":
        part["state"][99] = part["state"].pop(first)
    elif what == "fewer":
        part["param_groups"][0]["params"].pop()
    elif what == "one":
        del part["state"][first]
    else:
        part["state"][first].pop(what)


@pytest.mark.parametrize(
    "name, what",
    [(name, what) for name in FIRST_ORDER for what in ("one", "fewer", "unknown")]
    + [(name, "nothing") for name in FIRST_ORDER if name != "sgd"]  # which has none if momentum = 0
    + [("whitened_muon", key) for key in ("momentum_buffer", "left_factor", "right_root")],
)
def test_a_state_that_is_not_complete_is_refused(name, what):
    """It would begin again at 0, silently."""
    made, optimizer = [make_optimizer(AdamConfig(optimizer_name=name), groups(), CPU) for _ in range(2)]
    for group in made.param_groups:
        group["lr"] = 0.1
    made.step()
    made.step()
    complete = copy.deepcopy(made.state_dict())
    load_state(optimizer, copy.deepcopy(complete), {}, step=2)
    spoil(complete if "state" in complete else complete[next(iter(complete))], what)
    with pytest.raises((ValueError, KeyError)):
        load_state(optimizer, complete, {}, step=2)


def test_a_matrix_is_split_by_the_setting_and_not_by_its_shape():
    made = groups()
    del made[0]["split"]
    optimizer = make_optimizer(AdamConfig(optimizer_name="soap"), made, CPU)
    optimizer.step()
    assert [list(p.shape) for p in optimizer.optimizers["soap"].state] == [[24, 8], [32, 8], [8, 8]]
    assert [tuple(block.shape) for block in split_qkv(torch.zeros(24, 8), 3)] == [(8, 8)] * 3
    assert [tuple(block.shape) for block in split_qkv(torch.zeros(24, 8), (12, 6, 6))] == [(12, 8), (6, 8), (6, 8)]


# ----- containers


def container():
    made = groups()
    sophia = SophiaG(made[:1], lr=1e-2, betas=(0.9, 0.9), rho=0.1)
    return made, OptimizerContainer(sophia=sophia, adamw=torch.optim.AdamW(made[1:], lr=1e-2, fused=True))


def test_a_container_goes_on_from_its_state_dict_with_the_rates_of_its_groups():
    made, optimizer = container()
    second_order(optimizer)[0].update_hessian()
    optimizer.step(bs=10)
    again, restored = container()
    for group, group_again in zip(made, again, strict=True):
        for p, q in zip(group["params"], group_again["params"], strict=True):
            q.data.copy_(p.data)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(restored, torch.optim.Optimizer) and list(restored.state_dict()) == ["sophia", "adamw"]
    for both in (optimizer, restored):
        for group in both.param_groups:
            group["lr"] = 3e-2
        both.step(bs=10)
    for group, group_again in zip(made, again, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], group_again["params"], strict=True))
    assert {group["lr"] for part in restored.optimizers.values() for group in part.param_groups} == {3e-2}
    assert len(restored.state) == 5
    restored.zero_grad()
    assert all(p.grad is None for group in again for p in group["params"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_container_goes_on_as_the_original(how):
    _, optimizer = container()
    optimizer.step(bs=10)
    other = how(optimizer)
    for each in (optimizer, other):
        for group in each.param_groups:
            group["lr"] = 3e-2
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        each.step(bs=10)
    for group, copied in zip(optimizer.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], copied["params"], strict=True):
            assert torch.equal(p, q) and p is not q


def test_a_container_refuses_a_group_that_nobody_would_step_and_the_state_of_another():
    made, optimizer = container()
    with pytest.raises(RuntimeError, match="add the group to one of the optimizers"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == len(made)
    with pytest.raises(ValueError, match="it has no 'adamw'"):
        optimizer.load_state_dict({"sophia": optimizer.state_dict()["sophia"]})
    with pytest.raises(ValueError, match="it has 'muon'"):
        optimizer.load_state_dict({**optimizer.state_dict(), "muon": {}})
    with pytest.raises(ValueError, match="two of the optimizers have the same parameter"):
        OptimizerContainer(sophia=SophiaG(made[:1]), adamw=torch.optim.AdamW(made[0]["params"]))


def test_a_containers_groups_are_those_that_its_optimizers_have_now():
    """A scheduler would set the learning rate of groups that a load of one optimizer has replaced."""
    _, optimizer = container()
    sophia, late = optimizer.optimizers["sophia"], torch.nn.Parameter(torch.ones(3))
    sophia.load_state_dict(sophia.state_dict())
    sophia.add_param_group({"params": [late], "name": "late"})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in sophia.param_groups] == [5e-3] * 2
    late.grad = torch.ones(3)
    optimizer.zero_grad()
    assert late.grad is None


@pytest.mark.parametrize("name", ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"])
def test_a_containers_hooks_are_called_for_each_optimizer(name):
    _, optimizer = container()
    seen = []
    getattr(optimizer, f"register_{name}_hook")(lambda part, *_: seen.append(part))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == list(optimizer.optimizers.values())


def test_gradscaler_steps_a_container_and_skips_all_of_it_on_infinity():
    results = []
    for scale in (None, 2.0**10):
        made, optimizer = container()
        parameters = [p for group in made for p in group["params"]]
        gradients = [p.grad.clone() for p in parameters]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for poison in (False, True, False):
            optimizer.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True))
            scaler.scale(loss * (math.inf if poison and scale else 1.0)).backward()
            before = [p.detach().clone() for p in parameters]
            if not poison or scale:
                scaler.step(optimizer, bs=10)
            scaler.update()
            moved = [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
            assert all(moved) if not poison else not any(moved)
        assert not hasattr(optimizer, "found_inf") and not hasattr(second_order(optimizer)[0], "found_inf")
        results.append([p.detach().clone() for p in parameters])
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-7)


def test_a_container_takes_a_closure_and_a_scheduler():
    _, optimizer = container()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert optimizer.step(lambda: torch.ones(()), bs=10) == 1
    scheduler.step()
    assert [group["lr"] for part in optimizer.optimizers.values() for group in part.param_groups] == [5e-3] * 3


def test_statistics_have_their_metric_names():
    config = SophiaConfig(total_bs=5, block_size=2)
    _, optimizer = container()
    second_order(optimizer)[0].update_hessian()
    optimizer.step(bs=10)
    assert {"train/win_rate", "train/win_rate/matrices", "hessian_norm"} <= statistics(config, optimizer).keys()
    assert statistics(AdamConfig(), torch.optim.AdamW(groups())) == {}
