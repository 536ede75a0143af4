"""compare.py: which numbers it reports, which runs it refuses, and that the figures are there."""

import json
import struct

import numpy as np
import pytest

import compare
from training.errors import command

CONFIG = {
    "config": {"optimizer_name": "adamw", "max_iters": 100, "total_bs": 24, "block_size": 64, "eval_tokens": 8192},
    "data": {"train_sha256": "aa" * 32, "val_sha256": "bb" * 32},
    "tokenizer": {"characters": "abc"},
    "device_name": "cpu",
    "world_size": 1,
}
VAL = {0: 4.0, 50: 2.1, 75: 2.0, 100: 2.05}  # the best is not the last


def write_run(folder, val=VAL, shift=0.0, **facts):
    """Metrics every 5 steps, half a second and 1536 tokens a step; `facts` replace parts of config.json."""
    folder.mkdir()
    config = {key: value | facts.pop(key, {}) if key == "config" else value for key, value in CONFIG.items()}
    (folder / "config.json").write_text(json.dumps(config | facts))
    lines = []
    for step in range(0, 101, 5):
        line = {"step": step, "tokens": 1536 * step, "seconds": 0.5 * step}
        if step < 100:
            line["train/loss"] = 2.0 + 2.0 * 0.9**step + shift
        if step in val:
            line["val/loss"] = None if val[step] is None else val[step] + shift
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def cells(printed):
    """{run: {column: text}} of the table that was printed."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_numbers_of_the_table(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", shift=-0.03, config={"optimizer_name": "sophiag"})
    compare.main([a, b])
    printed = capsys.readouterr().out
    assert cells(printed)[a] == {
        "run": a, "optimizer": "adamw", "steps": "100", "tokens": "153,600", "final val/loss": "2.0500",
        "difference": "", "best val/loss": "2.0000", "seconds": "50.0", "tokens/s": "3,072",
    }  # fmt: skip
    row = cells(printed)[b]
    assert (row["optimizer"], row["final val/loss"], row["difference"]) == ("sophiag", "2.0200", "-0.0300")
    assert "nats a character" in printed and "one seed each: no significance can be claimed" in printed
    assert "better" not in printed and "not finished" not in printed and "devices" not in printed


def test_a_run_that_stopped_early_or_diverged_is_shown_as_such(tmp_path, capsys):
    a = write_run(tmp_path / "a", val={0: 4.0, 50: 2.1})
    b = write_run(tmp_path / "b", val={0: 4.0, 50: 3.0, 100: None}, device_name="NVIDIA H200")
    compare.main([a, b, f"--out={tmp_path / 'figure'}"])
    printed = capsys.readouterr().out
    rows = cells(printed)
    assert (rows[a]["steps"], rows[a]["seconds"], rows[a]["tokens"]) == ("50", "25.0", "76,800"), "of that evaluation"
    assert f"{a} is not finished: its numbers are those of step 50 of 100." in printed
    assert (rows[b]["final val/loss"], rows[b]["difference"], rows[b]["best val/loss"]) == ("inf", "+inf", "3.0000")
    assert f"{a} on 1 x cpu, {b} on 1 x NVIDIA H200" in printed


def test_figures(tmp_path, capsys):
    runs = [write_run(tmp_path / name, shift=i / 10, tokenizer="gpt2") for i, name in enumerate("abcdefghi")]
    prefix = tmp_path / "new" / "figure"
    compare.main([*runs, f"--out={prefix}"])
    assert "nats a token" in capsys.readouterr().out
    png, svg = (prefix.with_suffix(suffix).read_bytes() for suffix in (".png", ".svg"))
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (1650, 750)
    assert svg.startswith(b"<?xml") and b"loss (nats a token)" in svg and b"training time (seconds)" in svg
    compare.main([*runs, f"--out={prefix}"])
    assert prefix.with_suffix(".svg").read_bytes() == svg, "the same runs give the same file"


def test_running_mean():
    steps = np.arange(10.0)
    assert np.allclose(compare.running_mean([steps, steps**2], 3), [steps[1:-1], steps[1:-1] ** 2 + 2 / 3])
    assert np.array_equal(compare.running_mean([steps], 1), [steps])


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"data": {"train_sha256": "cc" * 32, "val_sha256": "bb" * 32}}, "training data (SHA-256) (cccccccccccccccc,"),
        ({"data": {"train_sha256": "aa" * 32, "val_sha256": "cc" * 32}}, "validation data (SHA-256)"),
        ({"tokenizer": "gpt2"}, "tokenizer (gpt2, not {'characters'"),
        ({"config": {"total_bs": 48}}, "total_bs * block_size (3072, not 1536)"),
        ({"config": {"total_bs": 12, "block_size": 128}}, "block_size (128, not 64)"),
        ({"config": {"eval_tokens": 4096}}, "eval_tokens (4096, not 8192)"),
    ],
)
def test_runs_that_are_not_comparable(tmp_path, capsys, facts, said):
    a, b, c = write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "c", **facts)
    refused(capsys, [a, b, c], f"{c} differs from {a} in {said}")
    compare.main([a, b, c, "--force"])
    assert set(cells(capsys.readouterr().out)) == {a, b, c}


def test_other_seeds_rates_and_micro_batches_are_comparable(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"batch_size": 3, "seed": 2, "max_iters": 200})
    compare.main([a, b])
    assert "step 100 of 200" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda run: (run / "config.json").unlink(), "config.json is missing"),
        (lambda run: (run / "config.json").write_text('{"config": {"total'), "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"config": {}}'), "config.json is damaged (KeyError: 'data')"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 0, "train/loss": 4.0}\n'), "has no val/loss"),
    ],
)
def test_damaged_runs(tmp_path, capsys, damage, said):
    run = write_run(tmp_path / "a")
    damage(tmp_path / "a")
    refused(capsys, [run], said)


def test_bad_command_lines(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    refused(capsys, ["--out=x"], "RUN")
    refused(capsys, [run, "--wat"], "--wat")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command(lambda: compare.main([run, f"--out={tmp_path}/file/figure"]))
    assert "cannot write there" in capsys.readouterr().err


def refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as done:
        command(lambda: compare.main(arguments))
    printed = capsys.readouterr()
    assert done.value.code == 2 and printed.out == "" and said in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
