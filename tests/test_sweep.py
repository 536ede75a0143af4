"""sweep.py: equal budgets, what it runs and what it does not run again, kills, failures. Most with a stub for runs."""

import collections
import itertools
import json
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import pytest

import figures
import sweep
from tests.conftest import ROOT, read_lines, tiny_words
from training.config import load_config
from training.errors import command

STUB = """
import json, os, pathlib, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
out, rate, seed = pathlib.Path(words["out_dir"]), float(words["learning_rate"]), int(words.get("seed", 0))
begun, gpu = (out / "ckpt.pt").exists(), os.environ.get("CUDA_VISIBLE_DEVICES")
with open(out.parent / "started", "a") as file:
    file.write(f"{out.name} {'resume' if begun else 'scratch'} {gpu}\\n")
(out / f"shared {'SHARED_DEVICE' in os.environ}").touch()
if rate == 9.0:
    print("some lines")
    sys.exit("error: boom")
metrics, last = out / "metrics.jsonl", int(words["max_iters"])
first = len(metrics.read_text().splitlines()) if begun else 0
with open(metrics, "a" if first else "w") as file:
    for step in range(first, last + 1):
        loss = None if rate == 8.0 else 1 + (rate - 0.5) ** 2 + seed
        file.write(json.dumps({"step": step} | ({"val/loss": loss} if step == last else {})) + "\\n")
        file.flush()
        (out / "ckpt.pt").touch()
        time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
"""
COMMON = {"total_bs": 8, "batch_size": 8, "block_size": 4, "max_iters": 5, "warmup_iters": 0}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(sweep, "FIRST_ORDER", (str(tmp_path / "stub.py"), sweep.AdamConfig))
    monkeypatch.setattr(sweep, "SOPHIA", (str(tmp_path / "stub.py"), sweep.SophiaConfig))
    return tmp_path


def write_sweep(tmp_path, optimizers, runs=None, **common):
    path = tmp_path / "sweep_file.py"
    path.write_text(f"common = {COMMON | common!r}\noptimizers = {optimizers!r}\nruns = {runs!r}\n")
    return str(path)


def started(out_dir):
    lines = (out_dir / "started").read_text().splitlines() if (out_dir / "started").exists() else []
    return [line.split() for line in lines]


def state(out_dir):
    return {run["run"]: run for run in json.loads((out_dir / "sweep.json").read_text())["runs"]}


def test_a_sweep(stub, capsys):
    optimizers = {
        "adamw": {"learning_rate": [0.1, 0.2, 0.3, 0.4, 0.6, 9.0], "weight_decay": 0.5},
        "sophiag": {"learning_rate": [0.5, 0.7, 8.0], "rho": [0.01, 0.1]},
    }
    path, out = write_sweep(stub, optimizers), stub / "out"
    sweep.main([path, f"--out_dir={out}", "--seeds=2", "--jobs=2"])
    runs = state(out)
    assert len(runs) == 16 and len(started(out)) == 16
    run = runs["sophiag_learning_rate=0.7_rho=0.1"]
    assert run["loss"] == pytest.approx(1.04) and run["swept"] == {"learning_rate": 0.7, "rho": 0.1}
    failed, diverged = runs["adamw_learning_rate=9.0"], runs["sophiag_learning_rate=8.0_rho=0.1"]
    assert failed["loss"] == "inf" and failed["error"] == "exit code 1: error: boom"
    assert diverged["loss"] == "inf" and diverged["error"] == ""
    assert [runs[f"best_sophiag_learning_rate=0.5_rho=0.01_seed{seed}"]["loss"] for seed in (1, 2)] == [2.0, 3.0]
    printed = capsys.readouterr().out
    assert "sophiag: best of 6 runs 1.0000 at learning_rate=0.5, rho=0.01; 2 failed or diverged; with fresh seeds" in (
        printed
    )
    for name in ("learning_rate", "rho", "sophiag"):
        assert (out / f"sweep_{name}.png").stat().st_size > 5000 and (out / f"sweep_{name}.svg").exists()
    assert "diverged" in (out / "sweep_sophiag.svg").read_text(), "the heat map"

    sweep.main([path, f"--out_dir={out}", "--seeds=2"])
    assert len(started(out)) == 16 and state(out) == runs, "nothing to do"
    for folder in ("adamw_learning_rate=9.0", "adamw_learning_rate=0.4"):
        for file in (out / folder).iterdir():
            file.unlink()
        (out / folder).rmdir()
    sweep.main([path, f"--out_dir={out}", "--seeds=2"])
    assert len(started(out)) == 18 and state(out) == runs, "what was removed runs again"
    capsys.readouterr()
    refused(capsys, [write_sweep(stub, optimizers, max_iters=6), f"--out_dir={out}"], "holds another sweep")


