"""experiments/: every folder is complete and says what ran; tables and figures of the docs are those of the runs."""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import compare
import sweep
import train_adam
import train_sophiag
from analysis.figures import new_figure
from analysis.runs import check_comparable, group, label, read_run
from experiments import best, collect, results
from experiments.claims import claims
from experiments.toy2d import toy2d
from tests.analysis.made_runs import write_run
from tests.conftest import ROOT, read_lines, tiny_words
from training.config import REMOVED, load_config
from training.errors import UserError

EXPERIMENTS = ROOT / "experiments"
FOLDERS = sorted(path for path in EXPERIMENTS.glob("*/") if path.name != "__pycache__")
STATES = sorted(EXPERIMENTS.glob("*/sweep*.json"))
WITH_RUNS = [folder for folder in FOLDERS if (folder / "runs").exists()]
OPTIONS = {"30m_python": [["--steps=780"], ["--steps=1560"], ["--steps=5200"], ["--steps=7800", "--only=adamw"]]}
OPTIONS["30m_official"] = [["--official=official_sophia.py"]]
OPTIONS["30m_llama"] = [[], ["--rates=0.002,0.002,0.008,0.008", "--held_out=3,4,5"]]
OPTIONS["30m_llama"] += [["--rates=0.001,0.002,0.008,0.004", "--only=adamw,whitened_muon"]]  # below the edges
OPTIONS["30m_llama"] += [[*OPTIONS["30m_llama"][1], "--only=whitened_muon"]]
OPTIONS["30m_muon_momentum"] = [["--only=blocks,muon"], ["--only=muon"]]
OPTIONS["30m_fp8_loss"] = [["--only=adamw"]]
AGAIN = ["--held_out=6,7,8,9,10", "--only=adamw,muon,sophiag_spectral"]
OPTIONS["30m_python"] += [["--steps=780", *AGAIN], ["--steps=1560", *AGAIN]]
NOT_RUN = {f"{name}_5200_seed{seed}" for name in ("sophiag_adamw", "nadamw", "soap") for seed in (3, 4, 5)}
NOT_RUN |= {f"sophiag_adamw_beta2_5200_seed{seed}" for seed in (4, 5)}
NOT_RUN |= {f"sophiag_eigenbasis_5200_seed{seed}" for seed in (3, 5)}
NOT_ASKED = {"out_dir", "init_from", "device", "dtype", "gradient_accumulation_steps", "overwrite"}  # vary, or resolved


def by_name(path):
    return f"{path.parent.name}/{path.name}" if path.is_file() else path.name


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def definitions(state):
    return state["sweep"] if isinstance(state["sweep"], list) else [state["sweep"]]


def define(name, options=()):
    """What experiments/NAME/sweep.py defines."""
    return sweep.read_command_line([str(EXPERIMENTS / name / "sweep.py"), "--out_dir=out", *options])[1]


def grid(definition, folder):
    """The trials of the optimizers that the code still has. A sweep with one that was removed is refused."""
    optimizers = definition["optimizers"]
    removed = {name for name in optimizers if sweep.settings_of(definition, name).keys() & REMOVED.keys()}
    if removed:
        with pytest.raises(UserError, match="eigenbasis was replaced by whitened_muon"):
            sweep.grid(definition, folder)
    kept = {name: settings for name, settings in optimizers.items() if name not in removed}
    return sweep.grid(definition | {"optimizers": kept}, folder) if kept else []


def settings_class(trial):
    """The class of the settings of a trial's script."""
    script = Path(trial.argv[0])
    known = {"train_adam.py": train_adam.AdamConfig, "train_sophiag.py": train_sophiag.SophiaConfig}
    return known.get(script.name) or sweep.script_of({"script": script})[1]


def lowest(runs, optimizer):
    return min((run for run in runs if run["optimizer"] == optimizer), key=lambda run: float(run["loss"]))


# ----- folders


