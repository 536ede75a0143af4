"""compare.py: which numbers it reports, what it claims and what it does not, which runs it refuses; the figures."""

import json
import pathlib
import struct
import sys
import time
import types

import numpy as np
import pytest

import compare
from analysis import figures
from training.errors import UserError, command

CONFIG = {
    "config": {
        "optimizer_name": "adamw", "seed": 1, "max_iters": 100, "lr_decay_iters": 100, "learning_rate": 1e-3,
        "total_bs": 24, "block_size": 64, "eval_tokens": 8192, "wandb_project": "sophia",
    },
    "data": {"train_sha256": "aa" * 32, "val_sha256": "bb" * 32},
    "tokenizer": {"characters": "abc"},
    "model": {"num_params": 1000, "flops_per_token": 6000.0},
    "device_name": "cpu",
    "world_size": 1,
}  # fmt: skip
VAL = {0: 4.0, 50: 2.1, 75: 2.0, 100: 2.05}  # the best is not the last


def write_run(folder, val=VAL, shift=0.0, **facts):
    """Metrics every 5 steps, half a second and 1536 tokens a step; `facts` replace parts of config.json."""
    folder.mkdir(parents=True)
    config = {key: value | facts.pop(key, {}) if key == "config" else value for key, value in CONFIG.items()}
    (folder / "config.json").write_text(json.dumps(config | facts))
    lines = []
    for step in range(0, config["config"]["max_iters"] + 1, 5):
        line = {"step": step, "tokens": 1536 * step, "seconds": 0.5 * step}
        if step < config["config"]["max_iters"]:
            line |= {"train/loss": 2.0 + 2.0 * 0.9**step + shift, "lr": 1e-3, "grad_norm": 1.5, "train/clip_rate": 0.25}
        if step in val:
            line["val/loss"] = None if val[step] is None else val[step] + shift
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def seeds(tmp_path, name, losses, steps=100, **config):
    """Finished runs of one optimizer, a seed a loss."""
    val = {0: 4.0, steps // 10 * 5: 2.0}
    return [
        write_run(
            tmp_path / f"{name}_{steps}_seed{i}",
            val=val | {steps: loss},
            config={"optimizer_name": name, "seed": i, "max_iters": steps, "lr_decay_iters": steps, **config},
        )
        for i, loss in enumerate(losses)
    ]


def test_many_groups_are_drawn_without_training_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, prefix: figure)
    runs = [*seeds(tmp_path, "adamw", [1.8]), *seeds(tmp_path, "lion", [1.7])]
    styled = [(one, {"color": "C0"}) for one in compare.group([compare.read_run(run) for run in runs])]
    few = figures.draw_losses(styled, tmp_path, "nats")
    monkeypatch.setattr(figures, "LEGEND", 1)
    many = figures.draw_losses(styled, tmp_path, "nats")
    for figure, curves in ((few, 4), (many, 2)):  # a panel; that of the steps has the legend's too
        assert len(figure.axes[1].lines) == curves
        assert any("train/loss" in text.get_text() for text in figure.legends[0].get_texts()) == (curves == 4)
    assert few.axes[0].get_ylim()[1] > 2.0 > many.axes[0].get_ylim()[1]  # the loss half way


def test_sophia_with_adamw_or_eigenbasis_is_an_optimizer_of_its_own(tmp_path, capsys):
    sophia = {"hess_bs": 1, "hess_interval": 10}
    adamw = seeds(tmp_path, "adamw", [2.0, 2.01])
    plain = seeds(tmp_path, "sophiag", [1.9, 1.91], **sophia, adamw_for="none")
    other = seeds(tmp_path / "mixed", "sophiag", [1.8, 1.81], **sophia, adamw_for="embeddings")
    third = seeds(tmp_path / "third", "sophiag", [1.7], **sophia, adamw_for="embeddings", eigenbasis=True)
    fourth = seeds(tmp_path / "fourth", "sophiag", [1.6], **sophia, adamw_for="none", eigenbasis=True, spectral=True)
    compare.main([*adamw, *plain, *other, *third, *fourth])
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:7]]
    assert names == ["adamw", "sophiag", "sophiag+adamw", "sophiag+eigenbasis+adamw", "sophiag+eigenbasis+spectral"]


