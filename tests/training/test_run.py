"""The training loop from the command line: the same losses however a step is split, exact resume, errors."""

import contextlib
import functools
import itertools
import json
import math
import os
import threading
from concurrent.futures import wait

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import muon
import train_adam
import train_sophiag
from tests.conftest import Interrupted, interrupt, losses, read_lines, tiny_words, torchrun, write_corpus
from training import data
from training.checkpoint import read_checkpoint
from training.errors import command
from training.optimizers import make_optimizer
from training.run import Run
from training.step import Batches, TrainStep

TIMES = ("seconds", "tokens_per_second", "mfu", "memory_gib")
SPLIT = ["--hess_interval=5", "--rho=1.0", "--dropout=0.0"]  # rho: so large that a good part is not clipped


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    """The run to which the others are held: 1 process, batch_size 24."""
    out_dir = tmp_path_factory.mktemp("one")
    train_sophiag.main([*tiny_words(corpus, out_dir), "--batch_size=24", *SPLIT])
    return out_dir


@pytest.mark.parametrize("batch_size", [4, 8, 12])
def test_the_micro_batch_does_not_change_the_losses(corpus, one_process, tmp_path, batch_size):
    train_sophiag.main([*tiny_words(corpus, tmp_path), f"--batch_size={batch_size}", *SPLIT])
    assert len(losses(tmp_path)) == 30
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=1e-4)