@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_an_experiment_has_its_question_expectation_command_verdict_and_gaps(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    heads = [head for head in re.findall(r"^## (\w+)", text, re.MULTILINE)]
    assert [head for head in heads if head in ("Question", "Expectation", "Command", "Verdict", "Missing")] == [
        "Question", "Expectation", "Command", "Verdict", "Missing"
    ]  # fmt: skip
    assert f"]({folder.name}/README.md)" in (EXPERIMENTS / "README.md").read_text(encoding="utf-8"), "not in the index"
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("path", STATES, ids=by_name)
def test_labels_are_those_of_the_swept_settings(path):
    for run in read(path)["runs"]:
        name = label(run["optimizer"], run["swept"])
        assert run["run"] == (name if run["seed"] is None else f"best_{name}_seed{run['seed']}")


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/sweep.py")), ids=by_name)
def test_a_sweep_file_gives_the_runs_that_its_sweep_json_lists(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    state, names = None, set()
    if path.with_name("sweep.json").exists():  # it has run
        state = read(path.with_name("sweep.json"))
        names = {run["run"] for run in state["runs"] if run["seed"] is None}
    for options in OPTIONS.get(path.parent.name, [[]]):
        definition = define(path.parent.name, options)
        defined = {trial.folder.name for trial in grid(definition, path.parent)}
        assert state is None or (definition in definitions(state) and defined - names <= NOT_RUN), defined - names


@pytest.mark.parametrize("folder", WITH_RUNS, ids=by_name)
def test_committed_runs_can_be_compared_and_ended_as_sweep_json_says(folder, capsys):
    runs = {path.name: path for path in folder.glob("runs/*")}
    states = [run for path in folder.glob("sweep*.json") for run in read(path)["runs"]]
    losses = {run["run"]: run["loss"] for run in states}
    compare.main([str(path) for path in runs.values()])
    for name, path in runs.items():
        assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl"}
        assert read_run(path).final["val/loss"] == losses[name], name
        assert len(read_lines(path)) <= collect.LINES and all("flops" in line for line in read_lines(path))


@pytest.mark.parametrize("folder", WITH_RUNS, ids=by_name)
def test_runs_had_the_settings_that_their_sweep_asks_for(folder, monkeypatch):
    """All settings, those of config files and defaults too: a changed default would change what the verdict is of."""
    monkeypatch.chdir(ROOT)
    state = read(folder / "sweep.json")
    if folder.name == "30m_schedules":
        return  # code that is not in the repository
    trials = {trial.folder.name: trial for one in definitions(state) for trial in grid(one, folder)}
    for path in folder.glob("runs/*"):
        seed = re.search(r"^best_(.*)_seed(\d+)$", path.name)
        if (trial := trials.get(seed[1] if seed else path.name)) is None:
            continue  # of a former range of learning rates, or of another sweep.json
        argv = [*trial.argv[1:], *([f"--seed={seed[2]}"] if seed else [])]
        asked, ran = vars(load_config(settings_class(trial), argv)), read(path / "config.json")["config"]
        ran |= {"adamw_for": ran.get("adamw_for", "none").replace("vectors", "scalars")} if "adamw_for" in ran else {}
        asked |= {"adamw_for": asked["adamw_for"].replace("vectors", "scalars")} if "adamw_for" in asked else {}
        assert {key: value for key, value in ran.items() if key in asked.keys() - NOT_ASKED} == {
            key: value for key, value in asked.items() if key in ran.keys() - NOT_ASKED
        }, path.name


def test_runs_are_small():
    files = [path for path in EXPERIMENTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8e6
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 800, path


# ----- what was best


@pytest.mark.parametrize("steps", [780, 5200])
def test_the_best_of_each_tuning_runs_longer_with_held_out_seeds(steps, monkeypatch):
    """Its settings are kept, its warm-up keeps its share of the run."""
    monkeypatch.chdir(ROOT)
    tunings = [run for name in ("30m_tuning", "30m_eigenbasis")
               for run in read(EXPERIMENTS / name / "sweep.json")["runs"]]  # fmt: skip
    tuned = {run["optimizer"] for run in tunings}
    for trial in grid(define("30m_python", [f"--steps={steps}"]), ROOT):
        config = vars(load_config(settings_class(trial), trial.argv[1:]))
        assert (config["max_iters"], config["lr_decay_iters"], config["seed"]) == (steps, steps, trial.swept["seed"])
        assert (config["total_bs"], config["block_size"], config["dataset"]) == (128, 512, "python")
        assert trial.swept["seed"] in (3, 4, 5)
        if trial.optimizer in tuned:
            swept = dict(lowest(tunings, trial.optimizer)["swept"])
            assert config["warmup_iters"] * 780 == swept.pop("warmup_iters") * steps
            assert {key: config[key] for key in swept} == swept


def test_the_recipe_in_config_is_the_variant_of_its_experiment(monkeypatch):
    """At twice the steps, so with twice the warm-up."""
    monkeypatch.chdir(ROOT)
    (ran,) = sweep.grid(define("30m_whitened_muon", ["--held_out=5", "--only=blocks"]), ROOT)
    ran, recipe = (vars(load_config(train_adam.AdamConfig, argv))
                   for argv in (ran.argv[1:], ["config/train_gpt2_30m_whitened_muon.py"]))  # fmt: skip
    changed = {key: (ran[key], recipe[key]) for key in recipe.keys() - {"out_dir", "seed"} if recipe[key] != ran[key]}
    twice = {"max_iters": (780, 1560), "lr_decay_iters": (780, 1560), "warmup_iters": (156, 312)}
    assert changed == twice


def test_best_of_takes_the_lowest_loss_and_refuses_an_unfinished_tuning(tmp_path, monkeypatch):
    monkeypatch.setattr(best, "EXPERIMENTS", tmp_path)
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
    assert best.best_of("tuned", 250, only=("adamw", "mixed")) == {
        "adamw": {"optimizer_name": "adamw", "config": "adamw.py", "weight_decay": 0.3, "learning_rate": 2,
                  "warmup_iters": 50},
        "mixed": {"optimizer_name": "sophiag", "weight_decay": 0.4, "learning_rate": 3, "warmup_iters": 75},
    }  # fmt: skip
    for untuned in ("lion", "muon", "sgd"):
        with pytest.raises(ValueError, match=f"{untuned} is not tuned yet"):
            best.best_of("tuned", 250, only=("adamw", untuned))


# ----- tables and figures


def test_tables_and_figures_are_up_to_date():
    results.main(["--check"])
    named = {name for path in results.documents() for _, name, *_ in results.BLOCK.findall(path.read_text())}
    assert named == results.TABLES.keys()


def test_a_changed_number_in_a_table_is_noticed_and_mended(tmp_path):
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert "1.578 ± 0.005" in text
    copy = tmp_path / "results.md"
    copy.write_text(text.replace("1.578 ± 0.005", "1.577 ± 0.005"))
    assert copy in results.differing([copy])
    assert results.rewritten(copy) == text
    copy.write_text("<!-- generated: nothing -->\n<!-- end -->")
    with pytest.raises(UserError, match="no table 'nothing'"):
        results.rewritten(copy)


def test_a_changed_run_changes_table_and_figure(tmp_path, monkeypatch):
    shutil.copytree(EXPERIMENTS / "30m_python", tmp_path / "30m_python")
    metrics = tmp_path / "30m_python/runs/sophiag_spectral_780_seed3/metrics.jsonl"
    *lines, last = read_lines(metrics.parent)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, last | {"val/loss": 1.2}]))
    before = results.results_main(), results.digest(results.FIGURES["final_losses"][1]())
    monkeypatch.setattr(results, "EXPERIMENTS", tmp_path)
    results.groups_of.cache_clear(), results.horizon.cache_clear()
    after = results.results_main(), results.digest(results.FIGURES["final_losses"][1]())
    monkeypatch.undo()
    results.groups_of.cache_clear(), results.horizon.cache_clear()
    assert before[0] != after[0] and before[1] != after[1]


