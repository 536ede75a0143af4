"""The numbers in the tables, and the notes a reader needs."""

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.runs import group, read_run
from analysis.tables import report, run_table
from tests.analysis.made_runs import edit, slow_down, write_run, write_seeds
from tests.analysis.test_stats import curve


def tables(text):
    """Each table of a report, as {first cell: {column: text}}."""
    found = []
    for block in text.split("\n\n"):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[:1] == "|"]
        if rows:
            assert all(len(cell) >= 3 and set(cell) <= {"-", ":"} for cell in rows[1])
            found.append({row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]})
    return found


def reported(*runs):
    """(tables, text) of the runs' report."""
    text = "\n".join(report(group([read_run(run) for run in runs])))
    return tables(text), text


def test_the_numbers_of_the_table(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", shift=-0.03, config={"optimizer_name": "lion"})
    (rows,), text = reported(a, b)
    assert rows["adamw"] == {
        "group": "adamw", "seeds": "1", "steps": "100", "tokens": "153,600", "final val/loss": "2.0500",
        "difference": "", "p": "", "verdict": "baseline", "train/loss": f"{2 + 2 * 0.9**95:.4f}", "seconds": "50.0",
        "tokens/s": "3,072", "clipped": "25.0%",
    }  # fmt: skip
    row = rows["lion"]
    assert (row["final val/loss"], row["difference"], row["verdict"]) == ("2.0200", "-0.0300", "no claim: one seed")
    assert "nats a character" in text and "No speed-up" in text
    assert not any(words in text for words in ("not finished", "Seconds on", "clean"))


def add(run, lines):
    """Add metrics to lines of a run: {step: {name: number}}."""
    path = Path(run, "metrics.jsonl")
    old = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | lines.get(line["step"], {})) + "\n" for line in old))


def test_accuracy_and_seconds_an_epoch_are_shown_where_runs_have_them(tmp_path):
    a, b = write_seeds(tmp_path, "adamw", [2.0, 2.1])
    other = write_run(tmp_path / "other", config={"optimizer_name": "lion"})
    for run, accuracy, epochs in ((a, 0.25, 2.0), (b, 0.35, 4.0)):
        add(run, {100: {"val/accuracy": accuracy, "epoch": epochs}})
    (rows,), text = reported(a, b, other)
    assert (rows["adamw"]["accuracy"], rows["adamw"]["s/epoch"]) == ("30.00%", "18.8")  # of 50/2 and 50/4
    assert (rows["lion"]["accuracy"], rows["lion"]["s/epoch"]) == ("", "") and "Accuracy: " in text
    assert "accuracy" not in reported(other)[0][0]["lion"]


def test_train_loss_is_the_mean_of_its_last_lines(tmp_path):
    run = write_run(tmp_path / "a", config={"max_iters": 500, "lr_decay_iters": 500}, val={0: 4.0, 500: 2.0})
    add(run, {490: {"train/loss": 1.0}, 495: {"train/loss": 3.0}})  # 2% of 100 lines
    assert reported(run)[0][0]["adamw"]["train/loss"] == "2.0000"


def test_stages_have_clips_in_1000_steps_and_the_loss_after_them(tmp_path):
    adamw, hybrid = write_seeds(tmp_path, "adamw", [2.0, 2.1]), write_seeds(tmp_path, "sophiag", [1.9, 1.8])
    for run, rate in zip([*adamw, *hybrid], (0.1, 0.3, 0.004, 0.006), strict=True):
        ends = {50: {"stage/length": 8, "stage/clip_rate": rate}, 100: {"stage/length": 64, "stage/clip_rate": 0.0}}
        add(run, ends)
    (_, stages), _ = reported(*adamw, *hybrid, write_run(tmp_path / "c", config={"optimizer_name": "lion"}))
    assert stages["50"] == {
        "stage ends at step": "50", "tokens in a sequence": "8", "adamw: clipped in 1,000": "200",
        "adamw: val/loss": "2.0000", "sophiag: clipped in 1,000": "5", "sophiag: val/loss": "2.0000",
    }  # fmt: skip
    assert stages["100"]["adamw: val/loss"] == "2.0500" and stages["100"]["sophiag: clipped in 1,000"] == "0"


