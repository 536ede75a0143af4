"""sweep.py: equal budgets, resumed and extended sweeps, kills, failures. Most tests have a stub for training runs."""

import collections
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import sweep
from analysis.runs import label
from tests.conftest import ROOT, read_lines, tiny_words
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
def stub(request, tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(sweep, "FIRST_ORDER", (str(tmp_path / "stub.py"), sweep.AdamConfig))
    monkeypatch.setattr(sweep, "SOPHIA", (str(tmp_path / "stub.py"), sweep.SophiaConfig))
    monkeypatch.setattr(sweep, "git_state", lambda: ("0" * 40, []))
    clock = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10), monotonic=time.monotonic)
    monkeypatch.setattr(sweep, "time", clock)
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(sweep, "draw_sweep", lambda *_: [])
    return tmp_path


@pytest.fixture
def figures():
    """For a test that looks at them; the others save their time."""


def write_sweep(tmp_path, optimizers, runs=None, **common):
    path = tmp_path / "sweep_file.py"
    path.write_text(f"common = {COMMON | common!r}\noptimizers = {optimizers!r}\nruns = {runs!r}\n")
    return str(path)


def started(out_dir):
    lines = (out_dir / "started").read_text().splitlines() if (out_dir / "started").exists() else []
    return [line.split() for line in lines]


def state(out_dir):
    return {run["run"]: run for run in json.loads((out_dir / "sweep.json").read_text())["runs"]}


def name(optimizer, rate, **more):
    """The label of a run that sweeps the learning rate."""
    return label(optimizer, {"learning_rate": rate, **more})


def test_a_sweep_runs_what_is_missing_and_repeats_the_best(figures, stub, capsys):
    optimizers = {
        "adamw": {"learning_rate": [0.1, 0.2, 0.3, 0.4, 0.6, 9.0], "weight_decay": 0.5},
        "sophiag": {"learning_rate": [0.5, 0.7, 8.0], "rho": [0.01, 0.1]},
    }
    path, out = write_sweep(stub, optimizers), stub / "out"
    sweep.main([path, f"--out_dir={out}", "--seeds=2", "--jobs=2"])
    runs = state(out)
    assert len(runs) == 16 and len(started(out)) == 16
    run = runs[name("sophiag", 0.7, rho=0.1)]
    assert run["loss"] == pytest.approx(1.04) and run["swept"] == {"learning_rate": 0.7, "rho": 0.1}
    failed, diverged = runs[name("adamw", 9.0)], runs[name("sophiag", 8.0, rho=0.1)]
    assert failed["loss"] == "inf" and failed["error"] == "exit code 1: error: boom"
    assert diverged["loss"] == "inf" and diverged["error"] == ""
    assert [runs[f"best_{name('sophiag', 0.5, rho=0.01)}_seed{seed}"]["loss"] for seed in (1, 2)] == [2.0, 3.0]
    printed = capsys.readouterr().out
    best = "sophiag: best of 6 runs 1.0000 at learning_rate=0.5, rho=0.01; 2 failed or diverged; with held-out seeds"
    assert best in printed
    for part in ("learning_rate", "rho", "sophiag"):
        assert (out / f"sweep_{part}.png").stat().st_size > 5000 and (out / f"sweep_{part}.svg").exists()
    assert "diverged" in (out / "sweep_sophiag.svg").read_text(), "the heat map"

    sweep.main([path, f"--out_dir={out}", "--seeds=2"])
    assert len(started(out)) == 16 and state(out) == runs, "nothing to do"
    for rate in (9.0, 0.4):
        shutil.rmtree(out / name("adamw", rate))
    sweep.main([path, f"--out_dir={out}", "--seeds=2"])
    assert len(started(out)) == 18 and state(out) == runs, "what was removed runs again"


def test_any_values_give_short_folders(stub):
    """Paths with "/" and seven swept floats: only the settings' digest is in the name."""
    names = "embedding_lr weight_decay beta1 beta2 grad_clip dropout min_lr"
    floats = names.split()
    settings = {"learning_rate": 0.5, "dataset": ["/a/very/long/path"]} | {key: [1 / 7] for key in floats}
    sweep.main([write_sweep(stub, {"adamw": settings}), f"--out_dir={stub / 'out'}"])
    (run,) = state(stub / "out").values()
    assert len(run["run"]) == len("adamw_") + 6 and run["loss"] == 1.0
    assert run["swept"] == {"dataset": "/a/very/long/path"} | dict.fromkeys(floats, 1 / 7)