@pytest.mark.parametrize("gpus, jobs", [([], 1), ([], 2), (["0", "1"], 2), (["0", "1"], 3)])
def test_runs_know_whether_they_share_their_device(stub, monkeypatch, gpus, jobs):
    monkeypatch.setattr(sweep, "APART", 0)
    monkeypatch.setattr(sweep, "visible_gpus", lambda: gpus)
    monkeypatch.setenv("SHARED_DEVICE", "1")  # of another sweep
    path = write_sweep(stub, {"adamw": {"learning_rate": [0.1, 0.2, 0.3, 0.4]}})
    sweep.main([path, f"--out_dir={stub / 'out'}", f"--jobs={jobs}"])
    told = [file.name for file in stub.glob("out/*/shared *")]
    assert told == [f"shared {jobs > max(1, len(gpus))}"] * 4


def test_runs_that_share_a_gpu_start_apart(stub, monkeypatch):
    monkeypatch.setattr(sweep, "APART", 0.9)
    monkeypatch.setattr(sweep, "visible_gpus", lambda: ["0", "1"])
    starts, start = [], sweep.Trial.start

    def watched(trial, device, *more):
        starts.append((device, time.monotonic()))
        return start(trial, device, *more)

    monkeypatch.setattr(sweep.Trial, "start", watched)
    path = write_sweep(stub, {"adamw": {"learning_rate": [0.1, 0.2, 0.3, 0.4, 0.6, 0.7]}})
    sweep.main([path, f"--out_dir={stub / 'out'}", "--jobs=4"])
    times = {gpu: [at for device, at in starts if device == gpu] for gpu in "01"}
    assert len(times["0"]) == len(times["1"]) == 3 and abs(times["0"][0] - times["1"][0]) < 0.5
    assert all(b - a > 0.9 for own in times.values() for a, b in itertools.pairwise(own))


def test_a_seed_that_is_swept_is_not_tuned(stub, capsys):
    """The stub's loss is 1 + (rate - 0.5)^2 + seed: the mean over seeds 0, 1 and 2 of the best rate is 2."""
    path, out = write_sweep(stub, {"adamw": {"learning_rate": [0.3, 0.5], "seed": [0, 1, 2]}}), stub / "out"
    sweep.main([path, f"--out_dir={out}"])
    assert "adamw: best of 2 runs 2.0000 at learning_rate=0.5 (means of 3 seeds)" in capsys.readouterr().out
    assert {figure.name for figure in out.glob("*.png")} == {"sweep_learning_rate.png"}
    assert len(state(out)) == 6


def test_a_random_search(stub, capsys):
    rates = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7]
    optimizers = {
        "adamw": {"learning_rate": rates, "beta1": [0.8, 0.9, 0.95]},
        "sophiag": {"learning_rate": [*rates, 8.0], "rho": [0.01, 0.1, 1.0]},
    }
    path, out = write_sweep(stub, optimizers, runs=7), stub / "out"
    sweep.main([path, f"--out_dir={out}", "--seeds=1", "--jobs=2"])
    runs = [run for run in state(out).values() if run["seed"] is None]
    assert [run["optimizer"] for run in runs] == ["adamw"] * 7 + ["sophiag"] * 7
    assert len({run["run"] for run in runs}) == 14 and len(started(out)) == 16
    assert "adamw: best of 7 runs" in capsys.readouterr().out
    figure = (out / "sweep_learning_rate.svg").read_text()
    assert "star: best run" in figure and "line" not in figure.split("final val/loss")[1].split("-->")[0]
    assert (out / "sweep_sophiag.png").exists(), "the heat map, with empty cells"
    refused(capsys, [write_sweep(stub, optimizers, runs=8), f"--out_dir={out}"], "holds another sweep")
    impossible = optimizers | {"adamw": {"learning_rate": [*rates, -1.0, 0.5]}}
    refused(capsys, [write_sweep(stub, impossible, runs=1), f"--out_dir={out}"], "learning_rate = -1.0 is not possible")


