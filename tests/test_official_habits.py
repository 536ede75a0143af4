"""The experiment that trains with the official Sophia-G: its habits, and a stand-in for the official class."""

import importlib

import pytest
import torch

import train_sophiag
from tests.conftest import read_lines
from training.errors import UserError
from training.run import Run

official = importlib.import_module("experiments.30m_official.official")
main = official.main
OFFICIAL = """
import torch

class SophiaG(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, rho, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay))

    def each(self):
        for group in self.param_groups:
            for p in group["params"]:
                for key in ("exp_avg", "hessian"):
                    self.state[p].setdefault(key, torch.zeros_like(p))
                yield group, p, self.state[p]

    @torch.no_grad()
    def update_hessian(self):
        for group, p, state in self.each():
            state["hessian"].lerp_(p.grad**2, 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group, p, state in self.each():
            p.mul_(1 - group["lr"] * group["weight_decay"])
            m = state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
            ratio = (m.abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(max=1)
            p.add_(m.sign() * ratio, alpha=-group["lr"])
"""


@pytest.fixture
def words(tiny):
    return [*tiny, "--max_iters=12", "--hess_interval=3", "--learning_rate=1e-2", "--rho=0.5", "--eval_interval=4",
            "--overwrite=True"]  # fmt: skip


def losses(words):
    return [line["val/loss"] for line in read_lines(next(w for w in words if "out_dir" in w).partition("=")[2])
            if "val/loss" in line]  # fmt: skip


def test_the_official_class_trains_as_ours_with_its_habits(words, tmp_path):
    (tmp_path / "sophia.py").write_text(OFFICIAL)
    main(words)
    ours = losses(words)
    main([*words, f"--official={tmp_path / 'sophia.py'}"])
    assert len(ours) == 4 and losses(words) == pytest.approx(ours, abs=2e-6)
    train_sophiag.main(words)
    assert losses(words) != pytest.approx(ours, abs=1e-4), "the habits change something"


def test_the_habits_are_those_that_the_readme_names(words, monkeypatch):
    """Estimates after steps 2, 5, ..., of the next step's complete batch, with a clipped gradient."""
    done, seen = [], []
    curvature_step, optimizer_step = Run.curvature_step, Run.optimizer_step

    def watch_estimate(run, step):
        done.append(("estimate of", step, run.config.hess_bs == run.config.total_bs))
        inner = torch.nn.utils.clip_grad_norm_

        def watch_clip(parameters, limit, *others, **options):
            seen.append(limit)
            return inner(parameters, limit, *others, **options)

        monkeypatch.setattr(official, "clip_grad_norm_", watch_clip)
        curvature_step(run, step)

    def watch_step(run):
        done.append("step")
        optimizer_step(run)

    monkeypatch.setattr(Run, "curvature_step", watch_estimate)
    monkeypatch.setattr(Run, "optimizer_step", watch_step)
    main([*words, "--max_iters=6", "--grad_clip=0.25"])
    steps = ["step"] * 3
    assert done == [*steps, ("estimate of", 3, True), *steps, ("estimate of", 6, True)] and seen == [0.25, 0.25]


@pytest.mark.parametrize("word", ["--bias_correction=True", "--optimizer_name=sophiah", "--adamw_for=embeddings"])
def test_what_the_official_code_does_not_know_is_refused(words, word):
    with pytest.raises(UserError, match="official code"):
        main([*words, word])
