"""SophiaG against the official implementation itself, which is not part of this repository:

OFFICIAL_SOPHIA=path/to/checkout/of/Liuhong99/Sophia python -m pytest -s tests/test_sophia_official.py
"""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sophia import SophiaG, sampled_label_loss

FOLDER = os.environ.get("OFFICIAL_SOPHIA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="OFFICIAL_SOPHIA does not name a checkout of the official code")
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
STEPS, MICRO_BATCHES, INTERVAL = 50, 4, 5


def official_class():
    spec = importlib.util.spec_from_file_location("official_sophia", Path(FOLDER) / "sophia.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SophiaG


class Net(nn.Module):
    """Parameters with 0 to 4 dimensions, none of a size that a kernel likes, one that is tied."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 10)
        self.convolution = nn.Conv2d(1, 3, (3, 5), padding="same")
        self.hidden, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):  # (B, T) -> (B, T, 13)
        t = self.embedding(x)
        t = self.gain * t + self.convolution(t[:, None]).mean(1)
        return self.norm(torch.tanh(self.hidden(t))) @ self.embedding.weight.T


def train(model, optimizer, dtype):
    """Both get an estimate every 5 steps and each step from 4 micro-batches; the learning rate changes."""
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        batches = torch.randint(13, (MICRO_BATCHES, 6, 7), generator=generator)
        uniform = torch.rand(MICRO_BATCHES, 6, 7, generator=generator)
        if step % INTERVAL == 0:
            for x, u in zip(batches, uniform, strict=True):
                (sampled_label_loss(model(x), uniform=u) / MICRO_BATCHES).backward()
            optimizer.update_hessian()
            optimizer.zero_grad()
        for x in batches:
            loss = F.cross_entropy(model(x).flatten(0, 1), ((x + 1) % 13).flatten())
            (loss / MICRO_BATCHES).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / (2 * STEPS))
        optimizer.step(bs=batches.numel())
        optimizer.zero_grad()
    return loss.item()


def largest_difference(ours, theirs):
    differences = {}
    for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        mine, other = ours[1].state[p], theirs[1].state[q]
        for key, a, b in (("p", p, q), *((key, mine[key], other[key]) for key in ("exp_avg", "hessian", "step"))):
            size = b.abs().max().clamp(min=1e-30)
            differences[key] = max(differences.get(key, 0.0), float((a - b).abs().max() / size))
    return differences


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda value: next(iter(value)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.5, "rho": 1.0, "betas": (0.9, 0.9)}, {"maximize": True}])
def test_50_steps_end_where_the_official_ones_do(implementation, dtype, options):
    ends = []
    for cls, settings in ((SophiaG, implementation), (official_class(), {})):
        torch.manual_seed(0)
        model = Net().to(dtype)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = cls([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.01, **options, **settings)
        loss = train(model, optimizer, dtype)
        ends.append((model, optimizer, loss))
    differences = largest_difference(*ends)
    print(f"\n{dtype} {implementation} {options}: largest difference relative to the largest number {differences}")
    assert max(differences.values()) < (1e-11 if dtype == torch.float64 else 2e-4)
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-4)
    if "rho" in options:
        assert ends[0][2] < 1.0 and 0.05 < ends[0][1].statistics(bs=168)["win_rate"] < 0.95


def test_state_dicts_load_both_ways():
    ends, cls = [], official_class()
    for first, second in ((cls, SophiaG), (SophiaG, cls), (cls, cls)):
        torch.manual_seed(0)
        model = Net()
        optimizer = first(model.parameters(), lr=0.01)
        train(model, optimizer, torch.float32)
        resumed = second(model.parameters(), lr=0.01)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, resumed, torch.float32)
        ends.append((model, resumed))
    for end in ends[:2]:
        assert max(largest_difference(end, ends[2]).values()) < 5e-4