def test_the_draw_belongs_to_the_optimizer(tmp_path):
    """It is the same beside others, a longer one starts with it, all combinations come, and none more often."""

    def names(**definition):
        trials = sweep.grid({"common": COMMON} | definition, tmp_path)
        return [trial.folder.name for trial in trials if trial.optimizer == "adamw"]

    adamw = {"learning_rate": [0.1, 0.2, 0.3, 0.4], "beta1": [0.8, 0.9], "beta2": [0.9, 0.95, 0.99]}
    drawn = names(optimizers={"adamw": adamw}, runs=6)
    assert drawn == names(optimizers={"lion": adamw, "adamw": adamw, "sophiag": adamw | {"rho": [1, 2]}}, runs=6)
    assert names(optimizers={"adamw": adamw}, runs=24)[:6] == drawn
    assert sorted(names(optimizers={"adamw": adamw}, runs=24)) == sorted(names(optimizers={"adamw": adamw}))
    assert drawn != names(optimizers={"adamw": adamw})[:6]
    assert drawn[0] == "adamw_learning_rate=0.4_beta1=0.9_beta2=0.95", "on any machine"


def test_every_combination_is_as_likely():
    """Of 6 trials 2 are drawn for 3000 names: each 1000 times, give or take 4 standard deviations."""
    counts = collections.Counter()
    for i in range(3000):
        trials = [sweep.Trial(f"name {i}", {"lr": lr}, [], pathlib.Path(str(lr)), 1) for lr in range(6)]
        counts.update(trial.swept["lr"] for trial in sweep.draw(trials, 2))
    assert set(counts) == set(range(6)) and all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in counts.values())


@pytest.mark.parametrize("name", ["adamw", "lion", "sophiag"])
def test_the_draw_leaves_no_value_out(name):
    grid = {"lr": range(5), "decay": range(4), "beta1": range(3), "rho": range(4)}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    trials = [sweep.Trial(name, point, [], pathlib.Path(str(point)), 1) for point in points]
    drawn = list(sweep.draw(trials, 16))
    assert len({trial.folder for trial in drawn}) == 16
    for key, values in grid.items():
        counts = collections.Counter(trial.swept[key] for trial in drawn)
        assert min(counts[value] for value in values) >= 16 // len(values) - 1
        assert max(counts.values()) <= 16 // len(values) + 2


def test_figures_of_grids_and_of_random_searches(tmp_path):
    """A line is drawn only through a whole grid; a run that was not drawn has no cell, one that diverged says so."""

    def trials(name, places, values):
        return [
            sweep.Trial(name, {"lr": i, "rho": j}, [], None, 1, loss=loss)
            for (i, j), loss in zip(places, values, strict=True)
        ]

    grid = trials("whole", [(1, 1), (1, 2), (2, 1), (2, 2)], [1.0, 2.0, 3.0, math.inf])
    part = trials("part", [(2, 1), (1, 2), (1, 3)], [1.5, math.inf, 2.5])
    figures.draw_sweep(grid, tmp_path / "grid")
    figures.draw_sweep(part, tmp_path / "part")
    figures.draw_sweep(grid + part, tmp_path / "both")
    texts = {path.parent.name: path.read_text() for path in tmp_path.glob("*/sweep_lr.svg")}
    assert {name: ("<!-- (line: best over" in text, "star: best" in text) for name, text in texts.items()} == {
        "grid": (True, False), "part": (False, True), "both": (True, True),
    }  # fmt: skip
    cells = {name: (tmp_path / "both" / f"sweep_{name}.svg").read_text() for name in ("whole", "part")}
    assert cells["whole"].count("diverged") == cells["part"].count("diverged") == 1
    assert "<!-- nan" not in cells["part"] and "<!-- 1.500 -->" in cells["part"] and "<!-- 2.500 -->" in cells["part"]


