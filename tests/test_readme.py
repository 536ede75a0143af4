"""The README against the code: its snippet runs, its table is the settings, its files and scripts are there."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.report import markdown_table
from compare import group, read_run, speed_rows, verdict
from sophia import SophiaG
from tests.conftest import ROOT
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import describe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def settings_table():
    """The README's table of settings; `python -m tests.test_readme` prints it."""
    ours = {row[0]: row for row in describe(SophiaConfig)}
    adam = {row[0]: row for row in describe(AdamConfig)}
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, (_, kind, default, help) in ours.items():
        if name not in adam:
            help = f"Sophia: {help}"
        elif name == "optimizer_name":
            default, help = f"{adam[name][2]} / {default}", f"{adam[name][3]} / {help}"
        elif adam[name][2] != default:
            default = f"{adam[name][2]} (AdamW), {default} (Sophia)"
        lines.append(f"| `{name}` | {kind} | {default} | {help} |")
    lines += [f"| `{row[0]}` | {row[1]} | {row[2]} | {row[3]} |" for row in adam.values() if row[0] not in ours]
    return "\n".join(lines)


def test_settings_table_is_the_code():
    assert settings_table() in README, "print it with: python -m tests.test_readme"


LOOP, TRAINER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop_runs():
    names = {}
    exec(compile(LOOP, "README.md", "exec"), names)
    assert names["optimizer"].statistics()["hessian_norm"] > 0


def test_the_trainer_is_the_one_that_the_docstring_has_and_its_test_runs():
    code = TRAINER.removeprefix("# needs: model, args, dataset, k, tokens, bs\n")
    assert " ".join(code.split()) in " ".join(SophiaG.__doc__.split())


def test_tables_of_measurements_are_their_files():
    for path in re.findall(r"bench.py table (assets/bench/\w+.json)", README):
        assert markdown_table(ROOT / path) in README, path


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

FOLDER = "assets/evidence/30m_python/{}_max_iters={}_seed={}"
COLUMNS = {  # of the same: where their runs are, and of how many steps
    "780 steps": ("30m_python", 780),
    "1,560 steps": ("30m_python", 1560),
    "5,200 steps": ("30m_python", 5200),
    "260, large batches": ("30m_large", 260),
    "390, books": ("30m_books", 390),
}


def row_of(one):
    run = Path(one.runs[0].name).name.removeprefix("best_")
    return max((row for row in ROWS.values() if run.startswith(f"{row}_")), key=len)


