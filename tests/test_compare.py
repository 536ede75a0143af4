"""compare.py as a command: what it prints and writes, what it refuses."""

import sys
import types

import pytest

import compare
from tests.analysis.made_runs import write_run, write_seeds
from training.errors import command


def test_what_is_printed_is_written_too_with_a_row_for_each_run(tmp_path, capsys):
    runs = [*write_seeds(tmp_path, "adamw", [2.0, 2.01]), *write_seeds(tmp_path, "lion", [1.9, 1.91])]
    compare.main(runs)
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:4]] == ["adamw", "lion"]
    compare.main([*runs, f"--out={tmp_path / 'out' / 'figure'}"])
    text, _, wrote = capsys.readouterr().out.partition("wrote ")
    assert text == printed and "figure.md" in wrote and "figure_final.png" in wrote
    written = (tmp_path / "out" / "figure.md").read_text()
    assert written.startswith(printed) and all(f"| {run} " in written for run in runs)


def test_runs_that_are_not_comparable_need_force_or_scaling(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", tokenizer="gpt2")
    refused(capsys, [a, b], f"{b} differs from {a} in tokenizer")
    compare.main([a, b, "--force"])
    larger = write_run(tmp_path / "larger", model={"num_params": int(1e7)})
    capsys.readouterr()
    refused(capsys, [a, larger], "model parameters")
    compare.main([a, larger, "--scaling"])
    assert "baseline of this size" in capsys.readouterr().out


def test_a_sweeps_folder_may_be_named_with_its_state(tmp_path, capsys):
    runs = write_seeds(tmp_path, "adamw", [1.0, 1.1])
    compare.main(runs)
    printed = capsys.readouterr().out
    compare.main([*runs, str(tmp_path / "sweep.json")])
    assert capsys.readouterr().out == printed
    refused(capsys, [str(tmp_path / "sweep.json")], "name the out_dir of a run")


@pytest.mark.parametrize("error", [RuntimeError("api_key not configured"), ValueError()])
def test_a_failure_of_wandb_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = write_run(tmp_path / "a")
    with pytest.raises(SystemExit) as ended:
        command(lambda: compare.main([run, f"--out={tmp_path}/figure", "--wandb"]))
    assert ended.value.code == 2 and f"wandb raised {type(error).__name__}" in capsys.readouterr().err


def test_names_that_are_no_utf8_are_written_out(tmp_path):
    runs = write_seeds(tmp_path, "adamw\udcff", [2.0, 2.01], optimizer_name="adamw\udcff")
    compare.main([*runs, f"--out={tmp_path / 'figure'}"])
    assert "\\udcff" in (tmp_path / "figure.md").read_text(encoding="utf-8")


def test_bad_command_lines_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    refused(capsys, ["--out=x"], "RUN")
    refused(capsys, [run, "--wat"], "--wat")
    refused(capsys, [run, "--wandb"], "--out")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command(lambda: compare.main([run, f"--out={tmp_path}/file/figure"]))
    assert "cannot be read or written" in capsys.readouterr().err


def refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as done:
        command(lambda: compare.main(arguments))
    printed = capsys.readouterr()
    assert done.value.code == 2 and printed.out == "" and message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_wandb_gets_the_figures(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            calls.append("finished")

        def log(self, figures):
            calls.append(figures)

    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or FakeRun(), Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    compare.main([write_run(tmp_path / "a"), f"--out={tmp_path / 'f'}", "--wandb"])
    uploaded = {name: f"{tmp_path / name}.png" for name in ("f", "f_training", "f_final")}
    assert calls == [{"project": "sophia", "name": "f", "job_type": "compare"}, uploaded, "finished"]