def test_a_run_without_a_clean_commit_marks_its_cell():
    dirty, clean = (results.horizon("30m_python", name, 780) for name in ("sophiag", "sophiag_spectral"))
    assert results.loss_cell(dirty).endswith(results.MARK) and results.MARK not in results.loss_cell(clean)
    assert "have not been rerun" in results.results_main()
    assert "have not been rerun" not in results.results_books()


def test_claims_are_drawn_from_the_runs(tmp_path):
    results.draw_paper_claims(tmp_path / "claims")
    assert (tmp_path / "claims.png").exists()
    last = read_lines(EXPERIMENTS / "30m_python/runs/adamw_780_seed3")[-2]
    assert 100 * last["train/clip_rate"] in claims.clipped(results.horizon("30m_python", "adamw", 780))
    state = read(EXPERIMENTS / "30m_rho_beta2/sweep.json")
    found = {(run["swept"]["rho"], run["swept"]["beta2"]): run["loss"] for run in state["runs"]}
    _, (axes,) = new_figure(1, 1)
    adamw = {("adamw", 780): results.horizon("30m_python", "adamw", 780)}
    claims.draw_sensitivity(axes, adamw, [read_run(path) for path in EXPERIMENTS.glob("30m_rho_beta2/runs/*")])
    drawn = {}
    for line in axes.get_lines()[1:]:
        beta2 = float(line.get_label().removeprefix("beta2 "))
        drawn |= {(rho, beta2): loss for rho, loss in zip(*line.get_data(), strict=True)}
    assert drawn == found and len(found) == 16