def test_settings_that_are_not_in_use_or_of_later_make_no_group(tmp_path, capsys):
    old = seeds(tmp_path / "old", "adamw", [2.0, 2.01])
    new = seeds(tmp_path / "7", "adamw", [2.02], seed=7, embedding_lr=None)
    new += seeds(tmp_path / "8", "adamw", [2.03], seed=8, embedding_lr=None, eigenbasis=False)
    own = seeds(tmp_path / "own", "adamw", [1.8, 1.81], embedding_lr=0.1)
    compare.main([*old, *new, *own])
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [[cell.strip() for cell in row] for row in rows] == [["adamw", "4"], ["adamw, embedding_lr=0.1", "2"]]


def tables(printed):
    """Each table that was printed, as {first cell: {column: text}}."""
    found = []
    for block in printed.split("\n\n"):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[:1] == "|"]
        if rows:
            assert all(len(cell) >= 3 and set(cell) <= {"-", ":"} for cell in rows[1])
            found.append({row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]})
    return found


def compared(capsys, *words):
    compare.main(list(words))
    printed = capsys.readouterr().out
    return tables(printed), printed


# ----- the numbers


def test_times_of_runs_that_shared_their_device_say_nothing(tmp_path, capsys):
    runs = [*seeds(tmp_path, "adamw", [2.0, 2.01]), *seeds(tmp_path, "adamw", [1.8, 1.81], steps=200)]
    runs += seeds(tmp_path, "lion", [1.9, 1.91])
    for shared in (runs[:2], runs):
        for run in shared:
            edit(run, shared_device=True)
        (rows, speed_ups), printed = compared(capsys, *runs, f"--out={tmp_path / 'figure'}")
        assert rows["adamw, max_iters=100"]["seconds"] == "shared" and not rows["adamw, max_iters=100"]["tokens/s"]
        assert (rows["lion"]["seconds"] == "50.0") == (len(shared) == 2)
        assert speed_ups["lion"]["in steps"].startswith("1.")
        assert (speed_ups["lion"]["in seconds"] == "shared") == (len(shared) > 2)  # the longer runs have a step's time
        assert "the runs had company on their device" in printed
        assert ("these runs shared their device" in (tmp_path / "figure.svg").read_text()) == (len(shared) > 2)