def test_hutchinsons_estimate_does_not_depend_on_the_number_of_ranks(corpus, tmp_path):
    argv = ["--optimizer_name=sophiah", "--hess_interval=3", "--hess_bs=8", "--max_iters=12"]
    train_sophiag.main([*tiny_words(corpus, tmp_path / "whole"), "--batch_size=24", *argv])
    done = torchrun(2, "train_sophiag.py", [*tiny_words(corpus, tmp_path / "split"), "--batch_size=2", *argv])
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    norms = [[line["hessian_norm"] for line in read_lines(tmp_path / name)[:-1]] for name in ("split", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0][0] > 0


@pytest.mark.parametrize("optimizer", ["sophiag", "sophiah"])
def test_compiling_after_a_resume_draws_no_random_numbers(corpus, tmp_path, monkeypatch, optimizer):
    """The pass that compiles a graph restores dropout's generator. The compiler itself is replaced here."""
    monkeypatch.setattr("training.step.compiler", lambda compiled: lambda function: function)
    argv = [f"--optimizer_name={optimizer}", "--compile=True", "--dropout=0.2", "--hess_interval=2", "--hess_bs=8"]
    schedule = ["--lr_decay_iters=8", "--eval_interval=4"]
    train_sophiag.main([*tiny_words(corpus, tmp_path / "whole"), *argv, *schedule, "--max_iters=8"])
    for more in (["--max_iters=4"], ["--max_iters=8", "--init_from=resume"]):
        train_sophiag.main([*tiny_words(corpus, tmp_path / "resumed"), *argv, *schedule, *more])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


def test_the_number_of_ranks_does_not_change_the_run(corpus, one_process, tmp_path):
    done = torchrun(3, "train_sophiag.py", [*tiny_words(corpus, tmp_path), "--batch_size=4", *SPLIT])
    assert done.returncode == 0, done.stderr
    alone, together = read_lines(one_process), read_lines(tmp_path)
    assert [line["step"] for line in together] == list(range(31))
    for key, tolerance in (("train/loss", 1e-4), ("val/loss", 1e-4), ("grad_norm", 1e-3), ("hessian_norm", 1e-2)):
        found, expected = ([line[key] for line in lines if key in line] for lines in (together, alone))
        assert found == pytest.approx(expected, rel=tolerance), key
    assert 0.05 < alone[-2]["train/win_rate"] < 0.95, "the curvature has to matter for this to test it"
    first, last = (read_checkpoint(folder / "ckpt.pt")["model"] for folder in (one_process, tmp_path))
    assert max((first[name] - last[name]).abs().max().item() for name in first) < 1e-4


def test_the_loss_is_the_one_of_the_written_out_algorithm(corpus, tmp_path):
    """Three steps of AdamW by hand on the step's global batch, with torch alone."""
    from model import GPT

    argv = [*tiny_words(corpus, tmp_path), "--max_iters=3", "--batch_size=6"]
    train_adam.main(argv)
    config = train_adam.load_config(train_adam.AdamConfig, argv)
    corpus = data.open_dataset(config.dataset)
    torch.manual_seed(config.seed)
    model = GPT(train_adam.Run._model_config(type("run", (), {"config": config, "corpus": corpus}), None))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), betas=(0.9, 0.95))
    expected = []
    for step in range(3):
        starts = data.window_starts(len(corpus.train), config.seed, 24 * step, 24, 16)
        inputs, targets = (torch.from_numpy(a) for a in data.take_windows(corpus.train, starts, 16))
        loss = model(inputs, targets)[1]
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:  # warm-up over 3 steps to 1e-3
            group["lr"] = 1e-3 * (step + 1) / 4
        optimizer.step()
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("script", [train_adam, train_sophiag], ids=["adam", "sophiag"])
def test_resume_equals_the_uninterrupted_run(corpus, tmp_path, monkeypatch, script):
    argv = ["--max_iters=40", "--dropout=0.1", "--grad_clip=0.5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script.main([*tiny_words(corpus, whole), *argv])
    interrupt(monkeypatch, script.main, [*tiny_words(corpus, broken), *argv], steps=17)
    assert [line["step"] for line in read_lines(broken)] == list(range(17)), "past the checkpoint at step 10"
    torch.manual_seed(99)  # another process would have another random state
    script.main([*tiny_words(corpus, broken), *argv, "--init_from=resume"])

    def stream(out_dir):
        return [{key: value for key, value in line.items() if key not in TIMES} for line in read_lines(out_dir)]

    assert stream(broken) == stream(whole)
    first, second = (read_checkpoint(folder / "ckpt.pt") for folder in (whole, broken))
    assert first["step"] == second["step"] == 40
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    for index, state in first["optimizer"]["state"].items():
        assert all(torch.equal(state[key], second["optimizer"]["state"][index][key]) for key in state)


def test_a_run_writes_its_metrics_facts_and_checkpoints(tiny, tmp_path):
    train_sophiag.main([*tiny, "--log_interval=5", "--keep_checkpoints=2"])
    out_dir = tmp_path / "out"
    lines = read_lines(out_dir)
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 10, 20, 30]
    keys = (
        "step tokens seconds train/loss lr grad_norm train/clip_rate train/win_rate hessian_norm hessian_norm2 "
        "param_norm momentum_norm tokens_per_second flops"
    )
    assert set(keys.split()) <= set(lines[1])
    assert lines[1]["tokens"] == 5 * 24 * 16
    facts = json.loads((out_dir / "config.json").read_text())
    assert facts["config"]["gradient_accumulation_steps"] == 2 and facts["config"]["hess_bs"] == 6
    assert lines[1]["flops"] == pytest.approx(lines[1]["tokens"] * facts["model"]["flops_per_token"] * 1.025)
    assert len(facts["source_sha256"]) == 64 and facts["clean"] in (True, False, None)
    assert facts["torch"] == torch.__version__ and len(facts["data"]["train_sha256"]) == 64
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "ckpt.pt", "ckpt_20.pt", "ckpt_30.pt", "ckpt_best.pt", "ckpt_prev.pt", "config.json", "metrics.jsonl",
    ]  # fmt: skip


def test_always_save_checkpoint_off_keeps_only_better_ones(tiny, tmp_path, monkeypatch):
    values = iter([4.0, 3.0, 5.0, 2.5])
    monkeypatch.setattr(Run, "evaluate", lambda run: {"val/loss": next(values)})
    train_adam.main([*tiny, "--always_save_checkpoint=False"])
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 30
    assert read_checkpoint(tmp_path / "out" / "ckpt_prev.pt")["step"] == 10


