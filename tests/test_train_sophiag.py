"""Sophia for the matrices and AdamW for the rest, as one optimizer of a run."""

import copy

import pytest
import torch

import train_sophiag
from sophia import SophiaG
from tests.conftest import read_lines
from training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from training.errors import UserError
from training.run import Run

ADAMW_FOR = ["--adamw_for=embeddings+scalars", "--adamw_lr=4e-3", "--hess_interval=5"]


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
    assert [group["name"] for group in adamw["param_groups"]] == ["embeddings", "scalars"]
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


MUON = ["--optimizer_name=sophia_muon", "--whiten_sides=input", "--whiten_exponent=0.25", "--cautious_decay=True"]


@pytest.mark.parametrize("more", [[], MUON])
def test_resumed_exactly(tiny, tmp_path, more):
    argv = [*tiny, *ADAMW_FOR, *more]
    train_sophiag.main([*argv, "--max_iters=20", f"--out_dir={tmp_path / 'whole'}"])
    train_sophiag.main([*argv, "--max_iters=20", "--eval_interval=7", f"--out_dir={tmp_path / 'parts'}"])
    (tmp_path / "parts" / "ckpt.pt").unlink()  # that of step 20; step 14's is left
    train_sophiag.main([*argv, "--max_iters=20", f"--out_dir={tmp_path / 'parts'}", "--init_from=resume"])
    whole, parts = (load_checkpoint(tmp_path / name)[0]["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def to_old_form(checkpoint):
    """The checkpoint as it was written when "scalars" were called "vectors" and a run did not count FLOPs."""
    for state in checkpoint["optimizer"].values():
        for group in state["param_groups"]:
            group["name"] = group["name"].replace("scalars", "vectors")
            group.pop("split", None)
    checkpoint["config"]["adamw_for"] = checkpoint["config"]["adamw_for"].replace("scalars", "vectors")
    del checkpoint["flops"]
    return checkpoint


def test_a_checkpoint_of_an_older_version_is_resumed_exactly(tiny, tmp_path, capsys):
    argv, out_dir = [*tiny, *ADAMW_FOR, "--max_iters=20"], tmp_path / "parts"
    train_sophiag.main([*argv, f"--out_dir={tmp_path / 'whole'}"])
    train_sophiag.main([*argv, f"--out_dir={out_dir}"])
    checkpoint = to_old_form(read_checkpoint(out_dir / "ckpt_prev.pt"))
    assert checkpoint["step"] == 10
    save_checkpoint(out_dir, dict(checkpoint))
    capsys.readouterr()
    argv = [word.replace("scalars", "vectors") for word in argv]
    train_sophiag.main([*argv, f"--out_dir={out_dir}", "--init_from=resume"])
    assert "changed since the checkpoint: nothing" in capsys.readouterr().out
    lines = [[line["train/loss"] for line in read_lines(tmp_path / name)[:-1]] for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    flops = [[line["flops"] for line in read_lines(tmp_path / name)] for name in ("whole", "parts")]
    assert flops[0] == flops[1]


def test_flops_of_a_resumed_run_are_those_that_were_done(tiny, tmp_path):
    """Ten steps with an estimate in each, then ten without."""
    train_sophiag.main([*tiny, "--hess_interval=1", "--hess_bs=24", "--max_iters=10"])
    train_sophiag.main([*tiny, "--hess_interval=100", "--hess_bs=24", "--max_iters=20", "--init_from=resume"])
    flops = [line["flops"] for line in read_lines(tmp_path / "out")]
    assert flops[20] - flops[10] == pytest.approx((flops[1] - flops[0]) * 10 / 2 * 1.01)
    assert flops[10] == pytest.approx(10 * flops[1])


def test_a_bad_gradient_skips_both(tiny, tmp_path, monkeypatch):
    steps, backward = [], Run.backward

    def broken(run, batch):
        backward(run, batch)
        steps.append(run)
        if len(steps) == 3:
            next(iter(run.model.parameters())).grad.fill_(float("nan"))

    monkeypatch.setattr(Run, "backward", broken)
    train_sophiag.main([*tiny, *ADAMW_FOR, "--max_iters=6"])
    assert read_lines(tmp_path / "out")[-2]["train/skipped"] == 1
    states = load_checkpoint(tmp_path / "out")[0]["optimizer"]
    assert {s["step"].item() for part in states.values() for s in part["state"].values()} == {5}


def rates(tmp_path):
    """{group: its rate at the last step} of the run in tmp_path / "out"."""
    state = load_checkpoint(tmp_path / "out")[0]["optimizer"]
    parts = [state] if "param_groups" in state else state.values()
    return {group["name"]: group["lr"] for part in parts for group in part["param_groups"]}


@pytest.mark.parametrize("argv", [[], ["--adamw_for=embeddings"], ["--adamw_for=scalars", "--adamw_lr=2e-3"]])
def test_embeddings_have_a_rate_of_their_own_whoever_moves_them(tiny, tmp_path, argv):
    train_sophiag.main([*tiny, *argv, "--learning_rate=1e-3", "--embedding_lr=8e-3", "--decay_lr=False"])
    expected = {"matrices": 1e-3, "embeddings": 8e-3, "scalars": 2e-3 if "--adamw_lr=2e-3" in argv else 1e-3}
    assert rates(tmp_path) == pytest.approx(expected)


def test_a_late_sophia_keeps_the_embeddings_rate(tiny, tmp_path, monkeypatch):
    seen, step = [], SophiaG.step

    def watched(optimizer, *arguments, **named):
        seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        return step(optimizer, *arguments, **named)

    monkeypatch.setattr(SophiaG, "step", watched)
    argv = ["--sophia_start_iter=3", "--max_iters=6", "--learning_rate=1e-3", "--embedding_lr=8e-3"]
    train_sophiag.main([*tiny, *argv, "--decay_lr=False"])
    expected = pytest.approx({"matrices": 1e-3, "embeddings": 8e-3, "scalars": 1e-3})
    assert seen == [expected] * 3


def test_a_resumed_run_has_the_settings_it_was_given(tiny, tmp_path):
    """The checkpoint's state, but not its rates, decay, betas or rho, where the command line changed them."""
    before = ["--embedding_lr=8e-3", "--weight_decay=0.3", "--beta1=0.8", "--rho=0.5", "--adamw_for=scalars"]
    train_sophiag.main([*tiny, *before, "--max_iters=5", "--decay_lr=False"])
    after = ["--weight_decay=0.4", "--beta1=0.7", "--rho=0.6", "--nesterov=True"]
    after += ["--adamw_for=scalars", "--adamw_lr=4e-3"]
    argv = ["--learning_rate=2e-3", "--max_iters=8", "--decay_lr=False", "--init_from=resume"]
    train_sophiag.main([*tiny, *after, *argv])
    assert rates(tmp_path) == pytest.approx({"matrices": 2e-3, "embeddings": 2e-3, "scalars": 4e-3})
    state = load_checkpoint(tmp_path / "out")[0]["optimizer"]["sophia"]
    assert {s["step"].item() for s in state["state"].values()} == {8}
    matrices = state["param_groups"][0]
    assert (matrices["weight_decay"], matrices["betas"], matrices["rho"]) == (0.4, (0.7, 0.99), 0.6)
    assert all("lr_scale" not in group and group["nesterov"] for group in state["param_groups"])


@pytest.mark.parametrize(
    "before, after, message",
    [
        ([], ["--adamw_for=scalars"], "adamw_for = none, this run has scalars"),
        (["--adamw_for=embeddings"], ["--adamw_for=scalars"], "adamw_for = embeddings, this run has scalars"),
        (["--adamw_for=embeddings"], [], "adamw_for = embeddings, this run has none"),
        ([], ["--sophia_start_iter=6"], "sophia_start_iter = 0, this run has 6"),
        (["--sophia_start_iter=6"], [], "sophia_start_iter = 6, this run has 0"),
        (["--sophia_start_iter=6"], ["--sophia_start_iter=3"], "sophia_start_iter = 6, this run has 3"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(tiny, before, after, message):
    train_sophiag.main([*tiny, *before, "--max_iters=4"])
    with pytest.raises(UserError, match=message):
        train_sophiag.main([*tiny, *after, "--max_iters=8", "--init_from=resume"])


def test_a_start_that_was_moved_within_reach_is_taken(tiny, tmp_path):
    train_sophiag.main([*tiny, "--sophia_start_iter=6", "--max_iters=4"])
    train_sophiag.main([*tiny, "--sophia_start_iter=5", "--max_iters=8", "--init_from=resume"])
    assert all("hessian" in s for s in load_checkpoint(tmp_path / "out")[0]["optimizer"]["state"].values())
    train_sophiag.main([*tiny, "--sophia_start_iter=3", "--max_iters=9", "--init_from=resume"])


def test_a_resumed_run_says_what_changed(tiny, tmp_path, capsys):
    train_sophiag.main([*tiny, "--max_iters=4"])
    train_sophiag.main([*tiny, "--max_iters=8", "--embedding_lr=1e-2", "--init_from=resume"])
    assert "changed since the checkpoint: embedding_lr, max_iters" in capsys.readouterr().out


@pytest.mark.parametrize("on", [False, True])
def test_a_checkpoint_is_resumed_unless_its_optimizer_was_removed(tiny, tmp_path, capsys, on):
    """Ordinary runs of older versions have these settings too, and they are off."""
    train_sophiag.main([*tiny, "--max_iters=4", "--lr_decay_iters=8"])
    checkpoint = read_checkpoint(tmp_path / "out/ckpt.pt")
    checkpoint["config"] |= {"eigenbasis": on, "spectral": False}
    save_checkpoint(tmp_path / "out", dict(checkpoint))
    capsys.readouterr()
    argv = [*tiny, "--max_iters=8", "--lr_decay_iters=8", "--init_from=resume"]
    if on:
        with pytest.raises(UserError, match=r"ckpt.pt: eigenbasis was replaced by whitened_muon .* commit efa612d"):
            train_sophiag.main(argv)
        weights = [f"--init_from=ckpt:{tmp_path / 'out/ckpt.pt'}", f"--out_dir={tmp_path / 'new'}"]
        train_sophiag.main([*tiny, *weights, "--eval_only=True"])  # a model's as any
    else:
        train_sophiag.main(argv)
        assert "changed since the checkpoint: max_iters\n" in capsys.readouterr().out


def test_refusals(tiny):
    with pytest.raises(UserError, match="adamw_lr is kept as a multiple"):
        train_sophiag.main([*tiny, "--learning_rate=0", "--min_lr=0", "--adamw_for=scalars", "--adamw_lr=1e-3"])
    with pytest.raises(UserError, match="both set the embeddings' learning rate"):
        train_sophiag.main([*tiny, "--adamw_for=embeddings+scalars", "--adamw_lr=1e-3", "--embedding_lr=1e-3"])
    with pytest.raises(UserError, match="multiple of learning_rate"):
        train_sophiag.main([*tiny, "--learning_rate=0", "--min_lr=0", "--embedding_lr=1e-3"])
    with pytest.raises(UserError, match="neither sophia_start_iter nor an import"):
        train_sophiag.main([*tiny, "--adamw_for=scalars", "--sophia_start_iter=5"])
