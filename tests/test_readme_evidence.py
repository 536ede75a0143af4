"""README's section "What Sophia buys" and VERDICTS.md against the runs in assets/evidence: the table, the numbers."""

import json

import numpy as np
import pytest

from analysis.runs import group, read_run
from analysis.stats import verdict
from analysis.tables import speed_rows
from assets.claims import clipped
from tests.conftest import ROOT

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## What Sophia buys")[1].split("\n## ")[0]
EVIDENCE = ROOT / "assets/evidence"
OPENING = " ".join(SECTION.split("GPT-2 with 30M")[0].split())
VERDICTS = " ".join((EVIDENCE / "VERDICTS.md").read_text(encoding="utf-8").split())

ROWS = {  # of the table in "What Sophia buys": how the folders of their runs begin
    "AdamW": "adamw",
    "Sophia-G": "sophiag",
    "Sophia-H": "sophiah",
    "Sophia-G, AdamW for the embeddings": "sophiag_adamw",
    "the same, beta2 0.95": "sophiag_tuned",
    "Sophia-G in the eigenbasis, AdamW for the embeddings": "sophiag_eigenbasis",
    "the same, tuned further (`config/train_gpt2_30m_sophiag_eigenbasis.py`)": "sophiag_eigenbasis_fresh",
    "Sophia-G, spectral, AdamW for the rest (`config/train_gpt2_30m_sophiag_tuned.py`)": "sophiag_spectral",
    "SOAP, AdamW for embeddings and vectors": "soap",
    "Muon, AdamW for embeddings and vectors": "muon",
    "Lion": "lion",
    "NAdamW with AdamW's settings": "nadamw",
}

COLUMNS = {  # of the same: where their runs are, and of how many steps
    "780 steps": ("30m_python", 780),
    "1,560 steps": ("30m_python", 1560),
    "5,200 steps": ("30m_python", 5200),
    "260, large batches": ("30m_large", 260),
    "390, books": ("30m_books", 390),
}
FRESH, SPECTRAL = "sophiag_eigenbasis_fresh", "sophiag_spectral"
SHORT, MIDDLE, LONG, LARGE, BOOKS = COLUMNS
STEPS, SECONDS = 1, 3  # columns of the speed-ups; these runs do not log FLOPs


def read_groups(pattern):
    return group([read_run(path.parent) for path in sorted(EVIDENCE.glob(f"{pattern}/config.json"))])


def of_seeds(row, steps, seeds):
    (one,) = group([read_run(EVIDENCE / f"30m_python/{row}_max_iters={steps}_seed={seed}") for seed in seeds])
    return one


def row_of(one):
    run = one.runs[0].name.rpartition("/")[2].removeprefix("best_")
    return max((row for row in ROWS.values() if run.startswith(f"{row}_")), key=len)


@pytest.fixture(scope="module")
def groups():
    """{(row, column): the group of runs of a cell}."""
    cells = {}
    for column, (name, steps) in COLUMNS.items():
        for one in read_groups(f"{name}/*"):
            if one.steps == steps:
                assert (row_of(one), column) not in cells, "two groups in one cell"
                cells[row_of(one), column] = one
    return cells


def p(ours, theirs):
    value = verdict(ours.losses, theirs.losses)[0]
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"  # as compare.py prints it


def behind(ours, theirs):
    return f"{np.mean(ours.losses) - np.mean(theirs.losses):.3f}"


def adamw_of(steps):
    (one,) = (one for one in read_groups("30m_python/adamw_*") if one.steps == steps)
    return one


def speed_ups(groups, baseline, only_columns=False):
    """{(row, column): cells of compare.py's table of speed-ups}, of the runs on Python text against a row's.

    only_columns: without the lengths that only AdamW ran at."""
    ours = {key: one for key, one in groups.items() if key[1] in (SHORT, MIDDLE, LONG)}
    lengths = [] if only_columns else {one.steps for one in read_groups("30m_python/adamw_*")} - {780, 1560, 5200}
    ours |= {("adamw", steps): adamw_of(steps) for steps in lengths}
    order = sorted(ours, key=lambda key: key[0] != baseline)
    keys = {(ours[key].label, f"{ours[key].steps:,}"): key for key in order}
    return {keys[label, steps]: cells for label, steps, *cells in list(speed_rows([ours[key] for key in order]))[1:]}