def test_the_longest_name_fits_in_every_folder(stub):
    """Names are checked before the first run, so that the repeats of the best run have room for theirs."""
    optimizer, out = "x" * 150, stub / "out"
    values = {"optimizer_name": "adamw", "learning_rate": [0.5, 0.6], "weight_decay": [0.1, 0.2]}
    sweep.main([write_sweep(stub, {optimizer: values}), f"--out_dir={out}", "--seeds=1"])
    assert f"best_{label(optimizer, {'learning_rate': 0.5, 'weight_decay': 0.1})}_seed1" in state(out)


# ----- extended and changed sweeps


def test_a_sweep_with_more_values_and_optimizers_keeps_its_runs(stub, capsys):
    out, options = stub / "out", [f"--out_dir={stub / 'out'}", "--seeds=1"]
    sweep.main([write_sweep(stub, {"adamw": {"learning_rate": [0.3, 0.9]}}), *options])
    before = state(out)
    rates = {"learning_rate": [0.1, 0.3, 0.5, 0.9]}
    sweep.main([write_sweep(stub, {"adamw": rates, "lion": rates}), *options])
    assert len(started(out)) == 3 + 2 + 1 + 4 + 1, "what was there did not run again"
    after = state(out)
    assert {run: after[run] for run in before} == before, "the repeats of the former best run stay on record"
    assert f"best_{name('adamw', 0.5)}_seed1" in after and len(after) == 11
    printed = capsys.readouterr().out
    assert "adamw: best of 4 runs 1.0000 at learning_rate=0.5; with held-out seeds 2.0000 (n = 1)" in printed


def test_a_random_search_with_more_values_and_runs_keeps_its_draw(stub):
    out = stub / "out"
    rates, betas = [0.1, 0.2, 0.3, 0.4], [0.8, 0.9]
    sweep.main([write_sweep(stub, {"adamw": {"learning_rate": rates, "beta1": betas}}, runs=4), f"--out_dir={out}"])
    before = state(out)
    wider = {"adamw": {"learning_rate": [0.05, *rates, 0.6], "beta1": betas}}
    sweep.main([write_sweep(stub, wider, runs=6), f"--out_dir={out}"])
    after = state(out)
    assert len(after) == 6 == len(started(out)) and before.items() <= after.items()
    assert {after[run]["swept"]["learning_rate"] for run in after.keys() - before.keys()} == {0.05, 0.6}, "least drawn"


@pytest.mark.parametrize(
    "fixed, file, swept",
    [
        ({"beta1": 0.9}, "", [0.9, 0.8]),
        ({}, "", [0.9, 0.8]),  # the default
        ({}, "beta1 = 0.7", [0.7, 0.9]),
        ({"beta1": 0}, "beta1 = 0.7", [0.0, 0.7]),
    ],
)
def test_a_fixed_setting_may_become_swept(stub, fixed, file, swept):
    """The runs that are there have one of its values, and stay under their names."""
    out, rates = stub / "out", {"config": str(stub / "config.py"), "learning_rate": [0.1, 0.5]}
    (stub / "config.py").write_text(file)
    sweep.main([write_sweep(stub, {"adamw": rates | fixed}), f"--out_dir={out}", "--seeds=1"])
    before = state(out)
    for rates["learning_rate"] in ([0.1, 0.5], [0.1, 0.5, 9.0]):
        sweep.main([write_sweep(stub, {"adamw": rates | {"beta1": swept}}), f"--out_dir={out}", "--seeds=1"])
    after, value = state(out), fixed.get("beta1", float(file[8:] or 0.9))
    assert len(started(out)) == 3 + 2 + 2 and len(after) == 7
    assert {run: {**facts, "swept": facts["swept"] | {"beta1": value}} for run, facts in before.items()} == {
        run: after[run] for run in before
    }