def test_the_mean_has_students_interval_and_the_difference_a_p(tmp_path):
    """Student's data of test_stats: t(0.975, 9) = 2.26216 times 1.78901 / sqrt(10)."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    (rows,), _ = reported(*write_seeds(tmp_path, "adamw", first), *write_seeds(tmp_path, "sgd", second))
    assert rows["adamw"]["final val/loss"] == "0.7500 ± 1.2798"
    assert rows["sgd"]["p"] == "0.0794" and rows["sgd"]["difference"] == "+1.5800"


def test_a_lead_that_vanishes_at_the_end_is_not_reported(tmp_path):
    """Ahead by 0.5 in mid-run with every seed, level at the end."""
    runs = []
    for i in range(4):
        for name, lead in (("adamw", 0.0), ("sophia", 0.5)):
            val = {0: 4.0, 50: 2.5 - lead + 0.001 * i, 75: 2.3 - lead, 100: 2.0 + 0.01 * i}
            runs.append(write_run(tmp_path / f"{name}{i}", val=val, config={"optimizer_name": name, "seed": i}))
    (rows,), text = reported(*sorted(runs))
    assert rows["sophia"]["verdict"] == "no difference shown with n = 4 and 4"
    assert rows["sophia"]["difference"] == "+0.0000" and "2.0000" not in text, "the lead stands nowhere"


def test_unfinished_runs_get_no_verdict(tmp_path):
    adamw = write_seeds(tmp_path, "adamw", [2.0, 2.01, 2.02])
    cut = write_seeds(tmp_path, "lion", [1.0, 1.01, 1.02], lr_decay_iters=1000)  # ended in the middle of its schedule
    early = [write_run(tmp_path / "m", val={0: 4.0, 50: 1.0}, config={"optimizer_name": "muon"})]
    (rows,), text = reported(*adamw, *cut, *early, *write_seeds(tmp_path, "adamw", [2.5, 2.51], steps=50))
    assert rows["lion"]["verdict"] == rows["muon"]["verdict"] == "not finished"
    assert (rows["muon"]["steps"], rows["muon"]["seconds"], rows["muon"]["tokens"]) == ("50", "25.0", "76,800")
    assert f"{early[0]} is not finished" in text and "step 50 of 100" in text and "step 100 of 1000" in text
    assert "baseline needs" not in text


def test_diverged_runs_show_an_infinite_loss(tmp_path):
    runs = [*write_seeds(tmp_path, "adamw", [2.0, 2.01]), *write_seeds(tmp_path, "lion", [1.0, None, 1.0])]
    (rows,), _ = reported(*runs)
    assert rows["lion"]["verdict"] == "diverged in 1 of 3" and rows["lion"]["final val/loss"] == "inf"


def test_groups_without_a_clean_commit_are_named(tmp_path):
    runs = [*write_seeds(tmp_path, "adamw", [2.0, 2.01]), *write_seeds(tmp_path, "lion", [1.9, 1.91])]
    edit(runs[0], git_commit="fedcba9876543210-dirty")
    edit(runs[2], git_commit=None)
    edit(runs[3], clean=False)
    _, text = reported(*runs)
    assert "adamw (1 of 2 runs); lion (2 of 2 runs)" in text
    commits = [line.split("|")[-2].strip() for line in run_table(group([read_run(run) for run in runs]))][2:]
    assert commits == ["fedcba9 (not clean)", "0123456", "none (not clean)", "0123456 (not clean)"]


# ----- seconds


def test_times_of_runs_that_shared_their_device_are_not_compared(tmp_path):
    runs = [*write_seeds(tmp_path, "adamw", [2.0, 2.01]), *write_seeds(tmp_path, "adamw", [1.8, 1.81], steps=200)]
    runs += write_seeds(tmp_path, "lion", [1.9, 1.91])
    for shared in (runs[:2], runs):
        for run in shared:
            edit(run, shared_device=True)
        (rows, speed_ups), text = reported(*runs)
        assert rows["adamw, max_iters=100"]["seconds"] == "shared" and not rows["adamw, max_iters=100"]["tokens/s"]
        assert (rows["lion"]["seconds"] == "50.0") == (len(shared) == 2)
        assert speed_ups["lion"]["in steps"].startswith("1.")
        assert (speed_ups["lion"]["in seconds"] == "shared") == (len(shared) > 2)  # the longer runs have a step's time
        assert "Shared: " in text


def test_devices_are_named_where_they_differ(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", device_name="NVIDIA H200", config={"optimizer_name": "lion"})
    assert "Seconds on 1 x NVIDIA H200: lion.\nSeconds on 1 x cpu: adamw.\n" in reported(a, b)[1]


def test_seconds_are_held_against_those_of_the_same_device(tmp_path):
    """The seconds come from the device that most of a group's unshared runs had; the losses from all runs."""
    short, long = write_seeds(tmp_path, "adamw", [2.0, 2.02]), write_seeds(tmp_path, "adamw", [1.8, 1.82], steps=200)
    lion = write_seeds(tmp_path, "lion", [1.9, 1.91, 1.92])
    for run in (*long, lion[2]):
        edit(run, device_name="NVIDIA H200")
    for run in (long[1], lion[2]):  # whose times no table should show
        slow_down(run, 9)
    (rows, speed_ups), _ = reported(*short, *long, *lion)
    assert (rows["lion"]["seconds"], rows["lion"]["tokens/s"]) == ("50.0", "3,072")
    assert speed_ups["lion"]["in seconds"] == speed_ups["lion"]["in steps"]
    for run in short:
        edit(run, shared_device=True)  # both sides then had an H200 to themselves only
    (rows, speed_ups), text = reported(*short, *long, *lion)
    assert rows["adamw, max_iters=100"]["seconds"] == "shared" and rows["lion"]["seconds"] == "50.0"
    in_steps, in_seconds = (float(speed_ups["lion"][f"in {key}"].split()[0]) for key in ("steps", "seconds"))
    assert in_seconds == pytest.approx(in_steps * np.mean([0.5, 4.5]) / 4.5, abs=0.02)  # seconds a step, of both sides
    assert "Seconds of lion: mean of 2 of its 3 runs." in text