def assert_said(text, *claims):
    for claim in claims:
        assert claim in text, claim


def test_the_table_is_what_the_runs_say(groups):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in SECTION.splitlines() if line.startswith("| ")]
    said = {(ROWS[row[0]], head): cell for row in rows[2:] for head, cell in zip(rows[0][1:], row[1:], strict=True)}
    measured = {}
    for key, one in groups.items():
        spread = f" ± {one.interval:.3f}" if one.interval else ", one seed"
        measured[key] = f"{np.mean(one.losses):.3f}{spread}"
    assert {key: cell for key, cell in said.items() if cell} == measured
    assert_said(
        " ".join(SECTION.split()),
        "of eight seeds for AdamW, Muon and the spectral step at 780 and 1,560 steps, else of three",
    )
    eight = {(row, column) for row in ("adamw", "muon", SPECTRAL) for column in (SHORT, MIDDLE)}
    assert {key for key, one in groups.items() if len(one.runs) == 8} == eight
    assert {len(one.runs) for key, one in groups.items() if key not in eight} == {1, 3}


@pytest.mark.parametrize(
    "row, better, worse",
    [
        ("sophiag", [], [MIDDLE, LARGE, BOOKS]),  # worse in three of the five
        ("sophiah", [], list(COLUMNS)),
        ("lion", [], [SHORT, MIDDLE, LARGE, BOOKS]),
        ("sophiag_adamw", [SHORT], []),
        (SPECTRAL, [SHORT, MIDDLE, LONG, BOOKS], []),  # in the four columns with seeds
        ("muon", list(COLUMNS), []),
        (FRESH, [SHORT, MIDDLE, LONG, LARGE], []),
    ],
)
def test_better_and_worse_than_adamw(groups, row, better, worse):
    columns = [column for column in COLUMNS if (row, column) in groups]
    said = [verdict(groups[row, column].losses, groups["adamw", column].losses)[1] for column in columns]
    assert [column for column, word in zip(columns, said, strict=True) if word == "better"] == better
    assert [column for column, word in zip(columns, said, strict=True) if word == "worse"] == worse


def test_against_adamw(groups):
    def against_adamw(row, *columns):
        return [p(groups[row, column], groups["adamw", column]) for column in columns]

    middle, large, books, short, long = against_adamw("sophiag", MIDDLE, LARGE, BOOKS, SHORT, LONG)
    late = [behind(groups["sophiag", column], groups["adamw", column]) for column in (SHORT, LONG)]
    first = groups["sophiag_adamw", SHORT]
    (former,) = (one for one in read_groups("30m_python_h200/adamw_*") if one.steps == 780)
    level = against_adamw("sophiag_adamw", MIDDLE, LARGE, BOOKS)
    spectral = against_adamw(SPECTRAL, SHORT, MIDDLE, LONG, BOOKS)
    fresh = against_adamw(FRESH, SHORT, MIDDLE, LONG, LARGE)
    (again,) = read_groups("30m_spectral_again/sophiag*")
    assert_said(
        VERDICTS,
        f"worse than AdamW at 1,560 steps (p = {middle}), with large batches ({large}) and on books ({books});",
        f"it is behind by {' and '.join(late)}, no difference shown ({short} and {long})",
        f"better at 780 steps by {behind(groups['adamw', SHORT], first)} ({p(first, groups['adamw', SHORT])}; not",
        f"30m_python_h200/`, {behind(former, first)} and no difference shown, {p(first, former)})",
        f"at 1,560, with large batches and on books no difference is shown ({', '.join(level)})",
        f"in the four columns with seeds (p = {', '.join(spectral[:3])}; books {spectral[3]})",
        f"second host's three seeds came to {np.mean(again.losses):.3f} ± {again.interval:.3f} at 780",
        f"at all lengths (p = {', '.join(fresh[:3])}) and with large batches ({fresh[3]})",
    )


