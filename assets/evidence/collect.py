"""Bring finished runs into the repository: small enough to commit, enough for compare.py to redo table and figures.

    python assets/evidence/collect.py NAME RUN [RUN ...]     # RUN: the out_dir of a run or of a sweep
    python compare.py assets/evidence/NAME/*/ --out=assets/NAME

writes to assets/evidence/NAME/<the run's folder name>/ its config.json, without the folders of this machine, and of its
metrics.jsonl at most 500 lines: every evaluation, the first and the last, and of the others as many as fit. Of a sweep
it takes sweep.json and the best settings' runs with fresh seeds. One NAME is one comparison, in which compare.py takes
the first folder as the baseline. What is there is not replaced: remove it first.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from compare import read_run
from sweep import state_text
from training.errors import Parser, UserError, command
from training.metrics import CONFIG, METRICS, STATE, read_metrics
from training.tracking import write_atomically

EVIDENCE = Path(__file__).resolve().parent
LINES = 500  # of a file
FOLDERS = re.compile(r"""(?<![^\s=:'"(])(?:~|\.\.)?/(?:[^\s/]+/)*(?=[^\s/])""")  # of an absolute path, or from ~ or ..


def main(words=None, evidence=EVIDENCE):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="folder in assets/evidence")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run or of a sweep")
    arguments = parser.parse_args(words)
    target, files = evidence / arguments.name, []
    for folder in map(Path, arguments.runs):
        runs = [folder]
        if (folder / STATE).exists():
            try:
                state = json.loads((folder / STATE).read_text(encoding="utf-8"))
                runs = [folder / run["run"] for run in state["runs"] if run["seed"] is not None]
                files.append((target / STATE, state_text(portable(state))))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{folder / STATE} is damaged ({error}); run the sweep again to mend it.") from None
        for run in runs:
            read_run(run)  # refuses what compare.py could not read
            facts, lines = json.loads((run / CONFIG).read_text(encoding="utf-8")), thinned(run)
            facts |= {key: portable(facts[key]) for key in ("config", "command") if key in facts}
            place = target / run.resolve().name
            files.append((place / CONFIG, json.dumps(facts, indent=2) + "\n"))
            files.append((place / METRICS, "".join(json.dumps(line) + "\n" for line in lines)))
    paths = [path for path, _ in files]
    if there := [path for path in paths if path.exists() or paths.count(path) > 1]:
        raise UserError(f"{there[0]} is there, or would be written twice; remove it, or take another NAME.")
    for path, text in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    print(f"wrote {len(files)} files, {sum(len(text) for _, text in files) / 1e3:,.0f} kB, to {target}")


def portable(value):
    """`value`, of JSON, with the paths of this machine in its strings cut down to the name of the file."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value


def thinned(run):
    """At most LINES lines of its metrics."""
    lines = read_metrics(run / METRICS)
    kept = {0, len(lines) - 1, *(i for i, line in enumerate(lines) if "val/loss" in line)}
    if len(kept) > LINES:
        raise UserError(f"{run / METRICS} has {len(kept)} lines with a val/loss; at most {LINES} lines are committed.")
    others = [i for i in range(len(lines)) if i not in kept]
    places = np.linspace(len(others) - 1, 0, min(LINES - len(kept), len(others)))  # the last one first
    return [lines[i] for i in sorted(kept | {others[i] for i in places.round().astype(int)})]


if __name__ == "__main__":
    command(main)