def test_evaluation_alone_changes_nothing(tiny, tmp_path, capsys, monkeypatch):
    train_adam.main(tiny)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    last = read_lines(tmp_path / "out")[-1]
    capsys.readouterr()
    train_adam.main([*tiny, "--init_from=resume", "--eval_only=True"])
    assert f"val/loss {last['val/loss']:.4f}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == files
    monkeypatch.setattr(
        "training.monitor.Signals.__init__", lambda signals: vars(signals).update(received=15, _before={})
    )
    train_adam.main([*tiny, "--init_from=resume", "--eval_only=True"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == files, "nor when it is stopped"


def test_evaluation_is_the_mean_over_its_windows(tiny, tmp_path):
    """40 windows in batches of 3, the last one filled up, against one batch of 40."""
    from training import data

    with Run(train_adam.load_config(train_adam.AdamConfig, [*tiny, "--eval_tokens=640", "--batch_size=3"])) as run:
        starts = data.evaluation_starts(len(run.corpus.val), 640, 16)
        assert len(starts) == 40
        inputs, targets = (torch.from_numpy(a) for a in data.take_windows(run.corpus.val, starts, 16))
        logits, loss = run.model(inputs, targets)
        right = (logits.argmax(-1) == targets).double().mean().item()
        assert run.evaluate() == pytest.approx({"val/loss": loss.item(), "val/accuracy": right}, abs=1e-6) and right > 0


@pytest.mark.parametrize("script", [train_adam, train_sophiag], ids=["adam", "sophiag"])
def test_a_gradient_that_is_not_finite_is_skipped(tiny, monkeypatch, script, tmp_path):
    backward = Run.backward

    def poisoned(run, batch):
        backward(run, batch)
        if run.optimizer.state and not poisoned.done:
            poisoned.done = True
            poisoned.before = [p.detach().clone() for p in run.model.parameters()]
            next(run.model.parameters()).grad.view(-1)[3] = math.nan
        elif poisoned.done and not poisoned.after:
            poisoned.after = [p.detach().clone() for p in run.model.parameters()]

    poisoned.done, poisoned.after = False, None
    monkeypatch.setattr(Run, "backward", poisoned)
    script.main([*tiny, "--max_iters=5"])
    assert all(torch.equal(a, b) for a, b in zip(poisoned.before, poisoned.after, strict=True))
    assert math.isfinite(read_lines(tmp_path / "out")[-1]["val/loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw", "sgd", "lion", "muon", "soap"])
def test_a_first_step_that_is_skipped_leaves_nothing_behind(tiny, tmp_path, monkeypatch, optimizer):
    """As under fp16, whose first scale is often too large. What torch does not initialize holds NaN here."""
    loss = TrainStep._loss

    def infinite_at_first(step, *arguments):
        infinite_at_first.calls += 1
        return loss(step, *arguments) * (math.inf if infinite_at_first.calls == 1 else 1.0)

    infinite_at_first.calls = 0
    monkeypatch.setattr(TrainStep, "_loss", infinite_at_first)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **more: torch.full_like(tensor, math.nan, **more))
    train_adam.main([*tiny, "--max_iters=5", f"--optimizer_name={optimizer}"])
    lines = read_lines(tmp_path / "out")
    assert [line["train/skipped"] for line in lines[:-1]] == [1] * 5
    assert math.isfinite(lines[-1]["val/loss"])


def test_an_infinite_loss_with_finite_gradients_is_skipped_and_counted(tiny, tmp_path, monkeypatch):
    """A label of probability 0 gives that: the loss is infinite, its gradient p - onehot is not."""
    loss = TrainStep._loss

    def infinite_once(step, *arguments):
        infinite_once.calls += 1
        return loss(step, *arguments) + (math.inf if infinite_once.calls == 7 else 0.0)  # in step 3 of 2 passes

    infinite_once.calls = 0
    monkeypatch.setattr(TrainStep, "_loss", infinite_once)
    train_adam.main([*tiny, "--max_iters=6"])
    lines = read_lines(tmp_path / "out")
    assert [line["train/skipped"] for line in lines[:-1]] == [0, 0, 0, 1, 1, 1]
    assert lines[3]["train/loss"] is None and math.isfinite(lines[-1]["val/loss"])


def test_updates_of_single_matrices_that_are_not_finite_are_counted_and_said_once(tiny, tmp_path, monkeypatch, capfd):
    root, calls = muon.inverse_root, itertools.count()
    monkeypatch.setattr(muon, "inverse_root", lambda *a: root(*a) * (math.nan if next(calls) < 2 else 1.0))
    argv = [*tiny, "--optimizer_name=whitened_muon", "--whiten_interval=2", "--max_iters=5"]
    train_adam.main(argv)
    lines = read_lines(tmp_path / "out")
    counts = [line["train/skipped_matrices"] for line in lines if "train/skipped_matrices" in line]
    assert 0 < counts[0] < counts[1] == counts[-1] and math.isfinite(lines[-1]["val/loss"])
    assert capfd.readouterr().err.count("some updates of matrices were not finite") == 1


@pytest.mark.parametrize(
    "disk_is_full, message", [(False, "resume from the newest checkpoint, of step 4 in"), (True, "start again in")]
)
def test_too_many_skipped_steps_end_the_run(tiny, monkeypatch, capsys, disk_is_full, message):
    """The checkpoint that the error names is there."""
    if disk_is_full:
        monkeypatch.setattr("training.checkpoint.save_checkpoint", lambda *_: 1 / 0)
    loss = TrainStep._loss
    monkeypatch.setattr(
        TrainStep, "_loss", lambda step, *a: loss(step, *a) * (math.nan if step.optimizer.state else 1.0)
    )
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_adam.main([*tiny, "--max_skipped=4", "--eval_interval=2"]))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "the last 4 updates up to step 4 were not finite" in error and message in error


