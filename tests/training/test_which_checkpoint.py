"""Which checkpoints a run keeps, and which one is resumed, sampled, evaluated, exported or started from."""

import json
import os
import signal

import numpy as np
import pytest
import torch

import evaluate
import export_hf
import sample
import train_adam
from tests.conftest import losses, read_lines, write_corpus
from tests.training.test_resume import TINY, contents, refused
from training.checkpoint import CheckpointWriter, kept_checkpoints, load_checkpoint, read_checkpoint, save_checkpoint
from training.errors import UserError, command
from training.run import Run

TEXTS = ["--device=cpu", "--max_new_tokens=2"]


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """Random tokens that stand for 64 characters."""
    folder = write_corpus(tmp_path_factory.mktemp("characters"))
    meta = {"vocab_size": 64, "tokenizer": {"characters": "\n" + "".join(map(chr, range(65, 128)))}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def tiny(characters, tmp_path):
    return [f"--{key}={value}" for key, value in {**TINY, "dataset": characters, "out_dir": tmp_path / "out"}.items()]


def step_of(path):
    return read_checkpoint(path)["step"]


def evaluations(monkeypatch, *values):
    iterator = iter(values)
    monkeypatch.setattr(Run, "evaluate", lambda run: {"val/loss": next(iterator)})


def train(words, steps, *more):
    train_adam.main([*words, f"--max_iters={steps}", "--lr_decay_iters=100", *more])


# ----- the best


@pytest.mark.parametrize("always", [True, False])
def test_the_best_is_kept_beside_the_newest(tiny, tmp_path, monkeypatch, always):
    evaluations(monkeypatch, 4.0, 3.0, 2.0, 5.0, 2.5)
    train(tiny, 40, f"--always_save_checkpoint={always}")
    out = tmp_path / "out"
    assert step_of(out / "ckpt_best.pt") == 20 and read_checkpoint(out / "ckpt_best.pt")["best_val_loss"] == 2.0
    assert step_of(out / "ckpt.pt") == (40 if always else 20)


def test_a_best_one_is_there_although_the_start_was_better(tiny, tmp_path, monkeypatch):
    evaluations(monkeypatch, 1.0, 3.0, 2.0, float("nan"))
    train(tiny, 30, "--always_save_checkpoint=False")
    assert step_of(tmp_path / "out" / "ckpt_best.pt") == 20


def test_a_run_that_diverged_keeps_the_checkpoints_from_before(tiny, tmp_path, capsys):
    """Such weights would be of no use: every step from them on is skipped. The error names one that is."""
    train(tiny, 10)
    with pytest.raises(SystemExit) as ended:
        words = ["--learning_rate=1e30", "--init_from=resume", "--max_skipped=15"]
        command(lambda: train(tiny, 60, *words))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "resume from the newest checkpoint, of step 10 in" in error
    assert error.count("warning: val/loss is not finite at step 20") == 1
    train(tiny, 20, "--init_from=resume")
    assert step_of(tmp_path / "out" / "ckpt.pt") == 20 and np.isfinite(losses(tmp_path / "out")).all()


@pytest.mark.parametrize("eval_tokens, best", [(800, 10), (400, 20)])
def test_other_eval_tokens_begin_the_search_for_the_best_again_only_where_they_are_others(
    tiny, tmp_path, monkeypatch, capsys, eval_tokens, best
):
    """val.bin has 700 tokens, which 1,600 and 800 read in full."""
    evaluations(monkeypatch, 4.0, 1.0, 2.0, 2.0, 3.0)
    train(tiny, 20, "--eval_tokens=1600")
    train(tiny, 30, f"--eval_tokens={eval_tokens}", "--init_from=resume")
    assert step_of(tmp_path / "out" / "ckpt_best.pt") == best
    assert ("val/loss is measured on other tokens" in capsys.readouterr().out) == (best == 20)


def test_two_stops_leave_the_best_one(tiny, tmp_path, monkeypatch):
    """Without always_save_checkpoint a stop writes the only checkpoint of its step, and a second stop the next."""
    evaluations(monkeypatch, 4.0, 2.0, *[5.0] * 20)
    step, stops = Run.optimizer_step, [13, 17]

    def stopped(run):
        step(run)
        stopped.done += 1
        if stopped.done in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.done = 0
    monkeypatch.setattr(Run, "optimizer_step", stopped)
    for start in ("scratch", "resume", "resume"):
        train(tiny, 30, "--always_save_checkpoint=False", f"--init_from={start}")
    assert step_of(tmp_path / "out" / "ckpt_best.pt") == 10
    assert [step_of(tmp_path / "out" / name) for name in ("ckpt.pt", "ckpt_prev.pt")] == [17, 13]


def test_a_stop_before_the_evaluation_of_its_step_does_not_lose_the_best(tiny, tmp_path, monkeypatch):
    evaluations(monkeypatch, 4.0, 3.0, 2.0, 5.0)
    step = Run.optimizer_step

    def stopped(run):
        step(run)
        stopped.done += 1
        if stopped.done == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.done = 0
    monkeypatch.setattr(Run, "optimizer_step", stopped)
    for start in ("scratch", "resume"):
        train(tiny, 30, f"--init_from={start}")
    assert step_of(tmp_path / "out" / "ckpt_best.pt") == 20


def test_the_best_is_not_skipped_on_a_slow_disk(tmp_path, monkeypatch):
    import threading
    import time

    gate, save = threading.Event(), save_checkpoint

    def slow(*arguments):
        gate.wait(5)
        save(*arguments)

    monkeypatch.setattr("training.checkpoint.save_checkpoint", slow)
    writer = CheckpointWriter(tmp_path)
    writer.save({"step": 1})
    while writer._next:
        time.sleep(0.01)
    for step in (2, 3, 4, 5, 6):
        writer.save({"step": step, "is_best": step in (2, 4)})
    gate.set()
    writer.wait()
    assert [step_of(tmp_path / name) for name in ("ckpt_best.pt", "ckpt_prev.pt", "ckpt.pt")] == [4, 4, 6]


def test_other_evaluation_windows_begin_the_search_for_the_best_again(tiny, tmp_path, monkeypatch):
    evaluations(monkeypatch, 9.0, 1.0, 3.5, 3.0, 4.0)  # steps 0, 10; 10 again, 20, 30
    train(tiny, 10)
    train(tiny, 30, "--eval_tokens=320", "--init_from=resume")
    assert step_of(tmp_path / "out" / "ckpt_best.pt") == 20


# ----- which one


@pytest.mark.parametrize("before", [float("nan"), -float("inf")])
def test_a_best_loss_that_none_can_beat_is_beaten(tiny, tmp_path, capsys, before):
    train(tiny, 10)
    checkpoint, _ = load_checkpoint(tmp_path / "out")
    save_checkpoint(tmp_path / "out", {**checkpoint, "best_val_loss": before})
    train(tiny, 20, "--init_from=resume")
    assert f"is {before}; the search for the best one begins again" in capsys.readouterr().err
    found = load_checkpoint(tmp_path / "out", "best")[0]
    losses = [line["val/loss"] for line in read_lines(tmp_path / "out") if line["step"] in (10, 20)]
    assert found["best_val_loss"] == min(losses) and found["step"] == (20 if losses[1] < losses[0] else 10)


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """A run with ckpt.pt and ckpt_40.pt, ckpt_prev.pt and ckpt_30.pt, ckpt_best.pt of step 20."""
    with monkeypatch.context() as patch:
        evaluations(patch, 4.0, 3.0, 2.0, 5.0, 2.5)
        train(tiny, 40, "--keep_checkpoints=2")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "which, step", [("newest", 40), ("best", 20), ("20", 20), ("30", 30), ("40", 40), ("FILE", 30)]
)
def test_resuming_from_any_of_them_goes_on_as_the_run_did(tiny, trained, which, step):
    before, lines = contents(trained), losses(trained)
    which = str(trained / "ckpt_prev.pt") if which == "FILE" else which
    train(tiny, 41, "--init_from=resume", f"--checkpoint={which}", "--keep_checkpoints=2")
    assert losses(trained)[:-1] == lines, "the same steps once more, none twice"
    assert [line["step"] for line in read_lines(trained)] == list(range(42)) and step_of(trained / "ckpt.pt") == 41
    if step == 20:
        assert any(content == before["ckpt.pt"] or path == "ckpt_40.pt" for path, content in contents(trained).items())