def test_a_sweep_keeps_where_its_runs_begin_and_holds_seeds_out(stub, monkeypatch):
    """Runs that fine-tune begin with the weights that they name. Held-out seeds are none of the sweep's."""
    commands, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda words, **settings: commands.append(words) or popen(words, **settings)
    )
    path = write_sweep(stub, {"adamw": {"learning_rate": [0.5]}}, init_from="ckpt:weights.pt", seed=2)
    sweep.main([path, f"--out_dir={stub / 'out'}", "--seeds=3"])
    begins = [[word for word in words if word.startswith(("--init_from", "--overwrite"))] for words in commands]
    assert begins == [["--init_from=ckpt:weights.pt", "--init_from=auto"]] * 4
    assert [words[0][-6:] for words in started(stub / "out")[1:]] == ["_seed1", "_seed3", "_seed4"]


def test_a_sweep_with_names_from_before_labels_goes_on_under_them(stub):
    out, path = stub / "out", write_sweep(stub, {"adamw": {"learning_rate": [0.1, 0.5]}})
    sweep.main([path, f"--out_dir={out}"])
    text = (out / "sweep.json").read_text()
    for rate in (0.1, 0.5):
        (out / name("adamw", rate)).rename(out / f"adamw_learning_rate={rate}")
        text = text.replace(name("adamw", rate), f"adamw_learning_rate={rate}")
    (out / "sweep.json").write_text(text)
    sweep.main([path, f"--out_dir={out}", "--seeds=1"])
    assert [words[0] for words in started(out)][2:] == ["best_adamw_learning_rate=0.5_seed1"]


@pytest.mark.parametrize(
    "optimizers, more, message",
    [
        ({"adamw": {"learning_rate": [0.1], "beta1": 0.9}}, {"max_iters": 6}, "adamw's max_iters = 5, which is 6 now"),
        ({"adamw": {"learning_rate": [0.1], "beta1": 0.8}}, {}, "adamw's beta1 = 0.9, which is 0.8 now"),
        ({"adamw": {"learning_rate": [0.1]}}, {}, "adamw's beta1 = 0.9, which is None now"),
        ({"adamw": {"learning_rate": [0.2], "beta1": 0.9}}, {}, "adamw's learning_rate = [0.1], which is [0.2] now"),
        ({"lion": {"learning_rate": [0.1]}}, {}, "the optimizer adamw, which is missing now"),
        ({"adamw": {"learning_rate": [0.1, 0.2], "beta1": 0.9}}, {"runs": 1}, "runs = None, which is 1 now"),
    ],
)
def test_a_sweep_with_changed_settings_is_refused(stub, capsys, optimizers, more, message):
    out = stub / "out"
    sweep.main([write_sweep(stub, {"adamw": {"learning_rate": [0.1], "beta1": 0.9}}), f"--out_dir={out}"])
    before = (out / "sweep.json").read_bytes()
    capsys.readouterr()
    refused(capsys, [write_sweep(stub, optimizers, **more), f"--out_dir={out}"], message)
    assert (out / "sweep.json").read_bytes() == before and len(started(out)) == 1


def test_a_tree_that_differs_from_its_commit_is_refused(stub, capsys, monkeypatch):
    path, out = write_sweep(stub, {"adamw": {"learning_rate": [0.1]}}), stub / "out"
    monkeypatch.setattr(sweep, "git_state", lambda: ("0" * 40, ["model.py", "sweep.py"]))
    refused(capsys, [path, f"--out_dir={out}"], "model.py differs from the git commit")
    assert not out.exists()
    sweep.main([path, f"--out_dir={out}", "--dirty=True"])
    assert len(started(out)) == 1


# ----- sweep files with options


FUNCTION = f"""
common = {COMMON!r}

def sweep(steps=5, rates="0.1,0.2", longer=False, decay=0.5):
    rates = [float(rate) for rate in rates.split(",")]
    return {{
        "common": common | {{"max_iters": [steps + longer], "weight_decay": decay}},
        "optimizers": {{"adamw": {{"learning_rate": rates}}}},
    }}
"""