def test_the_figure_of_speedups_has_the_numbers_of_the_table():
    points = results.speedups_by_horizon()
    table = results.speedups("adamw", ("muon",))
    for _, value, low, high, beyond in points["Muon"][:2]:
        assert f" {value:.2f} [{low:.2f}, {high:.2f}] " in table and not beyond
    assert points["Sophia-G"][0][1:] == (1.0, 1.0, 1.0, -1)  # below the range of AdamW's runs
    assert points["spectral step"][2][1:] == (1.5, pytest.approx(1.445, abs=1e-3), 1.5, 1)  # above it


def test_a_bound_in_mid_run_is_read_off_between_evaluations(tmp_path):
    runs = {loss: group([read_run(write_run(tmp_path / f"{loss}", val={0: 4.0, 50: 3.0, 100: loss}))])[0]
            for loss in (1.0, 2.0, 0.5)}  # fmt: skip
    assert results.mid_run_bound(runs[1.0], runs[2.0]) == pytest.approx(100 / 75, abs=1e-4)
    assert results.mid_run_bound(runs[1.0], runs[0.5]) is None
    for interpolated, *bounds in results.speedups_by_size().values():
        assert len(bounds) == 2 and bounds[0][1] < interpolated[1]  # 30M, 124M


# ----- collect.py


def test_collected_runs_compare_as_the_originals(corpus, tmp_path, monkeypatch, capsys):
    runs = [str(tmp_path / "out" / name) for name in ("adamw_seed1", "sophiag_seed1")]
    for run, script in zip(runs, (train_adam, train_sophiag), strict=True):
        argv = [*tiny_words(corpus, run), "--max_iters=8", "--eval_interval=4"]
        monkeypatch.setattr(sys, "argv", [script.__file__, "config/x.py", *argv])
        script.main(argv)
    collect.main(["tiny", *runs], tmp_path)
    with pytest.raises(UserError, match="is there"):
        collect.main(["tiny", *runs], tmp_path)
    copies = [tmp_path / "tiny/runs" / name for name in ("adamw_seed1", "sophiag_seed1")]
    originals, collected = ([read_run(run) for run in folders] for folders in (runs, copies))
    check_comparable(originals + collected)
    for one, other in zip(group(originals), group(collected), strict=True):
        assert one.label == other.label and one.losses == pytest.approx(other.losses, rel=1e-5)
    facts, original = (read(run / "config.json") for run in (copies[1], tmp_path / "out/sophiag_seed1"))
    assert facts["command"][:4] == [
        "train_sophiag.py", "config/x.py", f"--dataset={corpus.name}", "--out_dir=sophiag_seed1"
    ]  # fmt: skip
    changed = {key: value for key, value in facts["config"].items() if value != original["config"][key]}
    assert changed == {"dataset": corpus.name, "out_dir": "sophiag_seed1"}
    assert {**original, "config": 0, "command": 0} == {**facts, "config": 0, "command": 0}


@pytest.mark.parametrize(
    "path, kept",
    [
        ("/a/b/train.py", "train.py"),
        ("--dataset=/a/books", "--dataset=books"),
        ("import:~/x/ckpt.pt", "import:ckpt.pt"),
        ("../../x/books/", "books/"),
        ("exit code 2: error: /a/b/train.bin is missing", "exit code 2: error: train.bin is missing"),
        ("out/sweep/best", "out/sweep/best"),
        ("1.2k tok/s, 3 / 4, https://a.b/c", "1.2k tok/s, 3 / 4, https://a.b/c"),
        ("0:128,2000:256", "0:128,2000:256"),
    ],
)
def test_folders_of_the_machine_are_cut_from_paths(path, kept):
    assert collect.portable({"x": [path, 1.5, None]}) == {"x": [kept, 1.5, None]}


def test_a_long_run_keeps_its_evaluations_its_ends_and_six_digits(tmp_path):
    val = {step: 2.000123456 for step in range(0, 20_001, 500)}
    run = write_run(tmp_path / "run", val=val, config={"max_iters": 20_000})  # 4001 lines
    collect.main(["long", run], tmp_path)
    lines = read_lines(tmp_path / "long/runs/run")
    steps = [line["step"] for line in lines]
    assert len(steps) == collect.LINES and {0, 5, 19_995, 20_000, *val} <= set(steps) and steps == sorted(set(steps))
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 500 and lines[-1]["val/loss"] == 2.00012
    often = write_run(tmp_path / "often", val={step: 2.0 for step in range(0, 20_001, 5)}, config={"max_iters": 20_000})
    with pytest.raises(UserError, match="4001 lines with a val/loss"):
        collect.main(["often", often], tmp_path)
    assert not (tmp_path / "often/runs").exists()