def test_the_numbers_of_the_table(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", shift=-0.03, config={"optimizer_name": "lion"})
    (rows,), printed = compared(capsys, a, b)
    assert rows["adamw"] == {
        "group": "adamw", "seeds": "1", "steps": "100", "tokens": "153,600", "final val/loss": "2.0500",
        "difference": "", "p": "", "verdict": "baseline", "seconds": "50.0", "tokens/s": "3,072", "clipped": "25.0%",
    }  # fmt: skip
    row = rows["lion"]
    assert (row["final val/loss"], row["difference"], row["verdict"]) == ("2.0200", "-0.0300", "no claim: one seed")
    assert "nats a character" in printed and "No speed-up" in printed
    assert "not finished" not in printed and "devices" not in printed


def test_mean_interval_and_welch_against_the_textbook(tmp_path, capsys):
    """Student (1908) on additional hours of sleep: t = -1.8608 with 17.776 degrees, p = 0.07939, not paired."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    (rows,), _ = compared(capsys, *seeds(tmp_path, "adamw", first), *seeds(tmp_path, "sgd", second))
    assert rows["sgd"]["p"] == "0.0794" and rows["sgd"]["difference"] == "+1.5800"
    assert rows["sgd"]["verdict"] == "no difference shown with n = 10 and 10"
    assert rows["adamw"]["final val/loss"] == "0.7500 ± 1.2798"  # t(0.975, 9) = 2.26216 times 1.78901 / sqrt(10)


@pytest.mark.parametrize("shift, words", [(-0.1, "better"), (0.1, "worse")])
def test_verdicts(tmp_path, capsys, shift, words):
    losses = np.array([2.00, 2.01, 2.02])
    runs = [*seeds(tmp_path, "adamw", losses), *seeds(tmp_path, "lion", losses + shift)]
    (rows,), _ = compared(capsys, *runs)
    assert rows["lion"]["verdict"] == words and float(rows["lion"]["p"]) < 0.001


@pytest.mark.parametrize("n", [2, 3, 5])
def test_identical_optimizers_show_no_difference(n):
    """In 95 of 100 draws and more; 1 in 100 is what the rule allows."""
    random = np.random.default_rng(n)
    words = [compare.verdict(*random.normal(2, 0.02, (2, n)))[1] for _ in range(1000)]
    said = sum(word.startswith("no difference shown") for word in words)
    assert said >= 980 and said + words.count("better") + words.count("worse") == 1000


def test_a_lead_that_vanishes_at_the_end_is_not_reported(tmp_path, capsys):
    """Ahead by 0.5 in mid-run with every seed, level at the end."""
    for i in range(4):
        for name, lead in (("adamw", 0.0), ("sophia", 0.5)):
            val = {0: 4.0, 50: 2.5 - lead + 0.001 * i, 75: 2.3 - lead, 100: 2.0 + 0.01 * i}
            write_run(tmp_path / f"{name}{i}", val=val, config={"optimizer_name": name, "seed": i})
    (rows,), printed = compared(capsys, *map(str, sorted(tmp_path.iterdir())))
    assert rows["sophia"]["verdict"] == "no difference shown with n = 4 and 4"
    assert rows["sophia"]["difference"] == "+0.0000" and "2.0000" not in printed, "the lead stands nowhere"


def test_unfinished_runs_get_no_verdict(tmp_path, capsys):
    adamw = seeds(tmp_path, "adamw", [2.0, 2.01, 2.02])
    cut = seeds(tmp_path, "lion", [1.0, 1.01, 1.02], lr_decay_iters=1000)  # ended in the middle of its schedule
    early = [write_run(tmp_path / "m", val={0: 4.0, 50: 1.0}, config={"optimizer_name": "muon"})]
    (rows,), printed = compared(capsys, *adamw, *cut, *early, *seeds(tmp_path, "adamw", [2.5, 2.51], steps=50))
    assert rows["lion"]["verdict"] == rows["muon"]["verdict"] == "not finished"
    assert (rows["muon"]["steps"], rows["muon"]["seconds"], rows["muon"]["tokens"]) == ("50", "25.0", "76,800")
    assert f"{early[0]} is not finished: its numbers are those of step 50 of 100." in printed
    assert "step 100 of 1000" in printed and "baseline needs" not in printed


def test_diverged_runs(tmp_path, capsys):
    runs = [*seeds(tmp_path, "adamw", [2.0, 2.01]), *seeds(tmp_path, "lion", [1.0, None, 1.0])]
    (rows,), _ = compared(capsys, *runs, f"--out={tmp_path / 'figure'}")
    assert rows["lion"]["verdict"] == "diverged in 1 of 3" and rows["lion"]["final val/loss"] == "inf"
    (rows,), _ = compared(capsys, *runs[2:], *runs[:2])
    assert rows["adamw"]["verdict"] == "no claim: the baseline diverged"


def edit(run, **facts):
    path = pathlib.Path(run, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_other_devices_are_named(tmp_path, capsys):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", device_name="NVIDIA H200", config={"optimizer_name": "lion"})
    printed = compared(capsys, a, b, f"--out={tmp_path / 'figure'}")[1]
    assert "Seconds on 1 x NVIDIA H200: lion.\nSeconds on 1 x cpu: adamw.\n" in printed
    assert "of several devices" in (tmp_path / "figure.svg").read_text()


def test_seconds_are_held_against_those_of_the_same_device(tmp_path, capsys):
    """A step's time is that of runs alone on the device that most of a group's had; the losses are of all runs."""
    short, long = seeds(tmp_path, "adamw", [2.0, 2.02]), seeds(tmp_path, "adamw", [1.8, 1.82], steps=200)
    lion = seeds(tmp_path, "lion", [1.9, 1.91, 1.92])
    for run in (*long, lion[2]):
        edit(run, device_name="NVIDIA H200")
    for run in (long[1], lion[2]):  # whose times no one should see
        path = pathlib.Path(run, "metrics.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"seconds": 9 * line["seconds"]}) + "\n" for line in lines))
    (rows, speed_ups), _ = compared(capsys, *short, *long, *lion)
    assert (rows["lion"]["seconds"], rows["lion"]["tokens/s"]) == ("50.0", "3,072")
    assert speed_ups["lion"]["in seconds"] == speed_ups["lion"]["in steps"]
    for run in short:
        edit(run, shared_device=True)  # so that both sides were alone on an H200 only
    (rows, speed_ups), printed = compared(capsys, *short, *long, *lion)
    assert rows["adamw, max_iters=100"]["seconds"] == "shared" and rows["lion"]["seconds"] == "50.0"
    in_steps, in_seconds = (float(speed_ups["lion"][f"in {key}"].split()[0]) for key in ("steps", "seconds"))
    assert in_seconds == pytest.approx(in_steps * np.mean([0.5, 4.5]) / 4.5, abs=0.02)  # seconds a step, of both sides
    assert "Seconds of lion are of 2 of its 3 runs." in printed
    edit(lion[2], shared_device=True)
    speed_ups = compared(capsys, *short, *long, *lion)[0][1]
    assert speed_ups["lion"]["in seconds"] == "other devices"
    for run in lion[:2]:
        edit(run, shared_device=True)
    (rows, speed_ups), _ = compared(capsys, *short, *long, *lion)
    assert rows["lion"]["seconds"] == speed_ups["lion"]["in seconds"] == "shared"


def test_of_two_devices_it_is_the_same_in_any_order(tmp_path, capsys):
    runs = seeds(tmp_path, "adamw", [2.0, 2.02])
    edit(runs[0], device_name="a slow one")
    path = pathlib.Path(runs[0], "metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"seconds": 9 * line["seconds"]}) + "\n" for line in lines))
    for order in (runs, runs[::-1]):
        assert compared(capsys, *order)[0][0]["adamw"]["seconds"] == "450.0"


# ----- speed-up


def curve(steps):
    """Final loss of a baseline's whole schedule of so many steps."""
    return 2.5 + 20 * np.asarray(steps, dtype=float) ** -0.5


def test_a_planted_speed_up_is_found_within_its_interval():
    """Of 200 draws of 4 seeds each, 1.37 is in the 95% interval of at least 93%; the middle is 1.37 to 1%."""
    random, lengths, found = np.random.default_rng(0), [1000, 2000, 4000], []
    for _ in range(200):
        baseline = [curve(n) + random.normal(0, 0.005, 4) for n in lengths]
        ours = curve(1.37 * 1500) + random.normal(0, 0.005, 4)
        found.append(np.array(compare.baseline_needs(lengths, baseline, ours, draws=1000)) / 1500)
    middle, low, high = np.transpose(found)
    assert np.mean((low <= 1.37) & (high >= 1.37)) >= 0.93
    assert np.median(middle) == pytest.approx(1.37, rel=0.01)
    assert np.median(high - low) < 0.2


def test_steps_needed_without_noise():
    lengths = [500, 1000, 2000, 4000]
    wanted = np.array([500, 700, 1000, 1371, 2000, 3000, 4000])
    found = compare.steps_needed(lengths, np.tile(curve(lengths), (7, 1)), curve(wanted))
    assert found == pytest.approx(wanted, rel=0.01)
    outside = compare.steps_needed(lengths, np.tile(curve(lengths), (2, 1)), curve([400, 5000]))
    assert outside.tolist() == [0, np.inf]
    bumpy = compare.steps_needed([1, 2, 4], np.array([[3.0, 1.0, 2.0]]), np.array([1.5]))
    assert 1 < bumpy[0] < 2, "the first time it is reached"


def test_the_table_of_speed_ups(tmp_path, capsys):
    noise, runs = np.array([-0.02, 0.0, 0.02]), []
    for steps in (100, 200, 400):
        runs += seeds(tmp_path, "adamw", curve(steps) + noise, steps=steps)
    runs += seeds(tmp_path / "x", "adamw", curve(200) + 1 + noise, steps=200, learning_rate=0.5)  # the best counts
    sophia = {"hess_bs": 6, "hess_interval": 10}  # a quarter of the batch every 10th step: 2.5% more FLOPs
    runs += seeds(tmp_path, "sophiag", curve(1.37 * 200) + noise, steps=200, **sophia)
    (_, rows), printed = compared(capsys, *runs, f"--out={tmp_path / 'out'}")
    row = rows["sophiag"]
    assert row["steps"] == "200"
    for column, expected in (("in steps", 1.37), ("in tokens", 1.37), ("in FLOPs", 1.37 / 1.025), ("in seconds", 1.37)):
        middle, low, high = (float(word.strip("[],")) for word in row[column].split())
        assert low < middle < high and middle == pytest.approx(expected, abs=0.02)
    assert printed.split("\nwrote")[0] in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize("longer, said", [(200, False), (300, True)])
def test_a_wide_gap_between_lengths_is_named(tmp_path, capsys, longer, said):
    words = f"No run of the baseline lies between 100 and {longer} steps"
    runs = [*seeds(tmp_path, "adamw", [2.0, 2.01]), *seeds(tmp_path, "adamw", [1.8, 1.81], steps=longer)]
    assert words not in compared(capsys, *runs)[1], "there is no speed-up"
    _, printed = compared(capsys, *runs, *seeds(tmp_path, "lion", [1.9, 1.91]))
    assert (words in printed) == said


def test_outside_of_the_lengths_nothing_is_extrapolated(tmp_path, capsys):
    runs = [*seeds(tmp_path, "adamw", [3.0, 3.01]), *seeds(tmp_path, "adamw", [2.5, 2.51], steps=200)]
    runs += [*seeds(tmp_path, "lion", [1.0, 1.01]), *seeds(tmp_path, "muon", [3.5, 3.51])]
    runs += seeds(tmp_path, "sgd", [2.7])
    (_, rows), _ = compared(capsys, *runs)
    assert rows["lion"]["in steps"] == "> 2.00 [> 2.00, > 2.00]" and rows["lion"]["baseline needs"].startswith("> 200 ")
    assert rows["muon"]["in steps"] == "< 1.00 [< 1.00, < 1.00]"
    assert "[" not in rows["sgd"]["in steps"], "no interval of one seed"


def test_curvature_costs():
    """GNB: one more pass on a quarter of the batch every 10th step. Hutchinson: three."""
    config = {"optimizer_name": "sophiag", "total_bs": 24, "block_size": 16, "hess_bs": 6, "hess_interval": 10}
    model, tokens = {"flops_per_token": 1000, "n_layer": 1, "n_embd": 2}, 24 * 16

    def flops(step, **changes):
        return compare.flops_of_steps(config | changes, model)(step) / tokens

    assert flops(0) == 0
    assert flops(10) == pytest.approx(10 * 1025)
    assert flops(10, optimizer_name="sophiah") == pytest.approx(10 * 1075)
    assert flops(10, optimizer_name="adamw") == pytest.approx(10_000)
    assert flops(10, sophia_start_iter=4) == pytest.approx(4 * 1000 + 6 * 1025)
    shorter = {"block_size_schedule": "0:4,6:16", "optimizer_name": "adamw"}  # 12 * 1 * 2 * (16 - 4) fewer a token
    assert flops(10, **shorter) == pytest.approx(6 * (1000 - 288) + 4 * 1000)
    assert flops(3, **shorter) == pytest.approx(3 * 712)


# ----- groups and refusals


def test_seeds_are_one_group_and_settings_are_not(tmp_path, capsys):
    runs = seeds(tmp_path, "adamw", [2.0, 2.1], out_dir="here", wandb_log=True)
    runs += seeds(tmp_path, "adamw", [2.2], steps=200, min_lr=1e-5)
    runs += seeds(tmp_path / "x", "adamw", [2.3], learning_rate=2e-3, beta1=0.8, beta2=0.9, grad_clip=2.0)
    (rows,), _ = compared(capsys, *runs)
    assert [row["seeds"] for row in rows.values()] == ["2", "1", "1"]
    assert list(rows)[2] == "adamw, adamw_100", "too many differences to list: the name of the folder"
    (rows,), _ = compared(capsys, *runs[:3])
    assert list(rows) == ["adamw, max_iters=100", "adamw, max_iters=200, min_lr=1e-05"]


def test_the_same_run_twice_is_no_second_seed(tmp_path, capsys):
    a = write_run(tmp_path / "a")
    refused(capsys, [a, write_run(tmp_path / "b")], "b is " + a + " again")


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"data": {"train_sha256": "cc" * 32, "val_sha256": "bb" * 32}}, "training data (SHA-256) (cccccccccccccccc,"),
        ({"data": {"train_sha256": "aa" * 32, "val_sha256": "cc" * 32}}, "validation data (SHA-256)"),
        ({"tokenizer": "gpt2"}, "tokenizer (gpt2, not {'characters'"),
        ({"config": {"total_bs": 48}}, "total_bs * block_size (3072, not 1536)"),
        ({"config": {"total_bs": 12, "block_size": 128}}, "block_size (128, not 64)"),
        ({"config": {"eval_tokens": 4096}}, "eval_tokens (4096, not 8192)"),
        ({"model": {"num_params": 2000, "flops_per_token": 1.0}}, "model parameters (2000, not 1000)"),
    ],
)
def test_runs_that_are_not_comparable(tmp_path, capsys, facts, said):
    a, b = (write_run(tmp_path / name, config={"seed": i}) for i, name in enumerate("ab"))
    c = write_run(tmp_path / "c", **facts)
    refused(capsys, [a, b, c], f"{c} differs from {a} in {said}")
    compare.main([a, b, c, "--force"])
    if "model" in facts:
        compare.main([a, b, c, "--scaling"])


