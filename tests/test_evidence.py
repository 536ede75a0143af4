"""assets/evidence/: what collect.py keeps of a run, and whether compare.py can redraw all that is committed there."""

import itertools
import json
import shutil
import sys

import pytest

import compare
import train_adam
import train_sophiag
from analysis.figures import new_figure
from assets import claims
from assets.evidence import collect
from sweep import state_text
from tests.analysis.made_runs import write_run
from tests.conftest import read_lines, tiny_words
from training.errors import UserError

FOLDERS = sorted(path for path in collect.EVIDENCE.glob("*/") if path.name != "__pycache__")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_committed_can_be_redrawn(folder, tmp_path):
    if runs := sorted(str(path.parent) for path in folder.glob("*/config.json")):
        compare.main([*runs, f"--out={tmp_path / 'figure'}"])
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_the_papers_claims_are_drawn_from_the_runs(tmp_path):
    claims.main(tmp_path / "claims")
    assert (tmp_path / "claims.png").exists()
    groups = claims.groups_of("30m_python")
    assert {name for name, steps in groups if steps == 780} == set(claims.NAMES)
    kinds = ("adamw_", "sophiag_", "sophiah_")
    folders = [path for path in (collect.EVIDENCE / "30m_python").glob("*/") if path.name.startswith(kinds)]
    later = sum(path.name.startswith(claims.LATER) for path in folders)
    assert sum(len(one.runs) for one in groups.values()) == len(folders) - later > 0, "a group hides another"
    last = read_lines(collect.EVIDENCE / "30m_python" / "adamw_max_iters=780_seed=3")[-2]
    assert 100 * last["train/clip_rate"] in claims.clipped(groups["adamw", 780])


def test_rho_and_beta2_are_drawn_as_the_sweep_found_them():
    state = json.loads((collect.EVIDENCE / "30m_rho_beta2" / "sweep.json").read_text())
    found = {(run["swept"]["rho"], run["swept"]["beta2"]): run["loss"] for run in state["runs"]}
    assert len(found) == 16 and None not in found.values(), "part of the sweep is missing"
    _, (axes,) = new_figure(1, 1)
    claims.draw_sensitivity(axes, claims.groups_of("30m_python"), claims.runs_of("30m_rho_beta2"))
    drawn = {}
    for line in axes.get_lines()[1:]:
        beta2 = float(line.get_label().removeprefix("beta2 "))
        drawn |= {(rho, beta2): loss for rho, loss in zip(*line.get_data(), strict=True)}
    assert drawn == found


def test_two_runs_are_collected_and_redrawn_without_the_originals(corpus, tmp_path, monkeypatch, capsys):
    runs = [str(tmp_path / "out" / name) for name in ("adamw_seed1", "sophiag_seed1")]
    for run, script in zip(runs, (train_adam, train_sophiag), strict=True):
        words = [*tiny_words(corpus, run), "--max_iters=8", "--eval_interval=4"]
        monkeypatch.setattr(sys, "argv", [script.__file__, "config/x.py", *words])
        script.main(words)
    capsys.readouterr()
    compare.main(runs)
    before = capsys.readouterr().out
    collect.main(["tiny", *runs], tmp_path)
    with pytest.raises(UserError, match="is there"):
        collect.main(["tiny", *runs], tmp_path)
    (tmp_path / "out").rename(tmp_path / "gone")
    capsys.readouterr()
    collected = sorted(str(path) for path in (tmp_path / "tiny").iterdir())
    compare.main(collected)
    assert capsys.readouterr().out == before
    compare.main([*collected, f"--out={tmp_path / 'figure'}"])
    assert all((tmp_path / f"figure{part}.png").exists() for part in ("", "_training", "_final"))

    folder, gone = (tmp_path / name / "sophiag_seed1" for name in ("tiny", "gone"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl"}
    assert read_lines(folder) == read_lines(gone), "a short run stays whole"
    facts, original = (json.loads((run / "config.json").read_text()) for run in (folder, gone))
    assert facts["command"][:4] == [
        "train_sophiag.py", "config/x.py", f"--dataset={corpus.name}", "--out_dir=sophiag_seed1"
    ]  # fmt: skip
    changed = {key: value for key, value in facts["config"].items() if value != original["config"][key]}
    assert changed == {"dataset": corpus.name, "out_dir": "sophiag_seed1"}
    assert {**original, "config": 0, "command": 0} == {**facts, "config": 0, "command": 0}


@pytest.mark.parametrize(
    "path, said",
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
def test_paths(path, said):
    assert collect.portable({"x": [path, 1.5, None]}) == {"x": [said, 1.5, None]}


def test_a_long_run_keeps_its_evaluations_and_its_ends(tmp_path):
    val = {step: 2.0 for step in range(0, 20_001, 500)}
    run = write_run(tmp_path / "run", val=val, config={"max_iters": 20_000})  # 4001 lines
    collect.main(["long", run], tmp_path)
    steps = [line["step"] for line in read_lines(tmp_path / "long" / "run")]
    assert len(steps) == 500 and {0, 5, 19_995, 20_000, *val} <= set(steps) and steps == sorted(set(steps))
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 50
    often = write_run(tmp_path / "often", val={step: 2.0 for step in range(0, 20_001, 5)}, config={"max_iters": 20_000})
    with pytest.raises(UserError, match="4001 lines with a val/loss"):
        collect.main(["often", often], tmp_path)
    assert not (tmp_path / "often" / "often").exists()


def test_a_sweep_gives_its_state_and_its_best_runs(tmp_path):
    sweep, runs = tmp_path / "sweep", []
    for name, seed in (("adamw_lr=1", None), ("adamw_lr=2", None), ("best_adamw_lr=2_seed1", 1)):
        write_run(sweep / name, config={"seed": seed})
        runs.append({"run": name, "optimizer": "adamw", "seed": seed, "error": "/a/b is missing" if seed else ""})
    (sweep / "sweep.json").write_text(state_text({"sweep": {"common": {"dataset": "/a/books"}}, "runs": runs}))
    (sweep / "best_training.png").touch()
    collect.main(["swept", str(sweep)], tmp_path)
    assert {path.name for path in (tmp_path / "swept").iterdir()} == {"sweep.json", "best_adamw_lr=2_seed1"}
    state = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    assert state["sweep"] == {"common": {"dataset": "books"}}
    assert state["runs"] == [*runs[:2], runs[2] | {"error": "b is missing"}]
    shutil.rmtree(sweep / "best_adamw_lr=2_seed1")
    with pytest.raises(UserError, match="is missing"):
        collect.main(["other", str(sweep)], tmp_path)
    assert not (tmp_path / "other").exists()