def write_sweep(folder, definition, runs):
    for run in runs:
        write_run(folder / run["run"], config={"seed": run["seed"] or run["swept"].get("seed")})
    (folder / "sweep.json").write_text(sweep.state_text({"sweep": definition, "runs": runs}))
    return str(folder)


def a_run(name, seed=None, loss=2.0, **swept):
    return {"run": name, "optimizer": "adamw", "swept": swept, "seed": seed, "loss": loss, "error": ""}


def test_a_tuning_gives_its_sweep_json_and_the_held_out_runs_of_the_best(tmp_path):
    runs = [a_run("adamw_1", learning_rate=1), a_run("adamw_2", learning_rate=2, loss=1.23456789)]
    runs.append(a_run("best_adamw_2_seed1", seed=1, learning_rate=2) | {"error": "/a/b is missing"})
    folder = write_sweep(tmp_path / "sweep", {"common": {"dataset": "/a/books"}}, runs)
    collect.main(["tuned", folder], tmp_path)
    assert {path.name for path in (tmp_path / "tuned/runs").iterdir()} == {"best_adamw_2_seed1"}
    state = read(tmp_path / "tuned/sweep.json")
    assert state["sweep"] == {"common": {"dataset": "books"}}
    assert state["runs"] == [runs[0], runs[1] | {"loss": 1.23457}, runs[2] | {"error": "b is missing"}]
    shutil.rmtree(tmp_path / "sweep/best_adamw_2_seed1")
    with pytest.raises(UserError, match="is missing"):
        collect.main(["other", folder], tmp_path)
    assert not (tmp_path / "other").exists()


def test_sweeps_of_other_horizons_are_added_to_the_sweep_json_that_is_there(tmp_path):
    for steps in (780, 1560):
        runs = [a_run(f"adamw_{steps}_seed3", max_iters=steps, seed=None) for _ in range(1)]
        runs[0]["swept"] = {"max_iters": steps, "seed": 3}
        collect.main(
            ["both", write_sweep(tmp_path / f"out{steps}", {"common": {"max_iters": [steps]}}, runs)], tmp_path
        )
    state = read(tmp_path / "both/sweep.json")
    assert [one["common"]["max_iters"] for one in state["sweep"]] == [[780], [1560]]
    assert [run["run"] for run in state["runs"]] == ["adamw_780_seed3", "adamw_1560_seed3"]
    assert {path.name for path in (tmp_path / "both/runs").iterdir()} == {"adamw_780_seed3", "adamw_1560_seed3"}


# ----- the paper's example of two variables (figure 2 of arXiv:2305.14342)


def test_the_function_of_two_variables_is_the_papers():
    points = torch.tensor([[1.0, 4.0], [0.0, 4.0], [0.2, 0.0]], dtype=torch.double)
    assert toy2d.loss(points).tolist() == pytest.approx([0.0, 8.0, 8 * 0.64 * 1.452 + 8.0])
    assert toy2d.hessian_diagonal(points[1]).tolist() == pytest.approx([-27.2, 1.0])  # a maximum along x
    assert toy2d.hessian_diagonal(points[0]).tolist() == pytest.approx([68.8, 1.0])


def test_newton_ends_at_the_local_maximum_in_x():
    points = toy2d.trajectory("Newton", None)
    assert points[-1].tolist() == pytest.approx([0.0, 4.0], abs=1e-6)
    assert toy2d.steps_to_minimum(points) is None


def test_sophia_reaches_the_minimum_in_the_fewest_steps():
    """One learning rate of Sophia's against every other method at its best of five in the grid."""
    points = toy2d.trajectory("Sophia", 1.0)
    sophia = toy2d.steps_to_minimum(points)
    assert points[-1].tolist() == pytest.approx([1.0, 4.0], abs=1e-6) and sophia <= 5
    for name in toy2d.OPTIMIZERS.keys() - {"Sophia", "Newton"}:
        steps = [s for lr in toy2d.GRID[2::3] if (s := toy2d.steps_to_minimum(toy2d.trajectory(name, lr)))]
        assert min(steps) > 10 * sophia