def test_a_spike_shows_in_train_spike(tiny, tmp_path, monkeypatch):
    loss = TrainStep._loss

    def spike(step, *arguments):
        spike.calls += 1
        return loss(step, *arguments) * (3.0 if spike.calls in (17, 18) else 1.0)

    spike.calls = 0
    monkeypatch.setattr(TrainStep, "_loss", spike)
    train_adam.main([*tiny, "--max_iters=12"])
    spikes = [line.get("train/spike") for line in read_lines(tmp_path / "out")]
    assert spikes[0] is None and spikes[8] == pytest.approx(3.0, abs=0.1)
    assert all(abs(value - 1) < 0.1 for value in spikes[1:8] + spikes[9:12])


@pytest.mark.parametrize("how", ["replaced", "cut short"])
def test_data_that_changes_during_the_run_is_noticed(tmp_path, capsys, monkeypatch, how):
    folder = write_corpus(tmp_path / "corpus")
    optimizer_step = Run.optimizer_step

    def change(run):
        optimizer_step(run)
        change.calls += 1
        if change.calls == 5 and how == "replaced":
            write_corpus(tmp_path / "new", seed=1)
            os.replace(tmp_path / "new" / "train.bin", folder / "train.bin")
        elif change.calls == 5:
            os.truncate(folder / "train.bin", 6000)

    change.calls = 0
    monkeypatch.setattr(Run, "optimizer_step", change)
    argv = tiny_words(folder, tmp_path / "out")
    error = refused(capsys, train_adam.main, argv)
    assert ("was changed during" if how == "replaced" else "was cut short") in error
    # At the evaluation, and at the first step that was not read already when the file was cut.
    assert change.calls == 10 if how == "replaced" else change.calls in (5, 6)