def test_one_run_on_each_gpu(stub, monkeypatch):
    monkeypatch.setattr(sweep, "visible_gpus", lambda: ["3", "5"])
    monkeypatch.setenv("STUB_SECONDS", "0.05")
    sweep.main([write_sweep(stub, {"lion": {"learning_rate": [0.1, 0.2, 0.3, 0.4]}}), f"--out_dir={stub / 'out'}"])
    devices = [words[2] for words in started(stub / "out")]
    assert sorted(devices) == ["3", "3", "5", "5"] and set(devices[:2]) == {"3", "5"}


def test_killed_twice_it_does_what_is_missing(stub):
    """First the sweep alone, without warning: its run goes on, and holds the folder. Then both, by SIGTERM."""
    path, out = write_sweep(stub, {"adamw": {"learning_rate": [0.1, 0.2, 0.3]}}), stub / "out"
    code = (
        f"import sweep; sweep.FIRST_ORDER = ({str(stub / 'stub.py')!r}, sweep.AdamConfig); "
        f"from training.errors import command; command(lambda: sweep.main([{path!r}, '--out_dir={out}']))"
    )
    slow = os.environ | {"STUB_SECONDS": "0.4"}

    def begin():
        words = [sys.executable, "-c", code]
        return subprocess.Popen(words, env=slow, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    first = begin()
    wait_for(lambda: len(started(out)) == 1 and (out / "adamw_learning_rate=0.1" / "metrics.jsonl").exists())
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with pytest.raises(sweep.UserError, match="still at work"):
        sweep.main([path, f"--out_dir={out}"])
    wait_for(lambda: len((out / "adamw_learning_rate=0.1" / "metrics.jsonl").read_text().splitlines()) == 6)

    time.sleep(0.6)
    second = begin()
    cut = out / "adamw_learning_rate=0.2" / "metrics.jsonl"
    wait_for(lambda: cut.exists() and len(cut.read_text().splitlines()) >= 2)
    second.send_signal(signal.SIGTERM)
    second.communicate()
    assert second.returncode == 143
    lines = cut.read_text()
    time.sleep(0.6)
    assert cut.read_text() == lines and len(lines.splitlines()) < 6, "its run has ended with it"
    assert [run["loss"] for run in state(out).values()] == [pytest.approx(1.16), None, None]

    sweep.main([path, f"--out_dir={out}"])
    assert [run["loss"] for run in state(out).values()] == pytest.approx([1.16, 1.09, 1.04])
    assert [words[:2] for words in started(out)] == [
        ["adamw_learning_rate=0.1", "scratch"],
        ["adamw_learning_rate=0.2", "scratch"],
        ["adamw_learning_rate=0.2", "resume"],
        ["adamw_learning_rate=0.3", "scratch"],
    ]
    assert [json.loads(line)["step"] for line in cut.read_text().splitlines()] == list(range(6))


@pytest.mark.parametrize("ending", ["import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "raise SystemExit(0)"])
def test_a_run_ended_by_a_signal_is_no_result(stub, ending):
    (stub / "stub.py").write_text(ending)
    out = stub / "out"
    with pytest.raises(sweep.UserError, match="ended by a signal"):
        sweep.main([write_sweep(stub, {"adamw": {"learning_rate": [0.1]}}), f"--out_dir={out}"])
    assert [(run["loss"], run["error"]) for run in state(out).values()] == [(None, "")]


def test_with_the_real_script(corpus, tmp_path):
    settings = dict(word[2:].split("=", 1) for word in tiny_words(corpus, ""))
    del settings["out_dir"]
    settings |= {"max_iters": 6, "eval_interval": 3, "learning_rate": [0.01]}
    sweep.main([write_sweep(tmp_path, {"adamw": {}}, **settings), f"--out_dir={tmp_path / 'out'}"])
    (run,) = state(tmp_path / "out").values()
    lines = read_lines(tmp_path / "out" / "adamw_learning_rate=0.01")
    assert (lines[-1]["step"], lines[-1]["val/loss"]) == (6, run["loss"])


@pytest.mark.parametrize(
    "runs, said",
    [
        (5, "lion has 4 combinations, fewer than runs = 5"),
        (0, "runs = 0, wants a whole number from 1 on"),
        (2.0, "runs = 2.0, wants a whole number"),
        (True, "runs = True, wants a whole number"),
    ],
)
def test_impossible_numbers_of_runs(tmp_path, capsys, runs, said):
    optimizers = {"adamw": {"learning_rate": [1, 2, 3, 4, 5]}, "lion": {"learning_rate": [1, 2, 3, 4]}}
    refused(capsys, [write_sweep(tmp_path, optimizers, runs), f"--out_dir={tmp_path / 'out'}"], said)
    twice = {"adamw": {"learning_rate": [1, 2, 3, 1]}}
    refused(capsys, [write_sweep(tmp_path, twice, 1), f"--out_dir={tmp_path / 'out'}"], "a value twice")


@pytest.mark.parametrize(
    "optimizers, said",
    [
        ({"adamw": {"learning_rate": [1, 2]}, "lion": {"learning_rate": [1]}}, "lion has 1 runs and adamw 2"),
        ({"adamw": {"learning_rate": 1.0}, "lion": {"max_iters": 6}}, "lion has a run of 192 tokens, adamw of 160"),
        ({"adamw": {"max_iters": [5, 6]}}, "adamw has a run of 192 tokens, adamw of 160"),
        ({"adamw": {"learning_rat": [1]}}, "no setting 'learning_rat'"),
        ({"adam": {"learning_rate": [1]}}, "one of adamw, nadamw, sgd, lion, muon, soap"),
        ({"sophiag": {"rho": [-1.0]}}, "rho = -1.0 is not possible"),
        ({}, "assigns dicts"),
        ([1], "assigns dicts"),
        ({"adamw": [1]}, "assigns dicts"),
        ({"adamw": {"learning_rate": []}}, "an empty list"),
        ({"adamw": {"learning_rate": [0.1, 0.1]}}, "a value twice"),
        ({"adamw": {"learning_rate": {0.1}}}, "settings are numbers"),
    ],
)
def test_unequal_budgets_and_impossible_settings(tmp_path, capsys, optimizers, said):
    refused(capsys, [write_sweep(tmp_path, optimizers), f"--out_dir={tmp_path / 'out'}"], said)
    assert not (tmp_path / "out").exists()


def test_bad_files(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("common = 1 / 0")
    refused(capsys, [str(tmp_path / "bad.py"), "--out_dir=x"], "ZeroDivisionError")
    refused(capsys, [str(tmp_path / "none.py"), "--out_dir=x"], "cannot read")
    path = write_sweep(tmp_path, {"adamw": {}})
    refused(capsys, [path, f"--out_dir={tmp_path}/bad.py"], "cannot write there")
    refused(capsys, [path, "--out_dir=x", "--jobs=0"], "--jobs 1 or more")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{")
    refused(capsys, [path, f"--out_dir={tmp_path / 'out'}"], "sweep.json is damaged")


RUNS = {"30m_lr": 32, "30m_hess_bs": 6, "30m_python": 96, "30m_books": 128, "rho_beta2": 16, "30m_attn": 9}
RUNS |= {"30m_python_780": 36, "30m_python_1560": 36, "30m_python_5200": 33, "30m_large": 36, "124m_python": 5}
RUNS |= {"30m_recipe": 22, "30m_eigenbasis": 32, "30m_eigenbasis_recipe": 13, "30m_eigenbasis_fresh": 12}
RUNS |= {"30m_python_3120": 3, "30m_python_7800": 3, "30m_again_780": 15, "30m_again_1560": 15}
RUNS |= {"30m_further": 50, "30m_spectral": 16}


def test_ready_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {path.stem for path in ROOT.glob("config/sweep_*.py")} == {f"sweep_{name}" for name in RUNS}
    for name, runs in RUNS.items():
        trials = sweep.grid(sweep.read_sweep(f"config/sweep_{name}.py"), tmp_path)
        assert len(trials) == runs == len({trial.folder for trial in trials}), name


TUNINGS = "30m_python", "30m_eigenbasis", "30m_spectral"


def configs(name, tmp_path):
    """{run: its settings} of a ready sweep, and of each optimizer the settings of its best run in the equal tunings."""
    trials = sweep.grid(sweep.read_sweep(f"config/sweep_{name}.py"), tmp_path)
    states = [ROOT / f"assets/evidence/{tuning}/sweep.json" for tuning in TUNINGS]
    runs, best = [run for state in states for run in json.loads(state.read_text())["runs"]], {}
    for run in sorted(runs, key=lambda run: float(run["loss"] or "inf"), reverse=True):
        best[run["optimizer"]] = run["swept"]
    for trial in trials:
        kind = sweep.SophiaConfig if "sophia" in trial.optimizer else sweep.AdamConfig
        tuned = {"sophiag_tuned": "sophiag_adamw", "nadamw": "adamw", "sophiag_eigenbasis_fresh": "sophiag_eigenbasis"}
        fresh = name.startswith(("30m_python", "30m_large"))
        kept = "sophiag_eigenbasis_fresh" if fresh else "sophiag_eigenbasis"
        later = {"beta2": 0.9, "hess_interval": 5, "embedding_lr": 1.6e-2} if trial.optimizer == kept else {}
        yield trial, vars(load_config(kind, trial.words[1:])), best[tuned.get(trial.optimizer, trial.optimizer)] | later


@pytest.mark.parametrize(
    "name", [f"python_{length}" for length in (780, 1560, 3120, 5200, 7800)] + ["again_780", "again_1560"]
)
def test_what_was_best_runs_longer(tmp_path, monkeypatch, name):
    """With the settings of the tuning's best run, the warm-up's share included, and seeds of its own."""
    monkeypatch.chdir(ROOT)
    length = int(name.split("_")[1])
    for trial, config, best in configs(f"30m_{name}", tmp_path):
        assert config["max_iters"] == length == config["lr_decay_iters"] and config["warmup_iters"] > 0
        assert config["warmup_iters"] * 780 == best.pop("warmup_iters") * length
        assert {key: config[key] for key in best} == best and config["seed"] == trial.swept["seed"]
        assert (config["total_bs"], config["block_size"], config["dataset"]) == (128, 512, "python")
        assert not config["scale_attn_by_inverse_layer_idx"]
        if "sophia" in trial.optimizer:
            assert config["bias_correction"]
            assert (config["adamw_for"] == "none") == (trial.optimizer in ("sophiag", "sophiah"))


def test_the_tuned_recipe_is_the_best_of_its_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = vars(load_config(sweep.SophiaConfig, ["config/train_gpt2_30m_sophiag_tuned.py"]))
    trials = [trial for trial, *_ in configs("30m_python_1560", tmp_path) if trial.optimizer == "sophiag_spectral"]
    config = vars(load_config(sweep.SophiaConfig, trials[0].words[1:]))
    assert {key for key in config if recipe[key] != config[key]} == {"out_dir", "seed"}


def test_what_was_best_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert all(config["scale_attn_by_inverse_layer_idx"] for _, config, _ in configs("30m_attn", tmp_path))
    shares = {}
    for trial, config, best in configs("30m_large", tmp_path):
        assert config["total_bs"] * config["block_size"] == 2**19
        shares.setdefault(trial.optimizer, []).append(best["learning_rate"] / config["learning_rate"])
        if "sophia" in trial.optimizer:
            assert config["hess_bs"] == (64 if config["eigenbasis"] else 256)
        assert config["embedding_lr"] == best["embedding_lr"] and config["warmup_iters"] == best["warmup_iters"] // 3
    assert len(shares) == 9 and shares.pop("muon") == [0.125, 0.25, 0.5, 1]
    assert shares.pop("sophiag_spectral") == [0.25, 0.5, 1, 2]
    assert all(own == [1, 2, 4, 8] for own in shares.values())
    for _, config, best in configs("124m_python", tmp_path):
        assert (config["n_layer"], config["n_embd"]) == (12, 768) and not config["scale_attn_by_inverse_layer_idx"]
        assert config["learning_rate"] == best["learning_rate"] / 2 and config["embedding_lr"] == best["embedding_lr"]
        assert config["max_iters"] * config["total_bs"] * config["block_size"] > 300e6
    assert all(config["adamw_for"] == "embeddings" for _, config, _ in configs("rho_beta2", tmp_path))


def test_best_of(tmp_path, monkeypatch):
    best_of = runpy.run_path(str(ROOT / "config/best.py"))["best_of"]
    monkeypatch.setitem(best_of.__globals__, "EVIDENCE", tmp_path)
    rates = [("adamw", 1, 2.0), ("adamw", 2, 1.5), ("lion", 1, "inf"), ("muon", 1, None), ("muon", 2, 1.0)]
    rates += [("mixed", 3, 1.9), ("mixed", 4, "inf")]
    runs = [{"optimizer": n, "swept": {"learning_rate": r, "warmup_iters": 10 * r}, "seed": None, "loss": loss}
            for n, r, loss in rates]  # fmt: skip
    runs.append({**runs[0], "seed": 1, "loss": 0.1})
    common = {"max_iters": 100, "learning_rate": [1, 2], "weight_decay": 0.3, "seed": 1}
    named = {n: {"config": f"{n}.py"} for n in ("adamw", "lion", "muon")}
    named["mixed"] = {"optimizer_name": "sophiag", "weight_decay": 0.4}
    (tmp_path / "tuned").mkdir()
    state = {"sweep": {"common": common, "optimizers": named}, "runs": runs}
    (tmp_path / "tuned" / "sweep.json").write_text(json.dumps(state))
    assert best_of("tuned", max_iters=250, only=("adamw", "mixed")) == {
        "adamw": {"optimizer_name": "adamw", "config": "adamw.py", "weight_decay": 0.3, "learning_rate": 2,
                  "warmup_iters": 50},
        "mixed": {"optimizer_name": "sophiag", "weight_decay": 0.4, "learning_rate": 3, "warmup_iters": 75},
    }  # fmt: skip
    for untuned in ("lion", "muon", "sgd"):
        with pytest.raises(ValueError, match=f"{untuned} is not tuned yet"):
            best_of("tuned", max_iters=250, only=("adamw", untuned))
    with pytest.raises(ValueError, match="not tuned"):
        best_of("tuned", max_iters=250)


@pytest.mark.parametrize("corpus, steps", [("python", 780), ("books", 390)])
def test_the_equal_tuning_at_30m(tmp_path, monkeypatch, corpus, steps):
    """What a run of it really gets, in all that the comparison rests on."""
    monkeypatch.chdir(ROOT)
    for trial in sweep.grid(sweep.read_sweep(f"config/sweep_30m_{corpus}.py"), tmp_path):
        config = load_config(sweep.SophiaConfig if "sophia" in trial.optimizer else sweep.AdamConfig, trial.words[1:])
        name, rotated = trial.optimizer.split("_")[0], "eigenbasis" in trial.optimizer
        adamws = {"_adamw": "embeddings", "_eigenbasis": "embeddings", "_spectral": "embeddings+scalars"}
        hess_bs = {"_eigenbasis": 16, "_spectral": 8}
        kind = trial.optimizer.removeprefix(name)
        assert (config.optimizer_name, config.dataset, config.n_layer) == (name, corpus, 6)
        assert getattr(config, "adamw_for", "none") == adamws.get(kind, "none")
        assert (config.max_iters, config.total_bs, config.block_size) == (steps, 128, 512)
        assert config.warmup_iters / steps in ((0.1, 0.2, 0.4) if rotated else (0.2, 0.4))
        assert config.min_lr == config.learning_rate / 20 and config.grad_clip == 1.0 and config.compile
        assert {key: getattr(config, key) for key in trial.swept} == trial.swept
        assert "sophia" not in trial.optimizer or (config.bias_correction and config.hess_bs == hess_bs.get(kind, 32))


def refused(capsys, words, said):
    with pytest.raises(SystemExit) as done:
        command(lambda: sweep.main(words))
    error = capsys.readouterr().err
    assert done.value.code == 2 and said in error and error.startswith("error: ") and error.count("\n") == 1