def test_going_back_is_kept_over_a_second_start(tiny, trained, monkeypatch):
    """A run that went back to step 20 and was killed before its next checkpoint must not jump to step 40."""
    monkeypatch.setattr(Run, "optimizer_step", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny, 50, "--init_from=resume", "--checkpoint=best")
    monkeypatch.undo()
    assert step_of(trained / "ckpt.pt") == step_of(trained / "ckpt_best.pt") == 20
    assert [step_of(path) for path in kept_checkpoints(trained)] == [30, 40], "nothing is lost"
    train(tiny, 30, "--init_from=auto")
    assert [line["step"] for line in read_lines(trained)] == list(range(31))


def test_new_checkpoints_are_not_pruned_in_favour_of_those_of_later_steps(tiny, trained):
    train(tiny, 30, "--init_from=resume", "--checkpoint=best", "--keep_checkpoints=1", "--eval_interval=5")
    assert [step_of(path) for path in kept_checkpoints(trained)] == [30]


def test_another_runs_checkpoint_goes_on_in_a_new_folder(tiny, trained, tmp_path, capsys):
    before = contents(trained)
    words = [*tiny, "--init_from=resume", f"--checkpoint={trained / 'ckpt_best.pt'}", f"--out_dir={tmp_path / 'new'}"]
    train(words, 24)
    assert [line["step"] for line in read_lines(tmp_path / "new")] == list(range(25))
    assert losses(tmp_path / "new") == losses(trained)[:24] and contents(trained) == before
    assert "is of another one" in refused(capsys, train_adam.main, words)
    train_adam.main([*words, "--eval_only=True"])