def test_seconds_do_not_depend_on_the_order_of_two_devices(tmp_path):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.02])
    edit(runs[0], device_name="a slow one")
    slow_down(runs[0], 9)
    for order in (runs, runs[::-1]):
        assert reported(*order)[0][0]["adamw"]["seconds"] == "450.0"


# ----- speed-ups


def test_the_table_of_speed_ups(tmp_path):
    noise, runs = np.array([-0.02, 0.0, 0.02]), []
    for steps in (100, 200, 400):
        runs += write_seeds(tmp_path, "adamw", curve(steps) + noise, steps=steps)
    runs += write_seeds(tmp_path / "x", "adamw", curve(200) + 1 + noise, steps=200, learning_rate=0.5)  # not the best
    runs += write_seeds(tmp_path, "sophiag", curve(1.37 * 200) + noise, steps=200, flops=6150.0)
    (_, rows), _ = reported(*runs)
    row = rows["sophiag"]
    assert row["steps"] == "200"
    for column, expected in (("in steps", 1.37), ("in tokens", 1.37), ("in FLOPs", 1.37 / 1.025), ("in seconds", 1.37)):
        middle, low, high = (float(word.strip("[],")) for word in row[column].split())
        assert low < middle < high and middle == pytest.approx(expected, abs=0.02)


def test_flops_that_are_not_logged_have_no_column(tmp_path):
    runs = [*write_seeds(tmp_path, "adamw", [2.0]), *write_seeds(tmp_path, "adamw", [1.8], steps=200)]
    old = write_seeds(tmp_path, "lion", [1.9], flops=None)
    assert "in FLOPs" not in reported(*runs, *old)[0][1]["lion"]
    rows = reported(*runs, *old, *write_seeds(tmp_path, "muon", [1.9]))[0][1]
    assert rows["lion"]["in FLOPs"] == "not logged" and rows["muon"]["in FLOPs"] == rows["muon"]["in steps"]


@pytest.mark.parametrize("longer, named", [(200, False), (300, True)])
def test_a_wide_gap_between_horizons_is_named_beside_speed_ups(tmp_path, longer, named):
    words = f"No run of the baseline lies between 100 and {longer} steps"
    runs = [*write_seeds(tmp_path, "adamw", [2.0, 2.01]), *write_seeds(tmp_path, "adamw", [1.8, 1.81], steps=longer)]
    assert words not in reported(*runs)[1], "there is no speed-up"
    assert (words in reported(*runs, *write_seeds(tmp_path, "lion", [1.9, 1.91]))[1]) == named


def test_speed_ups_outside_of_the_horizons_are_bounds(tmp_path):
    runs = [*write_seeds(tmp_path, "adamw", [3.0, 3.01]), *write_seeds(tmp_path, "adamw", [2.5, 2.51], steps=200)]
    runs += [*write_seeds(tmp_path, "lion", [1.0, 1.01]), *write_seeds(tmp_path, "muon", [3.5, 3.51])]
    runs += write_seeds(tmp_path, "sgd", [2.7])
    (_, rows), _ = reported(*runs)
    assert rows["lion"]["in steps"] == "> 2.00 [> 2.00, > 2.00]" and rows["lion"]["baseline needs"].startswith("> 200 ")
    assert rows["muon"]["in steps"] == "< 1.00 [< 1.00, < 1.00]"
    assert "[" not in rows["sgd"]["in steps"], "no interval of one seed"