def test_a_sweep_files_parameters_are_options(stub, capsys):
    path, out = stub / "options.py", stub / "out"
    path.write_text(FUNCTION)
    sweep.main([str(path), f"--out_dir={out}", "--steps=3", "--rates=0.3", "--longer=True"])
    assert list(state(out)) == [label("adamw", {"max_iters": 4, "learning_rate": 0.3})]
    sweep.main([str(out / "sweep.json"), f"--out_dir={stub / 'again'}"])
    assert state(stub / "again") == state(out), "its sweep.json runs it again"
    with pytest.raises(SystemExit) as done:
        sweep.main([str(path), "--help"])
    printed = capsys.readouterr().out
    assert done.value.code == 0 and "--steps STEPS" in printed and "default '0.1,0.2'" in printed
    refused(capsys, [str(path), f"--out_dir={out}", "--steps=x"], "--steps: invalid int value: 'x'")
    refused(capsys, [str(path), f"--out_dir={out}", "--longer=1"], "--longer: invalid boolean value: '1'")
    refused(capsys, [str(path), f"--out_dir={out}", "--wat=1"], "--wat=1")
    refused(capsys, [str(path), f"--out_dir={out}", "--rates=x"], "raised ValueError")


@pytest.mark.parametrize(
    "code, message",
    [
        ("def sweep(steps): pass", "parameter steps needs a number"),
        ("def sweep(jobs=1): pass", "parameter jobs is an option of sweep.py already"),
        ("def sweep(): return 1", "gives two dicts"),
    ],
)
def test_sweep_functions_that_cannot_be_used_are_refused(tmp_path, capsys, code, message):
    (tmp_path / "bad.py").write_text(code)
    refused(capsys, [str(tmp_path / "bad.py"), f"--out_dir={tmp_path / 'out'}"], message)


# ----- running


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


def test_a_seed_that_is_swept_is_not_tuned(figures, stub, capsys):
    """The stub's loss is 1 + (rate - 0.5)^2 + seed: the mean over seeds 0, 1 and 2 of the best rate is 2."""
    path, out = write_sweep(stub, {"adamw": {"learning_rate": [0.3, 0.5], "seed": [0, 1, 2]}}), stub / "out"
    sweep.main([path, f"--out_dir={out}"])
    assert "adamw: best of 2 runs 2.0000 at learning_rate=0.5 (means of 3 seeds)" in capsys.readouterr().out
    assert {figure.name for figure in out.glob("*.png")} == {"sweep_learning_rate.png"}
    assert len(state(out)) == 6


def test_a_random_search_runs_as_many_of_each_optimizer(figures, stub, capsys):
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
    impossible = optimizers | {"adamw": {"learning_rate": [*rates, -1.0, 0.5]}}
    refused(capsys, [write_sweep(stub, impossible, runs=1), "--out_dir=x"], "learning_rate = -1.0 is not possible")


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
    assert drawn[0] == name("adamw", 0.4, beta1=0.9, beta2=0.95), "on any machine"


def test_every_combination_is_as_likely():
    """Of 6 trials 2 are drawn for 3000 names: each 1000 times, give or take 4 standard deviations."""
    counts = collections.Counter()
    for i in range(3000):
        trials = [sweep.Trial(f"name {i}", {"lr": lr}, [], pathlib.Path(str(lr)), 1) for lr in range(6)]
        counts.update(trial.swept["lr"] for trial in sweep.draw(trials, 2))
    assert set(counts) == set(range(6)) and all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in counts.values())


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sophiag"])
def test_the_draw_leaves_no_value_out(optimizer):
    grid = {"lr": range(5), "decay": range(4), "beta1": range(3), "rho": range(4)}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    trials = [sweep.Trial(optimizer, point, [], pathlib.Path(str(point)), 1) for point in points]
    drawn = list(sweep.draw(trials, 16))
    assert len({trial.folder for trial in drawn}) == 16
    for key, values in grid.items():
        counts = collections.Counter(trial.swept[key] for trial in drawn)
        assert min(counts[value] for value in values) >= 16 // len(values) - 1
        assert max(counts.values()) <= 16 // len(values) + 2


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
        "from training.errors import command; "
        f"command(lambda: sweep.main([{path!r}, '--out_dir={out}', '--dirty=True']))"
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
    wait_for(lambda: len(started(out)) == 1 and (out / name("adamw", 0.1) / "metrics.jsonl").exists())
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with pytest.raises(sweep.UserError, match="still at work"):
        sweep.main([path, f"--out_dir={out}"])
    wait_for(lambda: len((out / name("adamw", 0.1) / "metrics.jsonl").read_text().splitlines()) == 6)

    time.sleep(0.6)
    second = begin()
    cut = out / name("adamw", 0.2) / "metrics.jsonl"
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
        [name("adamw", 0.1), "scratch"],
        [name("adamw", 0.2), "scratch"],
        [name("adamw", 0.2), "resume"],
        [name("adamw", 0.3), "scratch"],
    ]
    assert [json.loads(line)["step"] for line in cut.read_text().splitlines()] == list(range(6))