@pytest.mark.parametrize("which", ["25", "best.pt", "", "/", "9" * 5000, "a\0b"])
def test_one_that_is_missing_is_one_sentence(tiny, trained, capsys, which):
    before = contents(trained)
    error = refused(capsys, train_adam.main, [*tiny, "--init_from=resume", f"--checkpoint={which}"])
    assert ("ckpt_best.pt of step 20" in error) == (which not in ("", "/", "a\0b")) and contents(trained) == before


def test_a_signal_during_eval_only_promises_no_checkpoint(tiny, trained, monkeypatch, capfd):
    monkeypatch.setattr(Run, "evaluate", lambda run: os.kill(os.getpid(), signal.SIGTERM) or {"val/loss": 1.0})
    train(tiny, 40, "--init_from=resume", "--eval_only=True")
    assert "SIGTERM: ends after this evaluation; a second" in capfd.readouterr().err


@pytest.mark.parametrize("start", ["scratch", "auto", "gpt2"])
def test_a_checkpoint_that_would_not_be_read_is_refused(tiny, capsys, start):
    assert "--init_from=resume" in refused(
        capsys, train_adam.main, [*tiny, f"--init_from={start}", "--checkpoint=best"]
    )


def test_auto_never_starts_over_where_another_checkpoint_is_left(tiny, trained, capsys):
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (trained / name).unlink()
    before = contents(trained)
    assert "--checkpoint=" in refused(capsys, train_adam.main, [*tiny, "--init_from=auto"])
    assert contents(trained) == before


