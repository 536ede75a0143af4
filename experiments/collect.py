"""Copy finished runs into experiments/: small enough to commit, enough for compare.py to make tables and figures again.

python experiments/collect.py NAME RUN [RUN ...]     # RUN: the out_dir of a run or of a sweep

A run's config.json loses the folders of this machine. Its metrics.jsonl keeps at most LINES lines, the KEYS that tables
and figures read, and 6 significant digits: every evaluation, the first and the last lines, and others evenly between.
From a sweep it takes the runs with held-out seeds or, if the seed was swept, every finished run. The sweep.json is
merged with the one in NAME. A run that is in NAME already is not replaced: remove it first.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis.runs import read_run, read_sweep
from sweep import state_text
from training.errors import Parser, UserError, command
from training.foreign import is_plain_name, read_json
from training.metrics import CONFIG, METRICS, STATE, read_metrics
from training.tracking import write_atomically

EXPERIMENTS = Path(__file__).resolve().parent
LINES = 48  # of a run's metrics
KEYS = (
    "step", "tokens", "epoch", "flops", "seconds", "train/loss", "val/loss", "val/accuracy", "lr", "grad_norm",
    "train/clip_rate", "stage/length", "stage/clip_rate", "train/win_rate", "train/win_rate/matrices",
    "tokens_per_second", "memory_gib",
)  # fmt: skip
FOLDERS = re.compile(r"""(?<![^\s=:'"(])(?:~|\.\.)?/(?:[^\s/]+/)*(?=[^\s/])""")  # of an absolute path, or from ~ or ..


def main(argv=None, experiments=EXPERIMENTS):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", metavar="NAME", help="folder in experiments/")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run or of a sweep")
    arguments = parser.parse_args(argv)
    if not is_plain_name(arguments.name):
        raise UserError(f"NAME = {arguments.name!r} is no name of a folder in experiments/; give one without '/'.")
    target, files, state = experiments / arguments.name, {}, None
    if (target / STATE).exists():
        state = read_sweep(target)
    for folder in map(Path, arguments.runs):
        runs = [folder]
        if (folder / STATE).exists():
            own = rounded(portable(read_sweep(folder)))
            chosen = [run for run in own["runs"] if run["seed"] is not None or "seed" in run["swept"]]
            runs = [folder / run["run"] for run in chosen if run["loss"] is not None]
            state = merged(state, own)
        for run in runs:
            read_run(run)  # refuses what compare.py could not read
            facts, lines = read_json(run / CONFIG), thinned(run)
            facts |= {key: portable(facts[key]) for key in ("config", "command", "history") if key in facts}
            place = target / "runs" / run.resolve().name
            if place.exists() or place / CONFIG in files:
                raise UserError(f"{place} is there, or would be written twice; remove it, or take another NAME.")
            files[place / CONFIG] = json.dumps(facts, indent=2) + "\n"
            files[place / METRICS] = "".join(json.dumps(line) + "\n" for line in lines)
    if state is not None:
        files[target / STATE] = state_text(state)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    print(f"wrote {len(files)} files, {sum(map(len, files.values())) / 1e3:,.0f} kB, to {target}")


def merged(state, other):
    """`other`'s runs after `state`'s; both definitions in a list where they differ (steps=780, steps=1560, ...)."""
    if state is None:
        return other
    known = state["sweep"] if isinstance(state["sweep"], list) else [state["sweep"]]
    sweeps = known + [other["sweep"]] * (other["sweep"] not in known)
    runs = {run["run"]: run for run in state["runs"]}
    for run in other["runs"]:
        loss = runs.get(run["run"], run)["loss"]
        if None not in (loss, run["loss"]) and loss != run["loss"]:
            raise UserError(f"{run['run']} ended at {loss} in the sweep.json that is there, not at {run['loss']}.")
        if run["loss"] is not None or run["run"] not in runs:
            runs[run["run"]] = run
    return {"sweep": sweeps if len(sweeps) > 1 else sweeps[0], "runs": list(runs.values())}


def portable(value):
    """`value`, of JSON, with the paths of this machine in its strings cut down to the name of the file."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value


def rounded(state):
    """A sweep.json with losses of 6 significant digits, as the metrics have them."""
    return state | {"runs": [run | {"loss": six_digits(run["loss"])} for run in state["runs"]]}


def six_digits(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def thinned(run):
    """At most LINES lines of its metrics."""
    lines = read_metrics(run / METRICS)
    kept = {0, len(lines) - 1, *(i for i, line in enumerate(lines) if "val/loss" in line)}
    kept |= set([i for i, line in enumerate(lines) if "train/loss" in line][-1:])  # the share of clipped steps is in it
    if len(kept) > LINES:
        raise UserError(f"{run / METRICS} has {len(kept)} lines with a val/loss; at most {LINES} lines are committed.")
    others = [i for i in range(len(lines)) if i not in kept]
    places = np.linspace(len(others) - 1, 0, min(LINES - len(kept), len(others)))
    kept |= {others[i] for i in places.round().astype(int)}
    keys = [*KEYS, *dict.fromkeys(key for line in lines for key in line if key.startswith("val/loss/"))]
    return [{key: six_digits(lines[i][key]) for key in keys if key in lines[i]} for i in sorted(kept)]


if __name__ == "__main__":
    command(main)
