"""Sophia for the matrices and AdamW for the rest, as one optimizer of a run."""

import copy

import pytest
import torch

import train_sophiag
from tests.conftest import read_lines
from training.checkpoint import load_checkpoint
from training.errors import UserError
from training.run import Run

ADAMW_FOR = ["--adamw_for=embeddings+vectors", "--adamw_lr=4e-3", "--hess_interval=5"]


@pytest.mark.parametrize("name", ["sophiag", "sophiah"])
def test_each_group_has_its_own(tiny, tmp_path, monkeypatch, name):
    """Sophia has states of the matrices alone; the others move as an AdamW at its own rate moves them."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(optimizer, *arguments):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
        result = step(optimizer, *arguments)
        seen.append((*before, [p.grad.clone() for p in parameters], [p.detach().clone() for p in parameters]))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train_sophiag.main([*tiny, *ADAMW_FOR, f"--optimizer_name={name}", "--max_iters=6", "--grad_clip=0", "--bias=True"])
    checkpoint = load_checkpoint(tmp_path / "out")[0]
    sophia, adamw = checkpoint["optimizer"]["sophia"], checkpoint["optimizer"]["adamw"]
    assert [group["name"] for group in sophia["param_groups"]] == ["matrices"]
    assert [group["name"] for group in adamw["param_groups"]] == ["embeddings", "vectors"]
    assert all("hessian" in state for state in sophia["state"].values())
    assert adamw["param_groups"][0]["lr"] == pytest.approx(4 * sophia["param_groups"][0]["lr"])
    monkeypatch.undo()
    for before, state, gradients, after in seen:
        parameters = [torch.nn.Parameter(p) for p in before]
        counts = [len(group["params"]) for group in state["param_groups"]]
        groups = [{"params": parameters[: counts[0]]}, {"params": parameters[counts[0] :]}]
        reference = torch.optim.AdamW(groups)
        reference.load_state_dict(state)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        reference.step()
        for p, moved in zip(parameters, after, strict=True):
            torch.testing.assert_close(p.detach(), moved, rtol=1e-5, atol=1e-7)


def test_resumed_exactly(tiny, tmp_path):
    words = [*tiny, *ADAMW_FOR]
    train_sophiag.main([*words, "--max_iters=20", f"--out_dir={tmp_path / 'whole'}"])
    train_sophiag.main([*words, "--max_iters=20", "--eval_interval=7", f"--out_dir={tmp_path / 'parts'}"])
    (tmp_path / "parts" / "ckpt.pt").unlink()  # that of step 20; step 14's is left
    train_sophiag.main([*words, "--max_iters=20", f"--out_dir={tmp_path / 'parts'}", "--init_from=resume"])
    whole, parts = (load_checkpoint(tmp_path / name)[0]["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_bad_gradient_skips_both(tiny, tmp_path, monkeypatch):
    steps, backward = [], Run.backward

    def broken(run, batch, loss=None):
        backward(run, batch, **({"loss": loss} if loss else {}))
        steps.append(loss is None)
        if sum(steps) == 3 and loss is None:
            next(iter(run.model.parameters())).grad.fill_(float("nan"))

    monkeypatch.setattr(Run, "backward", broken)
    train_sophiag.main([*tiny, *ADAMW_FOR, "--max_iters=6"])
    assert read_lines(tmp_path / "out")[-2]["train/skipped"] == 1
    states = load_checkpoint(tmp_path / "out")[0]["optimizer"]
    assert {s["step"].item() for part in states.values() for s in part["state"].values()} == {5}


def test_refusals(tiny):
    with pytest.raises(UserError, match="neither sophia_start_iter nor an import"):
        train_sophiag.main([*tiny, "--adamw_for=vectors", "--sophia_start_iter=5"])