def test_against_muon_and_each_other(groups):
    spectral = [groups[SPECTRAL, column] for column in (SHORT, MIDDLE, LONG, BOOKS)]
    muon = [groups["muon", column] for column in (SHORT, MIDDLE, LONG, BOOKS)]
    ahead, ps = [behind(*pair) for pair in zip(muon, spectral, strict=True)], list(map(p, spectral, muon))
    before = [(of_seeds(SPECTRAL, n, (3, 4, 5)), of_seeds("muon", n, (3, 4, 5))) for n in (780, 1560)]
    assert all(verdict(ours.losses, theirs.losses)[1].startswith("no difference") for ours, theirs in before)
    five, rival = ([of_seeds(row, n, range(6, 11)) for n in (780, 1560)] for row in (SPECTRAL, "muon"))
    apart, p_five = list(map(behind, rival, five)), list(map(p, five, rival))
    needs = speed_ups(groups, "muon")
    soap, fresh = ([groups[row, column] for column in (SHORT, MIDDLE)] for row in ("soap", FRESH))
    fresh.append(groups[FRESH, LONG])
    assert_said(
        VERDICTS,
        f"put it ahead by {apart[0]} at 780 and {apart[1]} at 1,560 steps (p = {p_five[0]} and {p_five[1]}; all "
        f"eight {ps[0]} and {ps[1]})",
        f"Muon needs {needs[SPECTRAL, SHORT][STEPS]} and {needs[SPECTRAL, MIDDLE][STEPS]} times its steps",
        f"At 5,200 it is ahead by {ahead[2]} ({ps[2]}), both with",
        f"on books by {ahead[3]} ({ps[3]})",
        f"SOAP is {' and '.join(map(behind, soap, spectral))} behind it at 780 and 1,560 steps "
        f"({' and '.join(map(p, soap, spectral))})",
        f"Muon is better at 780 and 1,560 ({p(fresh[0], muon[0])} and {p(fresh[1], muon[1])}), at 5,200 no difference "
        f"is shown ({p(fresh[2], muon[2])})",
        f"SOAP is better at 1,560 ({p(fresh[1], soap[1])})",
        f"the spectral step at all three ({', '.join(map(p, fresh, spectral))})",
    )
    assert_said(OPENING, f"above the spectral step by {ahead[1]} to {ahead[2]} nats on code and by {ahead[3]} on books")


def test_speed_ups(groups):
    cells, without = speed_ups(groups, "adamw"), speed_ups(groups, "adamw", only_columns=True)

    def every(row, key=STEPS):
        *cell, last = (cells[row, column][key] for column in (SHORT, MIDDLE, LONG))
        return f"{', '.join(cell)} and {last}"

    def bare(cell):  # without its interval
        return cell.removeprefix("> ").split()[0]

    def straight(row):
        losses = [np.mean(groups[key].losses) for key in (("adamw", MIDDLE), (row, MIDDLE), ("adamw", LONG))]
        return f"{(5200 / 1560) ** ((losses[0] - losses[1]) / (losses[0] - losses[2])):.2f}"

    over, seven, long = cells[SPECTRAL, LONG][STEPS], adamw_of(7800), groups[SPECTRAL, LONG]
    assert over.startswith("> ")
    assert_said(
        VERDICTS,
        f"needs {cells[SPECTRAL, SHORT][STEPS]} and {cells[SPECTRAL, MIDDLE][STEPS]} times its steps at 780 and 1,560, "
        f"and at 5,200 more than {over[2:]} times",
        f"it ends at {np.mean(seven.losses):.3f} ± {seven.interval:.3f}, not shown to differ from the spectral step's "
        f"{np.mean(long.losses):.3f} at 5,200 (p = {p(seven, long)})",
        f"Without its runs of 7,800 the spectral step's was {without[SPECTRAL, MIDDLE][STEPS]}, Muon's "
        f"{bare(without['muon', MIDDLE][STEPS])} and that in the eigenbasis {bare(without[FRESH, MIDDLE][STEPS])};",
        f"gives {straight(SPECTRAL)}, {straight('muon')} and {straight(FRESH)}",
        f"needs {every('muon')} times its steps at the three lengths",
        f"needs {every(FRESH)} times its steps, {every(FRESH, SECONDS)} times its seconds (H100)",
    )
    assert_said(
        OPENING,
        f"needs {bare(cells[SPECTRAL, SHORT][STEPS])} times as many",
        f"in 5,200 {over.split('[')[1].split(',')[0]} times or more",
        f"{bare(over)} times as long, ended {behind(seven, long)} above",
        f"for Muon's loss {bare(cells['muon', SHORT][STEPS])} and {bare(cells['muon', LONG][STEPS])} times as many",
    )