def test_other_seeds_rates_and_micro_batches_are_comparable(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"batch_size": 3, "seed": 2})
    assert len(compared(capsys, a, b)[0][0]) == 2


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
        (lambda run: (run / "metrics.jsonl").write_bytes(b""), "has no val/loss"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "val/loss": 4.0}\n'), "has no val/loss"),
        (lambda run: replace(run / "config.json", '"max_iters": 100', '"max_iters": "x"'), "max_iters = 'x'"),
    ],
)
def test_damaged_runs(tmp_path, capsys, damage, said):
    run = write_run(tmp_path / "a")
    damage(tmp_path / "a")
    refused(capsys, [run], said)


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_all_that_lies_in_a_sweep_is_named(tmp_path, capsys):
    runs = seeds(tmp_path, "adamw", [1.0, 1.1])
    compare.main(runs)
    alone = capsys.readouterr().out
    (tmp_path / "sweep.json").write_text("{}")
    compare.main([*runs, str(tmp_path / "sweep.json")])
    assert capsys.readouterr().out == alone
    with pytest.raises(UserError, match=r"sweep.json is a sweep's record: name"):
        compare.main([str(tmp_path / "sweep.json")])


def test_bad_command_lines(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    refused(capsys, ["--out=x"], "RUN")
    refused(capsys, [run, "--wat"], "--wat")
    refused(capsys, [run, "--wandb"], "--out")
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


# ----- figures, wandb, speed


def test_figures(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"{name}{i}", shift=i / 10, tokenizer="gpt2", config={"optimizer_name": name, "seed": i})
        for name in ("adamw", "lion", "muon")
        for i in range(3)
    ]
    prefix = tmp_path / "new" / "figure"
    compare.main([*runs, f"--out={prefix}"])
    assert "nats a token" in capsys.readouterr().out
    names = {"figure": 2, "figure_training": 2, "figure_final": 1}
    assert {path.name for path in prefix.parent.iterdir()} == {"figure.md"} | {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    before = {name: prefix.with_name(f"{name}.svg").read_bytes() for name in names}
    for name in names:
        png = prefix.with_name(f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", png[16:24])) > 350
    for text in (b"loss (nats a token)", b"training time (seconds)", b"FLOPs", b"tokens", b"optimizer steps", b"lion"):
        assert text in before["figure"]
    for text in (b"learning rate", b"gradient norm", b"win rate", b"tokens a second", b"GiB", b"not known"):
        assert text in before["figure_training"]
    compare.main([*runs, f"--out={prefix}"])
    after = {name: prefix.with_name(f"{name}.svg").read_bytes() for name in names}
    assert before == after, "the same runs give the same files"


def test_scaling(tmp_path, capsys):
    """Losses that follow N^-0.1 exactly; two sizes of the other optimizer get no fit."""
    runs = []
    for name, sizes in (("adamw", (1e6, 1e7, 1e8)), ("lion", (1e6, 1e7))):
        for n in sizes:
            model = {"num_params": int(n), "flops_per_token": 6 * n}
            val = {0: 9.0, 100: 10 * n**-0.1}
            runs.append(write_run(tmp_path / f"{name}{n}", val=val, model=model, config={"optimizer_name": name}))
    (rows,), _ = compared(capsys, *runs, "--scaling", f"--out={tmp_path / 's'}")
    assert list(rows)[:3] == ["adamw, 1M", "adamw, 10M", "adamw, 100M"]
    assert rows["lion, 10M"]["difference"] == "+0.0000", "against the baseline of its size"
    svg = (tmp_path / "s_scaling.svg").read_text()
    assert "adamw: loss ∝ N^(-0.1000 ± 0.0000)" in svg and "lion: loss" not in svg and "parameters (N)" in svg


def test_running_mean():
    steps = np.arange(10.0)
    assert np.allclose(figures.running_mean([steps, steps**2], 3), [steps[1:-1], steps[1:-1] ** 2 + 2 / 3])
    assert np.array_equal(figures.running_mean([steps], 1), [steps])


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


def test_long_runs_are_thinned_while_they_are_read(tmp_path):
    """10 runs of 100k lines well within a second each; no evaluation is lost. The issue's measure: 100 within 10 s."""
    extra = {key: 0.123456789 for key in ("train/loss", "lr", "grad_norm", "train/clip_rate", "param_norm", "mfu")}
    lines = []
    for step in range(100_001):
        line = {"step": step, "tokens": 1536 * step, "seconds": 0.5 * step} | extra
        lines.append(json.dumps(line | ({"val/loss": step + 0.5} if step % 1000 == 0 else {})))
    write_run(tmp_path / "a", config={"max_iters": 100_000})
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    start = time.process_time()
    run = compare.read_run(tmp_path / "a")
    assert time.process_time() - start < 1
    assert [line["step"] for line in run.evaluations] == list(range(0, 100_001, 1000)) and run.finished
    assert 1000 < len(run.lines) < 1300 and np.diff([line["step"] for line in run.lines]).max() < 120
    assert run.curve("train/loss", "flops")[0][-1] == run.lines[-1]["tokens"] * 6000
