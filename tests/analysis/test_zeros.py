"""Runs whose measured numbers are 0: a run that has learned its data, and a clock that did not move."""

import json
import pathlib
import warnings

import compare
from tests.analysis.made_runs import write_seeds

ZERO = ("train/loss", "val/loss", "grad_norm", "seconds", "tokens", "flops", "lr", "train/clip_rate", "train/win_rate")


def test_tables_and_figures_of_numbers_that_are_0(tmp_path, capsys):
    runs = []
    for optimizer, n_embd in (("adamw", 1), ("lion", 1)):
        for steps in (100, 200, 400):
            runs += write_seeds(tmp_path / str(n_embd), optimizer, [2.0, 2.01], steps=steps, n_embd=n_embd)
    for i, run in enumerate(runs):
        path = pathlib.Path(run, "metrics.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line | {key: 0.0 for key in ZERO if key in line or key == "train/win_rate"} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        facts = json.loads(pathlib.Path(run, "config.json").read_text())
        facts["model"]["num_params"] = 1000 * (1 + i // 2 % 3)
        pathlib.Path(run, "config.json").write_text(json.dumps(facts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare.main([*runs, f"--out={tmp_path / 'out'}", "--scaling"])
    assert "adamw" in capsys.readouterr().out