def test_seconds(groups):
    cells = speed_ups(groups, "adamw")
    one = {row: read_run(EVIDENCE / f"30m_python/{row}_max_iters=1560_seed=6") for row in ("adamw", "muon", SPECTRAL)}
    assert {run.device for run in one.values()} == {"1 x NVIDIA H100 80GB HBM3"}
    ms = {row: run.final["seconds"] / 1.56 for row, run in one.items()}
    other = read_run(EVIDENCE / "30m_python/muon_max_iters=780_seed=3").final["seconds"] / 0.78
    alone = {}
    for row in ("adamw", SPECTRAL):
        runs = [run for one in read_groups(f"30m_python/{row}_max_iters=*") for run in one.runs if not run.shared]
        for gpu in ("H200", "H100"):
            alone[row, gpu] = 1000 * np.mean([r.final["seconds"] / r.final["step"] for r in runs if gpu in r.device])
    over = cells[SPECTRAL, LONG][SECONDS]
    assert over.startswith("> ")
    assert_said(
        VERDICTS,
        f"needs {cells[SPECTRAL, MIDDLE][SECONDS]} times its seconds (H200), at 5,200 more than {over[2:]} (H100",
        f"{alone[SPECTRAL, 'H200']:.1f} ms against {alone['adamw', 'H200']:.1f} on H200, "
        f"{alone[SPECTRAL, 'H100']:.1f} against {alone['adamw', 'H100']:.1f} on H100",
        f"one run each, {ms[SPECTRAL]:.1f} against {ms['adamw']:.1f}, with which {over.split()[1]} would be "
        f"{1.5 * ms['adamw'] / ms[SPECTRAL]:.2f}",
        f"in seconds {cells['muon', SHORT][SECONDS]} at 780 and {cells['muon', MIDDLE][SECONDS]} at 1,560",
        f"{other:.0f} to {ms['muon']:.0f} ms a step on two H100 hosts",
    )
    ours, theirs = groups[SPECTRAL, SHORT], groups["adamw", MIDDLE]
    half = [f"{0.5 * alone[SPECTRAL, gpu] / alone['adamw', gpu]:.2f} ({gpu})" for gpu in ("H200", "H100")]
    assert_said(
        VERDICTS,
        f"its 780 steps end at {np.mean(ours.losses):.3f}, AdamW's 1,560 at {np.mean(theirs.losses):.3f} (p = "
        f"{p(ours, theirs)}), in {' and '.join(half)} of the time",
    )
    times = [f"{alone[SPECTRAL, gpu] / alone['adamw', gpu]:.2f} ({gpu})" for gpu in ("H200", "H100")]
    assert_said(OPENING, f"takes {' and '.join(times)} times as long as AdamW's")


def test_adamw_further():
    def best(name):
        runs = [run for run in json.loads((EVIDENCE / name / "sweep.json").read_text())["runs"] if run["loss"]]
        return runs, min(float(run["loss"]) for run in runs if run["optimizer"] == "adamw")

    (runs, further), (_, tuned) = best("30m_further"), best("30m_python")
    gain = f"{further:.3f} with one seed, {tuned - further:.3f} below"
    assert_said(VERDICTS, f"{len(runs)} of 50 runs are done", gain)


def test_clipped_steps(groups):
    adamw, sophiag = (np.mean(clipped(groups[row, LONG])) for row in ("adamw", "sophiag"))
    assert_said(VERDICTS, f"clipped in {adamw:.1f}% of AdamW's steps and {sophiag:.1f}% of Sophia-G's")