def test_the_tools_take_any_of_them(trained, tmp_path, capsys):
    found = {}
    for which in ("newest", "best", "40", str(trained / "ckpt_prev.pt")):
        words = [f"--out_dir={trained}", f"--checkpoint={which}"]
        found[which] = evaluate.main([*words, "--device=cpu"])["loss"]
        export_hf.main([*words, f"--to={tmp_path / f'exported{len(found)}'}"])
        sample.main([*words, *TEXTS])
    assert found["newest"] == found["40"] and len(set(found.values())) == 3
    for script in (sample, evaluate):
        with pytest.raises(UserError, match="checkpoint = 'best' needs"):
            script.main(["--init_from=gpt2", "--checkpoint=best"])


# ----- ckpt:PATH


@pytest.mark.parametrize("name, step", [("", 40), ("ckpt_best.pt", 20)])
def test_a_run_starts_new_from_ones_own_weights(tiny, trained, tmp_path, capsys, name, step):
    out, path = tmp_path / "new", trained / name
    words = [f"--out_dir={out}", f"--init_from=ckpt:{path}", "--n_layer=7", "--learning_rate=1e-9", "--min_lr=0"]
    train([*tiny, *words], 3, "--eval_interval=1")
    lines, own = read_lines(out), read_checkpoint(trained / f"{name or 'ckpt.pt'}")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["sequences"] == 12
    model = read_checkpoint(out / "ckpt.pt")["model"]
    assert all(torch.allclose(model[key], own["model"][key], atol=1e-6) for key in model)
    printed = capsys.readouterr()
    assert "weights, for step 0; " in printed.out and printed.err.count("warning: not used: n_layer = 7;") == 1
    assert evaluate.main([f"--init_from=ckpt:{path}", "--device=cpu"])["loss"] == pytest.approx(
        lines[0]["val/loss"], abs=0.05
    )


def test_a_restart_says_once_which_weights_and_settings_it_does_not_read(tiny, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(trained.parent)
    out = tmp_path / "new"
    words = [*tiny, f"--out_dir={out}", f"--init_from=ckpt:{trained}"]
    train(words, 2)
    capsys.readouterr()
    train([*words, f"--init_from=ckpt:{trained.name}", "--init_from=auto"], 3)
    assert capsys.readouterr().err == ""
    train([*words, "--init_from=hf:other", "--n_layer=7", "--init_from=auto", "--overwrite=True"], 4)
    error = capsys.readouterr().err
    goes_on = f"{out / 'ckpt.pt'} goes on, and its run began from ckpt:{trained}"
    assert error.count(f"warning: hf:other is not read: {goes_on}.\n") == 1
    assert error.count("not used: n_layer = 7;") == error.count("overwrite has no effect") == 1
    assert error.count("\n") == 3
    assert [line["step"] for line in read_lines(out)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("init_from", ["scratch", "auto"])
def test_a_run_does_not_remove_the_weights_it_starts_from(tiny, tmp_path, capsys, init_from):
    train(tiny, 2)
    out, folder = tmp_path / "out", tmp_path / "exported"
    export_hf.main([f"--out_dir={out}", f"--to={folder}"])
    for path, words in ((out, ["ckpt:"]), (out / "ckpt.pt", ["import:"]), (folder, ["hf:"]), (folder, [])):
        before = {file: file.read_bytes() for file in path.parent.rglob("*.*") if file.is_file()}
        into = path if path.is_dir() else path.parent
        start = [f"--init_from={kind}{path}" for kind in words] + ["--init_from=auto"] * (init_from == "auto")
        said = refused(capsys, train_adam.main, [*tiny, *start, f"--out_dir={into}", "--overwrite=True"])
        assert said.endswith("name another --out_dir.\n")
        assert before == {file: file.read_bytes() for file in path.parent.rglob("*.*") if file.is_file()}


@pytest.mark.parametrize("path", ["nowhere", "metrics.jsonl", "config.json"])
def test_what_is_no_checkpoint_is_one_sentence(tiny, trained, tmp_path, capsys, path):
    words = [f"--init_from=ckpt:{trained / path}", f"--out_dir={tmp_path / 'new'}"]
    assert path in refused(capsys, train_adam.main, [*tiny, *words])