def test_what_sophia_buys_is_what_the_runs_say():
    section = README.split("## What Sophia buys")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    said = {(ROWS[row[0]], head): cell for row in rows[2:] for head, cell in zip(rows[0][1:], row[1:], strict=True)}
    said, measured, groups, losses = {key: cell for key, cell in said.items() if cell}, {}, {}, {}
    for head, (name, steps) in COLUMNS.items():
        folders = [path.parent for path in sorted(ROOT.glob(f"assets/evidence/{name}/*/config.json"))]
        groups[name] = group([read_run(path) for path in folders])
        for one in groups[name]:
            digits = 3 if one.interval is None or one.interval >= 5e-4 else 4
            spread = f" ± {one.interval:.{digits}f}" if one.interval else ", one seed"
            row = row_of(one)
            if one.steps == steps:
                assert (row, head) not in measured, "two groups in one cell"
                losses[row, head] = one.losses
                measured[row, head] = f"{np.mean(one.losses):.3f}{spread}"
    assert said == measured
    prose, named = " ".join(section.split("```")[2].split()), {one.label: row_of(one) for one in groups["30m_python"]}
    speeds = {(named[label], steps): cells for label, steps, *cells in list(speed_rows(groups["30m_python"]))[1:]}
    for row, head in product(("muon", "sophiag_spectral"), ("780 steps", "1,560 steps")):  # the seeds set aside
        steps = COLUMNS[head][1]
        (five,) = group([read_run(ROOT / FOLDER.format(row, steps, seed)) for seed in range(6, 11)])
        losses[f"{row}, set aside", head] = five.losses

    def p(ours, theirs, head):
        value = verdict(losses[ours, head], losses[theirs, head])[0]
        return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"  # as compare.py prints it

    def speed_up(row, head, key=1):
        return speeds[row, head.removesuffix(" steps")][key]

    def both(row, key=1):
        return f"{speed_up(row, short, key)} and {speed_up(row, middle, key)}"

    def share(row, head, key=1):  # of what AdamW needs
        return f"{1 / float(speed_up(row, head, key).split()[0]):.2f}"

    def behind(head, rival="muon", what=""):
        return f"{np.mean(losses[rival + what, head]) - np.mean(losses[spectral + what, head]):.3f}"

    def needs(rival, row):  # of the rival's steps for the row's loss, at the two lengths
        ours = [one for one in groups["30m_python"] if row_of(one) in (rival, row)]
        found = {(row_of(one), one.steps): one.label for one in ours}
        ours.sort(key=lambda one: row_of(one) != rival)
        rows = {(label, steps): cells[1] for label, steps, *cells in list(speed_rows(ours))[1:]}
        return " and ".join(rows[found[row, steps], f"{steps:,}"] for steps in (780, 1560))

    def alone(row):  # seconds of the run with company on no device, of one host for all
        return read_run(ROOT / FOLDER.format(row, 1560, 6)).final["seconds"]

    fresh, spectral, (short, middle, long, large, books) = "sophiag_eigenbasis_fresh", "sophiag_spectral", COLUMNS
    for row, better, worse in (
        ("sophiag", [], [middle, large, books]),
        ("sophiah", [], [short, middle, long, large, books]),
        ("lion", [], [short, middle, large, books]),
        ("sophiag_adamw", [short], []),
        (spectral, [short, middle, long, books], []),
        (fresh, [short, middle, long, large], []),
    ):
        ran = {head: verdict(losses[row, head], losses["adamw", head])[1] for head in COLUMNS if (row, head) in losses}
        assert [head for head in ran if ran[head] == "better"] == better, row
        assert [head for head in ran if ran[head] == "worse"] == worse, row
    state = json.loads((ROOT / "assets/evidence/30m_large/sweep.json").read_text())
    rates = {run["swept"]["learning_rate"]: run["loss"] for run in state["runs"] if run["optimizer"] == "muon"}
    assert f"with one seed Muon came to {min(loss for loss in rates.values() if loss):.3f}" in prose
    behind_adamw = np.mean(losses["sophiag_adamw", short]) - np.mean(losses["adamw", short])
    seconds, opening = 4, " ".join(section.split("GPT-2 with 30M")[0].split())
    for claim in (
        f"in {share(spectral, short)} to {share(spectral, middle)} of the steps, at 1,560 steps in",
        f"in {share(spectral, middle, seconds)} of the time;",
        f"with AdamW for the embeddings {-behind_adamw:.3f} nats better at 780 steps",
        f"by {behind(middle)} to {behind(long)} nats on code and {behind(books)} on books",
        f"in {share('muon', short)} to {share('muon', middle)} of the steps and",
        f"and {share('muon', short, seconds)} to {share('muon', middle, seconds)} of the time.",
    ):
        assert claim in opening, claim
    (again,) = group([read_run(path) for path in sorted(ROOT.glob("assets/evidence/30m_spectral_again/sophiag*/"))])
    millis = {row: alone(row) / 1.56 for row in ("adamw", "muon", spectral)}
    quick = float(speed_up(spectral, middle).split()[0])
    for claim in (
        f"needs {both(spectral)} times its steps at 780 and 1,560",
        f"at 1,560 {speed_up(spectral, middle, seconds)} times its seconds",
        f"on an H100 {quick * millis['adamw'] / millis[spectral]:.2f}, {millis[spectral]:.1f} ms a step against",
        f"against {millis['adamw']:.1f}, one run each",
        f"to {millis['muon']:.0f} ms a step on an H100",
        f"needs {both('muon')} times its steps, {both('muon', seconds)} times its seconds",
        f"needs {both(fresh)} times its steps, {both(fresh, seconds)} times its seconds",
        f"Muon needs {needs('muon', spectral)} times its steps",
        f"second host's three seeds came to {np.mean(again.losses):.3f} ± {again.interval:.3f} at 780",
        f"worse than AdamW at 1,560 steps (p = {p('sophiag', 'adamw', middle)})",
        f"with large batches ({p('sophiag', 'adamw', large)}) and on books ({p('sophiag', 'adamw', books)})",
        f"no difference is shown ({p('sophiag', 'adamw', short)} and {p('sophiag', 'adamw', long)}, on the worse",
        f"is better at 780 steps ({p('sophiag_adamw', 'adamw', short)}), at 1,560 no difference is shown "
        f"({p('sophiag_adamw', 'adamw', middle)})",
        f"of code p = {p(spectral, 'adamw', short)}, {p(spectral, 'adamw', middle)} and {p(spectral, 'adamw', long)}",
        f"books {p(spectral, 'adamw', books)}",
        f"SOAP is {behind(short, 'soap')} and {behind(middle, 'soap')} behind it",
        f"({p(spectral, 'soap', short)} and {p(spectral, 'soap', middle)})",
        f"by {behind(short, what=', set aside')} at 780 and {behind(middle, what=', set aside')} at 1,560 steps (p = "
        f"{p('sophiag_spectral, set aside', 'muon, set aside', short)} and "
        f"{p('sophiag_spectral, set aside', 'muon, set aside', middle)})",
        f"with all eight p = {p(spectral, 'muon', short)} and {p(spectral, 'muon', middle)}",
        f"at 5,200 by {behind(long)} ({p(spectral, 'muon', long)}), on books by {behind(books)}",
        f"({p(spectral, 'muon', books)})",
        f"at all lengths (p = {', '.join(p(fresh, 'adamw', head) for head in (short, middle, long))})",
        f"and with large batches ({p(fresh, 'adamw', large)})",
        f"better at 780 and 1,560 ({p(fresh, 'muon', short)} and {p(fresh, 'muon', middle)})",
        f"at 5,200 no difference is shown ({p(fresh, 'muon', long)})",
        f"better at 1,560 ({p(fresh, 'soap', middle)})",
        f"at all three ({', '.join(p(fresh, spectral, head) for head in (short, middle, long))})",
    ):
        assert claim in prose, claim
    named = {"muon": "Muon", spectral: "the spectral step", "soap": "SOAP", "sophiag_eigenbasis": "Sophia-G in the"}
    seconds = []
    for row, name in (named | {"adamw": "AdamW"}).items():
        run = read_run(ROOT / f"assets/evidence/124m_python/{row}_max_iters=2300_seed=1")
        assert f"{run.final['val/loss']:.3f} with {name}" in prose, name
        seconds.append(f"{run.final['seconds']:.0f}")
    assert f"after {', '.join(seconds[:-1])} and {seconds[-1]} seconds" in prose


