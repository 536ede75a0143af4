"""What a resumed run keeps, says and refuses when its settings are not those of the checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch

import train_adam
import train_sophiag
import training.run
from tests.conftest import interrupt, losses, read_lines, write_corpus
from training import data
from training.checkpoint import read_checkpoint, save_checkpoint
from training.curvature import label_loss
from training.errors import command
from training.metrics import NAMES
from training.run import Run
from training.step import TrainStep

TINY = {
    "device": "cpu", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "total_bs": 4, "batch_size": 2,
    "warmup_iters": 0, "learning_rate": 1e-3, "eval_interval": 10, "eval_tokens": 160, "log_interval": 1,
}  # fmt: skip


@pytest.fixture
def tiny(corpus, tmp_path):
    return [f"--{key}={value}" for key, value in {**TINY, "dataset": corpus, "out_dir": tmp_path / "out"}.items()]


def refused(capsys, main, words):
    """The one sentence with which `main(words)` ends; exit code 2, and the files of the run are as before."""
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(words))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def without(checkpoint, *keys):
    return {key: value for key, value in checkpoint.items() if key not in keys}


# ----- impossible


@pytest.mark.parametrize("max_iters, ok", [(9, False), (10, True), (11, True)])
def test_max_iters_below_the_checkpoint_is_refused(tiny, tmp_path, capsys, max_iters, ok):
    train_adam.main([*tiny, "--max_iters=10"])
    words, before = [*tiny, f"--max_iters={max_iters}", "--init_from=resume"], contents(tmp_path / "out")
    if ok:
        train_adam.main(words)
        return
    error = refused(capsys, train_adam.main, words)
    assert "max_iters = 9 is below step 10" in error and "--max_iters=10" in error
    assert contents(tmp_path / "out") == before
    train_adam.main([*words, "--eval_only=True"])


def test_all_missing_settings_are_named_at_once(tiny, tmp_path, capsys):
    train_sophiag.main([*tiny, "--adamw_for=scalars", "--max_iters=2"])
    before = contents(tmp_path / "out")
    words = ["--n_layer=2", "--n_embd=32", "--block_size=8", "--adamw_for=none", "--max_iters=4", "--dataset=nowhere"]
    error = refused(capsys, train_sophiag.main, [*tiny, *words, "--init_from=resume"])
    for remedy in ("--n_layer=1", "--n_embd=16", "--block_size=16", "--adamw_for=scalars", "--dataset=/"):
        assert remedy in error, error
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("how", ["resume", "ckpt"])
def test_another_tokenizer_of_the_same_size_is_refused(tiny, tmp_path, capsys, how):
    folders = []
    for name, first in (("a", 64), ("b", 128)):
        folders.append(write_corpus(tmp_path / name))
        meta = {"vocab_size": 64, "tokenizer": {"characters": "".join(map(chr, range(first, first + 64)))}}
        (folders[-1] / "meta.json").write_text(json.dumps(meta))
    train_adam.main([*tiny, f"--dataset={folders[0]}", "--max_iters=2"])
    start = ["--init_from=resume"]
    if how == "ckpt":
        start = [f"--init_from=ckpt:{tmp_path / 'out'}", f"--out_dir={tmp_path / 'new'}"]
    error = refused(capsys, train_adam.main, [*tiny, f"--dataset={folders[1]}", "--max_iters=4", *start])
    assert "tokenizer" in error and str(folders[1]) in error


def test_a_data_file_that_was_replaced_is_refused(tiny, tmp_path, capsys):
    folder = write_corpus(tmp_path / "corpus")
    train_adam.main([*tiny, f"--dataset={folder}", "--max_iters=2"])
    write_corpus(folder, seed=1)
    words = [*tiny, f"--dataset={folder}", "--max_iters=4", "--init_from=resume"]
    assert "train.bin" in refused(capsys, train_adam.main, words)
    train_adam.main([*words, f"--dataset={folder.rename(tmp_path / 'other')}"])
    assert {"train_sha256", "val_sha256", "dataset"} < config_of(tmp_path / "out")["history"][0]["changed"].keys()
    assert "order of the data" in (said := capsys.readouterr().out) and "val/loss is measured on other tokens" in said


# ----- the position in the data


def watch_batches(monkeypatch):
    """The list that gets the inputs of every training batch, (sequences, T) each."""
    seen, backward = [], Run.backward

    def watched(run, batch):
        seen.append(torch.cat([inputs for inputs, *_ in batch]).numpy())
        backward(run, batch)

    monkeypatch.setattr(Run, "backward", watched)
    return seen


@pytest.mark.parametrize("sizes", [(4, 8, 4), (8, 2, 6)])
@pytest.mark.parametrize("script", [train_adam, train_sophiag], ids=["adam", "sophiag"])
def test_a_changed_total_bs_neither_skips_nor_repeats(tiny, tmp_path, corpus, monkeypatch, script, sizes):
    seen = watch_batches(monkeypatch)
    for i, total_bs in enumerate(sizes):
        words = [f"--total_bs={total_bs}", f"--max_iters={7 * (i + 1)}", "--lr_decay_iters=21"]
        script.main([*tiny, *words, f"--init_from={'resume' if i else 'scratch'}"])
    tokens, count = data.open_dataset(corpus).train, 7 * sum(sizes)
    starts = data.window_starts(len(tokens), 1337, 0, count, 16)
    assert np.array_equal(np.concatenate(seen), data.take_windows(tokens, starts, 16)[0])
    lines = read_lines(tmp_path / "out")
    assert [line["sequences"] for line in lines] == np.cumsum([0, *np.repeat(sizes, 7)]).tolist()
    assert all(line["tokens"] == 16 * line["sequences"] for line in lines)
    assert lines[-1]["epoch"] == pytest.approx(count / (6000 // 16))
    steps = [line["flops"] for line in lines]
    assert np.diff(steps).tolist() == pytest.approx(np.repeat(sizes, 7) * steps[1] / sizes[0], rel=0.03)
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt")["sequences_seen"] == count


def test_a_checkpoint_without_the_position_resumes_as_before(tiny, tmp_path, monkeypatch):
    whole = [*tiny, f"--out_dir={tmp_path / 'whole'}", "--max_iters=20"]
    train_adam.main(whole)
    interrupt(monkeypatch, train_adam.main, [*tiny, "--max_iters=20"], 15)
    old = without(read_checkpoint(tmp_path / "out" / "ckpt.pt"), "sequences_seen", "history", "facts", "curvature")
    old["config"] = without(old["config"], "checkpoint")
    old["counts"] = {name: old["counts"][name] for name in ("clipped", "skipped", "skipped_in_a_row")}
    save_checkpoint(tmp_path / "out", old)
    train_adam.main([*tiny, "--max_iters=20", "--init_from=resume"])
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert config_of(tmp_path / "out")["history"] == []


def test_warming_the_curvature_up_after_a_larger_batch_stays_in_the_stream(tiny):
    words = [*tiny, "--sophia_start_iter=4", "--lr_decay_iters=8"]
    train_sophiag.main([*words, "--max_iters=4"])
    train_sophiag.main([*words, "--max_iters=8", "--total_bs=24", "--init_from=resume"])


def test_a_changed_total_bs_keeps_the_curvature(tiny, tmp_path, monkeypatch):
    """h is kept over the labels of a step: twice the labels, half of h, the same bs * h."""
    train_sophiag.main([*tiny, "--max_iters=10"])
    before = read_checkpoint(tmp_path / "out" / "ckpt.pt")["optimizer"]["state"]
    train_sophiag.main([*tiny, "--max_iters=11", "--total_bs=8", "--hess_interval=100", "--init_from=resume"])
    after = read_checkpoint(tmp_path / "out" / "ckpt.pt")["optimizer"]["state"]
    for number, state in before.items():
        torch.testing.assert_close(after[number]["hessian"], state["hessian"] / 2)


# ----- what changed


def test_history_is_in_config_json_and_in_the_checkpoint(tiny, tmp_path, capsys):
    train_adam.main([*tiny, "--max_iters=10", "--lr_decay_iters=30", "--learning_rate=0.1", "--min_lr=1e-4"])
    assert config_of(tmp_path / "out")["history"] == []
    words = [*tiny, "--lr_decay_iters=30", "--min_lr=1e-4", "--init_from=resume"]
    train_adam.main([*words, "--max_iters=20"])
    train_adam.main([*words, "--max_iters=20"])
    train_adam.main([*words, "--max_iters=30", "--seed=3"])
    history = [
        {"step": 10, "changed": {"learning_rate": [0.1, 1e-3], "max_iters": [10, 20]}},
        {"step": 20, "changed": {"seed": [1337, 3], "max_iters": [20, 30]}},
    ]
    assert config_of(tmp_path / "out")["history"] == history
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt")["history"] == history
    said = capsys.readouterr().out
    assert "learning rate of step 10 is 0.00" in said and "order of the data is another from sequence 80" in said


def test_a_start_from_scratch_has_no_history(tiny, tmp_path):
    train_adam.main([*tiny, "--max_iters=4"])
    train_adam.main([*tiny, "--max_iters=6", "--init_from=resume"])
    train_adam.main([*tiny, "--max_iters=4", "--overwrite=True"])
    assert config_of(tmp_path / "out")["history"] == []


def test_another_device_and_other_code_are_in_the_history(tiny, tmp_path, monkeypatch):
    train_adam.main([*tiny, "--max_iters=4"])
    monkeypatch.setattr("training.run.source_hash", lambda: "another")
    train_adam.main([*tiny, "--max_iters=4", "--init_from=resume"])
    ((_, after),) = config_of(tmp_path / "out")["history"][0]["changed"].values()
    assert after == "another"


HARMLESS = ["--eval_interval=4", "--keep_checkpoints=1", "--wandb_run_name=x", "--nccl_timeout=9", "--log_interval=1"]
GOES_ON = [["--hess_interval=10"], ["--block_size_schedule=0:16"], ["--batch_size=4"], ["--max_skipped=3"], HARMLESS]


@pytest.mark.parametrize("words", GOES_ON, ids=lambda words: words[0])
def test_settings_that_do_not_train_leave_the_run_as_it_was(tiny, tmp_path, words):
    train_sophiag.main([*tiny, "--max_iters=20", f"--out_dir={tmp_path / 'whole'}"])
    train_sophiag.main([*tiny, "--max_iters=10", "--lr_decay_iters=20"])
    train_sophiag.main([*tiny, "--max_iters=20", "--init_from=resume", *words])
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_can_be_switched_on_and_off(tiny, tmp_path, momentum):
    words = [*tiny, "--optimizer_name=sgd"]
    train_adam.main([*words, f"--momentum={momentum}", "--max_iters=4"])
    train_adam.main([*words, f"--momentum={0.9 - momentum}", "--max_iters=8", "--init_from=resume"])
    assert np.isfinite(losses(tmp_path / "out")).all()


@pytest.mark.parametrize("how, same", [("renamed", True), ("copied", False), ("linked", True)])
def test_a_copied_run_does_not_write_into_the_wandb_run_of_the_original(tiny, tmp_path, monkeypatch, how, same):
    train_adam.main([*tiny, "--max_iters=2"])
    out, new, found = tmp_path / "out", tmp_path / "new", []
    save_checkpoint(out, dict(read_checkpoint(out / "ckpt.pt")) | {"wandb_id": "x"})
    shutil.copytree(out, new) if how == "copied" else out.rename(new)
    if how == "linked":
        out.symlink_to(new)
    tracker = training.run.Tracker
    monkeypatch.setattr("training.run.Tracker", lambda *args: found.append(args[3]) or tracker(*args))
    train_adam.main([*tiny, "--max_iters=4", f"--out_dir={new}", "--init_from=resume"])
    assert found == ["x" if same else None]


@pytest.mark.parametrize("lines, warnings", [(0, 1), (4, 1), (9, 0), (10, 0), (11, 0)])
def test_a_resume_without_the_metrics_before_it_warns(tiny, tmp_path, capsys, lines, warnings):
    train_adam.main([*tiny, "--max_iters=10"])
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    (tmp_path / "out" / "metrics.jsonl.7.tmp").touch()
    capsys.readouterr()
    train_adam.main([*tiny, "--max_iters=12", "--init_from=resume"])
    assert capsys.readouterr().err.count("lacks lines before step 10") == warnings
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_auto_warns_where_a_runs_checkpoints_are_gone(tiny, tmp_path, capsys):
    for warnings in (0, 1):
        train_adam.main([*tiny, "--max_iters=2", "--init_from=auto"])
        assert capsys.readouterr().err.count("holds a run and no checkpoint of it") == warnings
        for path in (tmp_path / "out").glob("ckpt*"):
            path.unlink()


def test_untrained_weights_in_the_folder_of_a_run_are_one_warning(tiny, capsys):
    train_adam.main([*tiny, "--max_iters=2"])
    for start, warnings in (("scratch", 1), ("resume", 0), ("auto", 0)):
        capsys.readouterr()
        train_adam.main([*tiny, "--eval_only=True", f"--init_from={start}"])
        assert capsys.readouterr().err.count("warning: untrained weights are evaluated") == warnings


@pytest.mark.parametrize("words", [["--init_from=resume"], ["--dataset=nowhere"], ["--dataset="]], ids="".join)
def test_a_run_that_never_began_leaves_no_folder(tiny, tmp_path, capsys, words):
    for out_dir, exists in ((tmp_path / "new", False), (tmp_path / "there", True)):
        (tmp_path / "there").mkdir(exist_ok=True)
        refused(capsys, train_adam.main, [*tiny, f"--out_dir={out_dir}", *words])
        assert out_dir.exists() == exists


# ----- the type of numbers


@pytest.mark.parametrize("before, after", [("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")])
def test_dtype_may_change_to_and_from_float16(tiny, tmp_path, monkeypatch, before, after):
    """The CPU stands in for a GPU."""
    monkeypatch.setattr("training.run._resolve_dtype", lambda dtype, device: dtype)
    train_adam.main([*tiny, f"--dtype={before}", "--max_iters=6"])
    train_adam.main([*tiny, f"--dtype={after}", "--max_iters=12", "--init_from=resume"])
    scaler = read_checkpoint(tmp_path / "out" / "ckpt.pt")["scaler"]
    assert bool(scaler) == (after == "float16")
    assert read_lines(tmp_path / "out")[-2]["train/skipped"] <= 2 and np.isfinite(losses(tmp_path / "out")).all()


def test_the_same_dtype_keeps_the_scale(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run._resolve_dtype", lambda dtype, device: dtype)
    train_adam.main([*tiny, "--dtype=float16", "--max_iters=4"])
    scaler = read_checkpoint(tmp_path / "out" / "ckpt.pt")["scaler"]
    train_adam.main([*tiny, "--dtype=float16", "--max_iters=6", "--init_from=resume"])
    grown = read_checkpoint(tmp_path / "out" / "ckpt.pt")["scaler"]
    assert grown["_growth_tracker"] == scaler["_growth_tracker"] + 2


# ----- measured numbers that are 0


def test_a_run_that_has_learned_its_data_has_no_spike(tiny, tmp_path, monkeypatch):
    backward = Run.backward

    def learned(run, batch):
        backward(run, batch)
        run._train_step.loss = torch.zeros(())

    monkeypatch.setattr(Run, "backward", learned)
    train_adam.main([*tiny, "--max_iters=4"])
    lines = read_lines(tmp_path / "out")
    assert len(lines) == 5 and not any("train/spike" in line for line in lines)


# ----- steps and estimates that are not finite


def poison(monkeypatch, method, of_calls):
    """Make `method` of a run leave a NaN gradient in its calls number `of_calls` (a function of the number)."""
    calls, accumulate = [], TrainStep._accumulate

    def poisoned(step, batch, loss):
        value = accumulate(step, batch, loss)
        if (loss is label_loss) == (method == "curvature"):
            calls.append(None)
            if of_calls(len(calls)):
                next(step.model.parameters()).grad.fill_(float("nan"))
        return value

    monkeypatch.setattr(TrainStep, "_accumulate", poisoned)


def test_steps_and_estimates_are_counted_apart(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, "curvature", lambda call: call in (1, 3))
    train_sophiag.main([*tiny, "--max_iters=12", "--hess_interval=3"])
    lines = read_lines(tmp_path / "out")[:-1]
    assert [line["curvature/skipped"] for line in lines] == [1] * 6 + [2] * 6
    assert {line["train/skipped"] for line in lines} == {0}
    assert lines[0]["curvature/loss"] == pytest.approx(4.16, abs=0.1) and lines[0]["curvature/grad_norm"] is None
    assert lines[3]["curvature/grad_norm"] == lines[5]["curvature/grad_norm"] > 0
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt")["counts"]["curvature_skipped"] == 2


@pytest.mark.parametrize("what, said", [("curvature", "4 curvature estimates"), ("training", "4 updates")])
def test_either_ends_the_run(tiny, tmp_path, monkeypatch, capsys, what, said):
    """Finite estimates between training gradients that are not, and the other way round, do not delay the end."""
    poison(monkeypatch, what, lambda call: True)
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_sophiag.main([*tiny, "--max_iters=20", "--hess_interval=2", "--max_skipped=4"]))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and f"the last {said} up to step {6 if what == 'curvature' else 3}" in error, error
    assert error.count("\n") == 1


@pytest.mark.parametrize("optimizer", ["sophiag", "sophiah"])
def test_what_an_estimate_was_is_logged_the_same_after_a_resume(tiny, tmp_path, optimizer):
    words = [*tiny, f"--optimizer_name={optimizer}", "--hess_interval=7", "--hess_bs=2", "--lr_decay_iters=20"]
    train_sophiag.main([*words, "--max_iters=20", f"--out_dir={tmp_path / 'whole'}"])
    for more in (["--max_iters=10"], ["--max_iters=20", "--init_from=resume"]):
        train_sophiag.main([*words, *more])
    whole, resumed = (read_lines(tmp_path / name)[:-1] for name in ("whole", "out"))
    for key in ("curvature/loss", "curvature/grad_norm", "curvature/skipped"):
        assert [line.get(key) for line in whole] == [line.get(key) for line in resumed], key
    assert ("curvature/loss" in whole[0]) == (optimizer == "sophiag") and whole[0]["curvature/grad_norm"] > 0
    assert all(name in NAMES for line in whole for name in line if not name.startswith("train/win_rate/"))


def test_a_first_order_run_logs_no_estimates(tiny, tmp_path):
    train_adam.main([*tiny, "--max_iters=2"])
    assert not any(key.startswith("curvature/") for line in read_lines(tmp_path / "out") for key in line)