@pytest.mark.parametrize("ending", ["import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "raise SystemExit(0)"])
def test_a_run_ended_by_a_signal_is_no_result(stub, ending):
    (stub / "stub.py").write_text(ending)
    out = stub / "out"
    with pytest.raises(sweep.UserError, match="stopped by a signal"):
        sweep.main([write_sweep(stub, {"adamw": {"learning_rate": [0.1]}}), f"--out_dir={out}"])
    assert [(run["loss"], run["error"]) for run in state(out).values()] == [(None, "")]


@pytest.mark.parametrize(
    "facts, problem",
    [
        ({"history": [{"step": 3, "changed": {"beta1": [0.9, 0.8], "torch": ["2.11", "2.13"]}}]}, "beta1 changed mid"),
        ({"config": {"learning_rate": 0.5}}, "it has learning_rate = 0.5"),
        ({"config": {"learning_rate": 0.2, "batch_size": 4}}, "it has batch_size = 4"),  # of a config file, for example
        ({"history": 3}, "config.json is damaged"),
        ({"history": [{"step": 0, "changed": {"beta1": [0.9, 0.8]}}]}, ""),
        ({"history": [{"step": 3, "changed": {"log_interval": [1, 2]}}]}, ""),
    ],
)
def test_a_run_with_other_settings_is_not_the_sweeps(stub, capsys, facts, problem):
    """By hand someone resumed a run of the sweep, or put one of their own into its folder."""
    path, out = write_sweep(stub, {"adamw": {"learning_rate": [0.1, 0.2]}}), stub / "out"
    sweep.main([path, f"--out_dir={out}"])
    folder, begun = out / name("adamw", 0.2), started(out)
    (folder / "config.json").write_text(json.dumps({"config": {"learning_rate": 0.2}} | facts))
    capsys.readouterr()
    for again in (False, True):
        sweep.main([path, f"--out_dir={out}"])
        run, said = state(out)[folder.name], capsys.readouterr()
        assert run["error"].startswith(problem) and bool(run["error"]) == bool(problem)
        assert (run["loss"] == "inf") == bool(problem)
        assert ("1 failed" in said.out) == bool(problem)
        assert said.err.count(f"{folder.name} failed: {problem}") == (bool(problem) and not again)
    assert started(out) == begun
    shutil.rmtree(folder)
    sweep.main([path, f"--out_dir={out}"])
    assert state(out)[folder.name]["error"] == "" and len(started(out)) == len(begun) + 1


def test_the_real_script_gives_the_loss(corpus, tmp_path):
    settings = dict(word[2:].split("=", 1) for word in tiny_words(corpus, ""))
    del settings["out_dir"]
    settings |= {"max_iters": 6, "eval_interval": 3, "learning_rate": [0.01]}
    sweep.main([write_sweep(tmp_path, {"adamw": {}}, **settings), f"--out_dir={tmp_path / 'out'}", "--dirty=True"])
    (run,) = state(tmp_path / "out").values()
    lines = read_lines(tmp_path / "out" / name("adamw", 0.01))
    assert (lines[-1]["step"], lines[-1]["val/loss"]) == (6, run["loss"])


@pytest.mark.parametrize(
    "runs, message",
    [
        (5, "lion has 4 combinations, fewer than runs = 5"),
        (0, "runs = 0, but it must be an integer above 0"),
        (2.0, "runs = 2.0, but it must be an integer"),
        (True, "runs = True, but it must be an integer"),
    ],
)
def test_impossible_numbers_of_runs_are_refused(tmp_path, capsys, runs, message):
    optimizers = {"adamw": {"learning_rate": [1, 2, 3, 4, 5]}, "lion": {"learning_rate": [1, 2, 3, 4]}}
    refused(capsys, [write_sweep(tmp_path, optimizers, runs), f"--out_dir={tmp_path / 'out'}"], message)
    twice = {"adamw": {"learning_rate": [1, 2, 3, 1]}}
    refused(capsys, [write_sweep(tmp_path, twice, 1), f"--out_dir={tmp_path / 'out'}"], "a value twice")


@pytest.mark.parametrize(
    "optimizers, message",
    [
        ({"adamw": {"learning_rate": [1, 2]}, "lion": {"learning_rate": [1]}}, "lion has 1 runs and adamw 2"),
        ({"adamw": {"learning_rate": 1.0}, "lion": {"max_iters": 6}}, "lion has a run of 192 tokens, adamw of 160"),
        ({"adamw": {"max_iters": [5, 6]}}, "adamw has a run of 192 tokens, adamw of 160"),
        ({"adamw": {"learning_rat": [1]}}, "no setting 'learning_rat'"),
        ({"adam": {"learning_rate": [1]}}, "optimizer_name"),
        ({"sophiag": {"rho": [-1.0]}}, "rho = -1.0 is not possible"),
        ({}, "gives two dicts"),
        ([1], "gives two dicts"),
        ({"adamw": [1]}, "gives two dicts"),
        ({"adamw": {"learning_rate": []}}, "an empty list"),
        ({"adamw": {"learning_rate": [0.1, 0.1]}}, "a value twice"),
        ({"adamw": {"learning_rate": {0.1}}}, "settings are numbers"),
        ({"adamw": {"max_iters": [5]}, "adamw_5": {"optimizer_name": "adamw"}}, "adamw_5 would be the folder of"),
        ({"a/b": {"optimizer_name": "adamw"}}, "name this optimizer without '/'"),
        ({"..": {"optimizer_name": "adamw"}}, "name this optimizer without '/'"),
        ({"x" * 151: {"optimizer_name": "adamw"}}, "with 150 bytes at most"),
        ({"a\x1b[2J": {"optimizer_name": "adamw"}}, "name this optimizer"),
    ],
)
def test_unequal_budgets_and_impossible_settings_are_refused(tmp_path, capsys, optimizers, message):
    refused(capsys, [write_sweep(tmp_path, optimizers), f"--out_dir={tmp_path / 'out'}"], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ('{"config": ["a.py", "b.py"]}', "the path of one file"),
        ('{"script": 5}', "the path of one file"),
        ('{"learning_rate": 10**5000}', "settings are numbers"),
        ('{"eval_only": True}', "a sweep trains"),
        ('{"init_from": "resume"}', "a sweep trains"),
        ('{key: [i / 99 for i in range(99)] for key in ("beta1", "beta2", "dropout")}', "970,299 combinations"),
    ],
)
def test_settings_that_no_sweep_can_have_are_refused(stub, capsys, settings, message):
    (stub / "bad.py").write_text(f"common = {COMMON!r}\noptimizers = {{'adamw': {settings}}}")
    refused(capsys, [str(stub / "bad.py"), f"--out_dir={stub / 'out'}"], message)
    assert not (stub / "out").exists()


def test_bad_files_are_refused(stub, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("common = 1 / 0")
    refused(capsys, [str(tmp_path / "bad.py"), "--out_dir=x"], "ZeroDivisionError")
    refused(capsys, [str(tmp_path / "none.py"), "--out_dir=x"], "cannot read")
    refused(capsys, [str(tmp_path / "none"), "--out_dir=x"], "a sweep file is NAME.py or sweep.json")
    path = write_sweep(tmp_path, {"adamw": {}})
    refused(capsys, [path, f"--out_dir={tmp_path}/bad.py"], "cannot be read or written")
    refused(capsys, [path, "--out_dir=x", "--jobs=0"], "--jobs 1 to 1000")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{")
    refused(capsys, [path, f"--out_dir={tmp_path / 'out'}"], "sweep.json is damaged")


def refused(capsys, words, message):
    with pytest.raises(SystemExit) as done:
        command(lambda: sweep.main(words))
    error = capsys.readouterr().err
    assert done.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