def test_rho_and_beta2_are_what_the_sweep_says():
    state = json.loads((ROOT / "assets/evidence/30m_rho_beta2/sweep.json").read_text())
    loss = {(run["swept"]["rho"], run["swept"]["beta2"]): run["loss"] for run in state["runs"]}
    rhos, betas = ({key[i] for key in loss} for i in (0, 1))
    by_rho = [[loss[rho, beta2] for beta2 in betas] for rho in sorted(rhos)]
    by_beta2 = [[loss[rho, beta2] for rho in rhos] for beta2 in betas]
    assert all(max(own) - min(own) < 0.03 for own in by_rho) and "beta2 matters by less than 0.03" in README
    spread = [max(own) - min(own) for own in by_beta2]
    assert f"rho by {min(spread):.2f} to {max(spread):.2f}" in " ".join(README.split())
    assert f"{min(by_rho[-1]):.2f} to {max(by_rho[-1]):.2f}, with 98% or more" in " ".join(README.split())


def test_files_that_it_names_are_there():
    named = set(re.findall(r"(?:config|data|assets|training)/[\w/]+\.(?:py|png|svg|json)", README))
    named |= set(re.findall(r"python (\w+\.py)", README))
    assert {"train_adam.py", "config/train_gpt2_small_sophiag.py", "data/text/prepare.py"} <= named
    made_up = {"FILE", "SIZE"}  # stand for names
    missing = [name for name in named if not (ROOT / name).exists() and not made_up & set(re.split(r"[_./]", name))]
    assert not missing


if __name__ == "__main__":
    print(settings_table())
