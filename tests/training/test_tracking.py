"""metrics.jsonl, config.json, the clock, wandb that must not matter."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import types

import pytest

import train_adam
from tests.conftest import read_lines
from train_adam import AdamConfig
from training.checkpoint import load_checkpoint
from training.errors import UserError, command
from training.run import Run
from training.tracking import Clock, Tracker, console_line, git_state, write_atomically


def test_no_step_stands_twice(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 0.1}\n{"step": 5}\n{"step": 10}\n{"step": 12, "a"')
    tracker = Tracker(AdamConfig(out_dir=str(tmp_path)), {}, start_step=10)
    tracker.log({"step": 10, "val/loss": float("inf")})
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "a": 0.1}', '{"step": 5}', '{"step": 10, "val/loss": null}']
    assert json.loads((tmp_path / "config.json").read_text())["config"]["total_bs"] == 480


def test_the_clock_counts_training_only():
    waits = []
    clock = Clock(lambda: waits.append(1), seconds=100.0)
    assert clock.seconds == 100.0
    clock.start()
    time.sleep(0.05)
    with clock.paused():
        before = clock.seconds
        time.sleep(0.2)
        assert clock.seconds == before
    assert 100.04 < before < 100.15
    time.sleep(0.05)
    assert 100.09 < clock.seconds < 100.25
    assert len(waits) == 3, "waits for the device at each start and stop"


def test_console_line():
    metrics = {"step": 100, "train/loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 2000.0, "mfu": 0.4}
    line = console_line(metrics | {"val/loss": 2.25}, max_iters=2000, tokens_per_step=1000)
    assert " ".join(line.split()) == (
        "step 100/2000 val/loss 2.2500 train/loss 2.5000 lr 1.00e-03 grad_norm 0.50 2.0k tok/s mfu 40.0% left 0:15:50"
    )


def test_git_state_is_the_commit_and_what_git_tracks_and_differs(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tracking.__file__", str(tmp_path / "a.py"))
    assert git_state() == (None, None), "no git repository"
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("1")
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*settings, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "notes.txt").touch()
    commit, changed = git_state()
    assert len(commit) == 40 and changed == []
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("2")
    assert git_state() == (commit, ["a.py", "b.py"])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    write_atomically(str(path), b"new\xff")
    assert path.read_bytes() == b"new\xff"

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left") as raised:
        write_atomically(path, "newest")
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"new\xff" and list(tmp_path.iterdir()) == [path]


def test_without_wandb_training_goes_on(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train_adam.main([*tiny, "--wandb_log=True", "--max_iters=5"])
    assert read_lines(tmp_path / "out")[-1]["step"] == 5
    assert "training goes on without wandb" in capsys.readouterr().err


def test_wandb_gets_the_same_names(tiny, tmp_path, monkeypatch):
    calls, logged, finished = [], [], []

    class FakeRun:
        id, summary, starting_step, resumed, offline = "abc", {}, 0, True, False

        def define_metric(self, name, step_metric):
            return name, step_metric

        def log(self, metrics, step, commit):
            logged.append((step, metrics))

        def finish(self):
            finished.append(True)

    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train_adam.main([*tiny, "--wandb_log=True", "--max_iters=10"])
    train_adam.main([*tiny, "--wandb_log=True", "--max_iters=12", "--init_from=resume"])
    first, second = calls
    assert first["group"] == "adamw" and first["config"]["learning_rate"] == 1e-3 and first["id"] is None
    assert second["id"] == "abc", "a resumed run goes on under its id"
    assert finished == [True, True]
    lines = {line["step"]: line for line in read_lines(tmp_path / "out")}
    assert logged[-1] == (12, lines[12])
    assert FakeRun.summary["final_val_loss"] == lines[12]["val/loss"]


def offline_records(path):
    """The protobuf records of a .wandb file: LevelDB's log format in blocks of 32 KiB after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # a header does not fit: the block ends in zeros
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def test_offline_wandb_runs_hold_what_metrics_jsonl_holds_and_keep_one_id(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    argv = [*tiny, "--wandb_log=True", "--optimizer_name=muon", "--wandb_run_name=mine"]
    train_adam.main([*argv, "--max_iters=12"])
    (path,) = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    records = list(offline_records(path))

    def values(items):
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    (run,) = [record.run for record in records if record.HasField("run")][:1]
    assert (run.run_group, run.project, run.display_name) == ("muon", "sophia", "mine")
    config = values(run.config.update)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() >= facts["config"].items() and config["data"] == facts["data"], "the config is complete"
    history = [values(record.history.item) for record in records if record.HasField("history")]
    lines = read_lines(tmp_path / "out")
    assert len(history) == len(lines) == 13
    assert all(theirs.items() >= ours.items() for ours, theirs in zip(lines, history, strict=True))
    summary = {}
    for record in records:
        if record.HasField("summary"):
            summary |= values(record.summary.update)
    assert summary["final_val_loss"] == lines[-1]["val/loss"] and summary["mean_tokens_per_second"] > 0
    (metric,) = [record.metric for record in records if record.HasField("metric")]
    assert (metric.glob_name, metric.step_metric) == ("*", "step"), "charts are drawn over the run's own steps"
    time.sleep(1)  # wandb names a folder by the second
    train_adam.main([*argv, "--max_iters=14", "--init_from=resume"])
    folders = [path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and len({name.split("-")[-1] for name in folders}) == 1, "one id over the resume"


def refused(capsys, argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_adam.main(argv))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
    return said


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_file_that_cannot_be_written_is_one_sentence(tiny, tmp_path, capsys, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "inside").touch()
    assert name in refused(capsys, [*tiny, "--overwrite=True"])
    train_adam.main([*tiny, f"--out_dir={tmp_path / 'new'}", "--max_iters=4", "--eval_interval=2"])
    (tmp_path / "new" / name).unlink()
    (tmp_path / "new" / name).mkdir()
    assert name in refused(capsys, [*tiny, f"--out_dir={tmp_path / 'new'}", "--init_from=resume", "--max_iters=6"])


@pytest.mark.parametrize("out_dir", ["x" * 300, "/dev/full", "/dev/null/x", "a/" * 3000])
def test_an_out_dir_that_no_disk_takes_is_refused(tiny, capsys, out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for start in ("scratch", "auto", "resume"):
        assert "error: " in refused(capsys, [*tiny, f"--out_dir={out_dir}", f"--init_from={start}"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_disk_that_fills_up_at_the_start_leaves_no_half_of_a_run(tiny, monkeypatch, tmp_path, name):
    def full(path, content):
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("training.tracking.write_atomically", full)
        with pytest.raises(UserError, match=rf"{name} cannot be read or written \(No space left"):
            train_adam.main(tiny)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_before_the_start(tiny, capsys, monkeypatch, tmp_path):
    def full(path, data):
        raise OSError(28, "No space left on device") if data else AssertionError("an empty file fits on a full disk")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert "No space left on device" in refused(capsys, tiny)
    assert list((tmp_path / "out").glob(".probe*")) == []


@pytest.mark.parametrize("how", ["removed", "renamed", "made again", "metrics removed", "metrics replaced"])
def test_files_that_go_during_the_run_are_noticed_and_written_again(tiny, tmp_path, capsys, monkeypatch, how):
    out, evaluate = tmp_path / "out", Run.evaluate

    def meddle(run):
        lines = (out / "metrics.jsonl").read_text().count("\n")
        if lines == 10:
            if how in ("removed", "made again"):
                shutil.rmtree(out)
            if how == "made again":
                out.mkdir()
            if how == "renamed":
                out.rename(tmp_path / "elsewhere")
            if how.startswith("metrics"):
                (out / "metrics.jsonl").unlink()
            if how == "metrics replaced":
                (out / "metrics.jsonl").write_text('{"step": -1}\n')
        return evaluate(run)

    monkeypatch.setattr(Run, "evaluate", meddle)
    train_adam.main([*tiny, "--max_iters=20"])
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "during the run" in said, said
    steps = [line["step"] for line in read_lines(out)]
    assert steps == ([-1, *range(10, 21)] if how == "metrics replaced" else list(range(21)))
    assert load_checkpoint(out)[0]["step"] == 20 and json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("obstacle", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_a_run_outlives_what_takes_the_place_of_its_metrics(tiny, tmp_path, capsys, monkeypatch, obstacle):
    """metrics.jsonl is something else for one evaluation; all lines are there when it has gone again."""
    path, evaluate = tmp_path / "out" / "metrics.jsonl", Run.evaluate
    todo = [lambda: None, lambda: (path.unlink(), obstacle(path)), lambda: shutil.move(path, tmp_path / "obstacle")]

    def meddle(run):
        if todo:
            todo.pop(0)()
        return evaluate(run)

    monkeypatch.setattr(Run, "evaluate", meddle)
    train_adam.main([*tiny, "--max_iters=30"])
    assert "cannot be written again" in capsys.readouterr().err
    assert [line["step"] for line in read_lines(tmp_path / "out")] == list(range(31))