@pytest.mark.parametrize("script", [train_adam, train_sophiag], ids=["adam", "sophiag"])
def test_activation_checkpointing_computes_the_same(corpus, tmp_path, script):
    for name, setting in (("kept", False), ("again", True)):
        argv = ["--dropout=0.1", "--max_iters=10", f"--activation_checkpointing={setting}"]
        script.main([*tiny_words(corpus, tmp_path / name), *argv])
    assert losses(tmp_path / "again") == losses(tmp_path / "kept"), "bit for bit, dropout included"


def test_bfloat16_trains_alike(corpus, one_process, tmp_path):
    train_sophiag.main([*tiny_words(corpus, tmp_path), *SPLIT, "--dtype=bfloat16"])
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=0.03)


def test_step_0_has_a_learning_rate(tiny, tmp_path):
    train_adam.main([*tiny, "--max_iters=3"])
    assert read_lines(tmp_path / "out")[0]["lr"] == pytest.approx(1e-3 / 4)


# ----- phases


def test_shorter_sequences_read_the_same_tokens(tiny):
    argv = ["--block_size_schedule=0:4,10:8,20:16", "--batch_size=6"]
    with Run(train_adam.load_config(train_adam.AdamConfig, [*tiny, *argv])) as run:
        batches = {step: run.train_batch(step) for step in (0, 9, 10, 25)}
    with Run(train_adam.load_config(train_adam.AdamConfig, [*tiny, "--batch_size=6", "--overwrite=True"])) as run:
        whole = {step: run.train_batch(step) for step in batches}
    for step, length in ((0, 4), (9, 4), (10, 8), (25, 16)):
        for (inputs, targets, weight), (all_inputs, all_targets, all_weight) in zip(
            batches[step], whole[step], strict=True
        ):
            assert inputs.shape == (6 * 16 // length, length) and weight == all_weight
            assert torch.equal(inputs.flatten(), all_inputs.flatten())
            assert torch.equal(targets.flatten(), all_targets.flatten())


@pytest.mark.parametrize("start", [0, 13])
def test_batches_prepared_ahead_are_those_prepared_in_place(tiny, monkeypatch, start):
    """Every kind of request in the order of a run, over two epochs and two phases, from step 0 or as after a resume."""
    argv = ["--block_size_schedule=0:4,20:16", "--batch_size=6", "--seed=5"]  # an epoch is 15 steps and 5/8
    ahead, prepare = [], Batches._prepare

    def batches():
        config = train_adam.load_config(train_adam.AdamConfig, [*tiny, *argv, "--overwrite=True"])
        with Run(config) as run:
            for step in range(start, 32):
                if step % 3 == 0:
                    yield run._batches.curvature(step, 8)
                    yield run._batches.train(step, 4)
                yield run.train_batch(step)
                wait(future for _, future in run._batches._prefetcher._ahead.values())  # as long as a step takes

    def counted(batches, *request):
        ahead.append(threading.current_thread().name == "prefetch")
        return prepare(batches, *request)

    monkeypatch.setattr(Batches, "_prepare", counted)
    found = list(batches())
    assert ahead.count(False) <= 5, "in place: three first ones, and two of which nobody knew how far apart they are"
    monkeypatch.setattr(data.Prefetcher, "get", lambda prefetcher, prepare, *request: prepare(*request))
    expected = list(batches())
    assert len(found) == len(expected)
    for batch, expected_batch in zip(found, expected, strict=True):
        for (inputs, targets, weight), (a, b, expected_weight) in zip(batch, expected_batch, strict=True):
            assert weight == expected_weight and inputs.is_contiguous() and targets.is_contiguous()
            assert torch.equal(inputs, a) and torch.equal(targets, b)


@pytest.mark.parametrize("how", ["finished", "failed"])
def test_the_prefetching_thread_ends_with_the_run(tiny, how):
    with contextlib.suppress(Interrupted), Run(train_adam.load_config(train_adam.AdamConfig, tiny)) as run:
        run.train_batch(0)
        assert any(thread.name == "prefetch" and thread.daemon for thread in threading.enumerate())
        if how == "failed":
            raise Interrupted
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


PHASES = {
    "curriculum": ["--block_size_schedule=0:4,12:8,24:16"],
    "hybrid": ["--sophia_start_iter=14", "--hess_warmup=3"],
    "both": ["--block_size_schedule=0:8,20:16", "--sophia_start_iter=20", "--optimizer_name=sophiah", "--hess_bs=4"],
}


@pytest.mark.parametrize(  # before, at and after the step at which Sophia starts
    "phases, interrupted_at", [("curriculum", 25), ("hybrid", 11), ("both", 20), ("hybrid", 25)]
)
def test_phases_resume_exactly(corpus, tmp_path, monkeypatch, phases, interrupted_at):
    argv = [*PHASES[phases], "--dropout=0.1", "--max_iters=32", "--eval_interval=10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_sophiag.main([*tiny_words(corpus, whole), *argv])
    interrupt(monkeypatch, train_sophiag.main, [*tiny_words(corpus, broken), *argv], interrupted_at)
    torch.manual_seed(99)
    train_sophiag.main([*tiny_words(corpus, broken), *argv, "--init_from=resume"])
    assert losses(broken) == losses(whole)
    first, second = (read_checkpoint(folder / "ckpt.pt")["model"] for folder in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_hybrid_is_adamw_until_it_is_sophia(corpus, tmp_path):
    train_adam.main([*tiny_words(corpus, tmp_path / "adam"), "--weight_decay=0.2"])
    argv = ["--sophia_start_iter=14", "--hess_warmup=3", "--rho=1.0"]
    train_sophiag.main([*tiny_words(corpus, tmp_path / "hybrid"), *argv])
    adam, hybrid = losses(tmp_path / "adam"), losses(tmp_path / "hybrid")
    assert hybrid[:15] == adam[:15], "the loss of step 14 is before its update"
    assert hybrid[15] != adam[15] and hybrid[-1] < hybrid[0]
    lines = read_lines(tmp_path / "hybrid")
    assert "train/win_rate" not in lines[13] and 0.05 < lines[14]["train/win_rate"] < 0.95
    assert lines[14]["momentum_norm"] == pytest.approx(read_lines(tmp_path / "adam")[14]["momentum_norm"], rel=0.5)


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("128", "not written as"),
        ("5:4", "begin at 0"),
        ("0:4,0:8", "to rise"),
        ("0:17", "17 is not between 1 and block_size = 16"),
        ("0:4,9:5", "make total_bs a multiple of 5, or change 5"),
    ],
)
def test_bad_block_size_schedules_are_refused(tiny, capsys, schedule, message):
    assert message in refused(capsys, train_adam.main, [*tiny, f"--block_size_schedule={schedule}"])


# ----- bad input


def refused(capsys, main, argv):
    """The sentence with which `main(argv)` ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(argv))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_an_out_dir_with_a_run_is_refused_or_overwritten(tiny, tmp_path, capsys):
    train_adam.main(tiny)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert "--init_from=resume" in refused(capsys, train_adam.main, tiny)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    train_adam.main([*tiny, "--overwrite=True", "--max_iters=5"])
    assert [line["step"] for line in read_lines(tmp_path / "out")] == [0, 1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint_is_refused(tiny, capsys):
    assert "holds no checkpoint" in refused(capsys, train_adam.main, [*tiny, "--init_from=resume"])


def test_resume_with_another_model_is_refused(tiny, tmp_path, capsys):
    train_adam.main(tiny)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    error = refused(capsys, train_adam.main, [*tiny, "--init_from=resume", "--n_embd=48"])
    assert "n_embd = 32" in error and "48" in error
    other = write_corpus(tmp_path / "other", vocab_size=50)
    error = refused(capsys, train_adam.main, [*tiny, "--init_from=resume", f"--dataset={other}"])
    assert "vocab_size = 64" in error and "50" in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_resume_with_another_optimizer_is_refused(tiny, tmp_path, capsys):
    train_adam.main(tiny)
    error = refused(capsys, train_sophiag.main, [*tiny, "--init_from=resume"])
    assert "adamw" in error and "sophiag" in error
    (remedy,) = [word for word in error.split() if word.startswith("--init_from=ckpt:")]
    train_sophiag.main([*tiny, remedy, f"--out_dir={tmp_path / 'other'}"])


def test_missing_data_names_the_command(tiny, capsys):
    error = refused(capsys, train_adam.main, [*tiny, "--dataset=wikitext103"])
    assert "python data/wikitext103/prepare.py" in error


def test_a_batch_that_cannot_be_split_names_sizes_that_can(tiny, tmp_path, capsys):
    error = refused(capsys, train_adam.main, [*tiny, "--batch_size=7"])
    assert "batch_size can be 1, 2, 3, 4, 6, 8, 12, 24" in error
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where not even root may write")
def test_an_out_dir_that_cannot_be_written_is_refused(tiny, capsys):
    assert "cannot be read or written" in refused(capsys, train_adam.main, [*tiny, "--out_dir=/proc/self/out"])


def test_an_out_dir_that_is_a_file_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert "cannot be read or written" in refused(capsys, train_adam.main, tiny)


def test_a_device_or_dtype_that_is_not_there_is_refused(tiny, capsys):
    assert "allowed: auto, cuda" in refused(capsys, train_adam.main, [*tiny, "--device=abacus"])
    assert "float16" in refused(capsys, train_adam.main, [*tiny, "--dtype=float16"])
    if not torch.cuda.is_available():
        assert "this machine has too few GPUs (0" in refused(capsys, train_adam.main, [*tiny, "--device=cuda"])


def test_two_ranks_print_an_error_once(tiny):
    done = torchrun(2, "train_adam.py", [*tiny, "--batch_size=7"])
    assert done.returncode != 0
    assert done.stderr.count("error: total_bs") == 1


def test_fewer_curvature_sequences_than_ranks_are_refused_before_anything_is_overwritten(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("old")
    done = torchrun(2, "train_sophiag.py", [*tiny, "--hess_bs=1", "--overwrite=True"])
    assert done.returncode != 0 and done.stderr.count("error: hess_bs = 1 sequences are too few for 2 ranks") == 1
    assert "--hess_bs=2" in done.stderr and (tmp_path / "out" / "metrics.jsonl").read_text() == "old"


# ----- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("script", [train_adam, train_sophiag], ids=["adam", "sophiag"])
def test_gpu_trains_like_the_cpu(corpus, tmp_path, script, dtype, compiled):
    argv = ["--hess_interval=5"] if script is train_sophiag else []
    script.main([*tiny_words(corpus, tmp_path / "cpu"), *argv])
    on_gpu = ["--device=cuda", f"--dtype={dtype}", f"--compile={compiled}"]
    script.main([*tiny_words(corpus, tmp_path / "gpu"), *argv, *on_gpu])
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), abs=0.03)


@pytest.mark.parametrize("machines, graphs", [(1, 1), (2, 2)])
def test_graphs_are_cut_at_the_buckets_between_machines_only(corpus, tmp_path, monkeypatch, machines, graphs):
    """torch compiles a DDP model's graph bucket by bucket, of which the first holds 1 MiB of gradients."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr("training.step.compiler", lambda on: functools.partial(torch.compile, backend=counter))
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in (alone | {"LOCAL_WORLD_SIZE": machines}).items():  # one rank, that thinks so of others
        monkeypatch.setenv(name, str(value))
    argv = tiny_words(corpus, tmp_path)
    config = train_adam.load_config(train_adam.AdamConfig, [*argv, "--n_layer=2", "--n_embd=128", "--compile=True"])
    with Run(config) as run:
        run.set_optimizer(make_optimizer)
        torch._dynamo.reset()
        run.backward(run.train_batch(0))
    assert counter.frame_count == graphs