def test_large_batches(groups):
    state = json.loads((EVIDENCE / "30m_large/sweep.json").read_text())
    tuning = [run for run in state["runs"] if run["seed"] is None]
    rates = {row: [run["swept"]["learning_rate"] for run in tuning if run["optimizer"] == row] for row in ROWS.values()}
    best, ours = (groups[row, LARGE].runs for row in ("muon", SPECTRAL))
    assert {len(own) for own in rates.values() if own} == {4}
    assert best[0].config["learning_rate"] == ours[0].config["learning_rate"] == max(rates[SPECTRAL]) == 0.064
    adamw, muon = (groups[row, LARGE] for row in ("adamw", "muon"))
    loss = {row: min(run["loss"] for run in tuning if run["optimizer"] == row) for row in ("muon", SPECTRAL)}
    half = {row: read_groups(f"30m_large_3.2e-2/best_{row}_*")[0] for row in ("muon", SPECTRAL)}
    assert verdict(half["muon"].losses, half[SPECTRAL].losses)[1].startswith("no difference")
    said = {row: f"{np.mean(one.losses):.3f} ± {one.interval:.3f}" for row, one in half.items()}
    assert_said(
        VERDICTS,
        f"Muon is better than AdamW by {behind(adamw, muon)} ({p(muon, adamw)})",
        f"ends {loss['muon'] - loss[SPECTRAL]:.3f} below Muon's of the same seed ({loss[SPECTRAL]:.3f} and "
        f"{loss['muon']:.3f})",
        f"no difference is shown ({said[SPECTRAL]} against Muon's {said['muon']}, p = "
        f"{p(half[SPECTRAL], half['muon'])})",
    )


def test_schedules_move_the_loss_little():
    runs = {path.name: read_run(path).final["val/loss"] for path in EVIDENCE.glob("30m_schedules/*")}
    plain = {False: runs["as_it_is"], True: runs["spectral_as_it_is"]}
    worse = {name: loss - plain[name.startswith("spectral")] for name, loss in runs.items()}
    spectral = [worse[f"spectral_beta1_{schedule}"] for schedule in ("0.85_0.95_300", "0.95_0.85_780")]
    most = max(abs(change) for name, change in worse.items() if not name.startswith("spectral"))
    assert len(worse) == 12
    assert_said(
        VERDICTS,
        f"eigenbasis by {most:.3f} or less at 780 steps",
        f"a rising and a falling beta1 ended {spectral[0]:.3f} and {spectral[1]:.3f} higher",
    )


def test_124m():
    names = {"muon": "Muon", SPECTRAL: "the spectral step", "soap": "SOAP", "sophiag_eigenbasis": "Sophia-G in the"}
    runs = {row: read_run(EVIDENCE / f"124m_python/{row}_max_iters=2300_seed=1") for row in (*names, "adamw")}
    loss = {row: run.final["val/loss"] for row, run in runs.items()}
    *seconds, last = (f"{run.final['seconds']:.0f}" for run in runs.values())
    said = [f"{loss[row]:.3f} with {name}" for row, name in (names | {"adamw": "AdamW"}).items()]
    assert_said(VERDICTS, *said, f"after {', '.join(seconds)} and {last} seconds")


def test_rho_and_beta2_are_what_the_sweep_says():
    state = json.loads((EVIDENCE / "30m_rho_beta2/sweep.json").read_text())
    loss = {(run["swept"]["rho"], run["swept"]["beta2"]): run["loss"] for run in state["runs"]}
    rhos, betas = ({key[i] for key in loss} for i in (0, 1))
    by_rho = [[loss[rho, beta2] for beta2 in betas] for rho in sorted(rhos)]
    by_beta2 = [[loss[rho, beta2] for rho in rhos] for beta2 in betas]
    assert all(max(own) - min(own) < 0.03 for own in by_rho) and "beta2 matters by less than 0.03" in VERDICTS
    spread = [max(own) - min(own) for own in by_beta2]
    assert f"rho by {min(spread):.2f} to {max(spread):.2f}" in VERDICTS
    assert f"{min(by_rho[-1]):.2f} to {max(by_rho[-1]):.2f}, with 98% or more" in VERDICTS
