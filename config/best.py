"""What was best for each optimizer in an equal tuning, to be run at other lengths: sweep files are made with it.

common = {"max_iters": [1560], "seed": [1, 2, 3]}
optimizers = run_path("config/best.py")["best_of"]("30m_python", max_iters=1560)
"""

import json
from pathlib import Path

EVIDENCE = Path(__file__).resolve().parents[1] / "assets" / "evidence"


def best_of(name, max_iters, only=None):
    """The `optimizers` of a sweep: each with the settings of its lowest loss in the sweep whose results are in
    assets/evidence/NAME/sweep.json, all but max_iters and seed. The warm-up keeps its share of the run. only: some of
    them.

    ValueError for an optimizer whose tuning has not ended: it would have had fewer runs than the others.
    """
    state, best = json.loads((EVIDENCE / name / "sweep.json").read_text(encoding="utf-8")), {}
    common, named = state["sweep"]["common"], state["sweep"]["optimizers"]
    for optimizer in only or named:
        runs = [run for run in state["runs"] if run["optimizer"] == optimizer and run["seed"] is None]
        losses = [run["loss"] for run in runs]
        if not runs or None in losses or all(loss == "inf" for loss in losses):
            raise ValueError(f"{optimizer} is not tuned yet in {name}, or diverged in every run")
        run = min(runs, key=lambda run: float(run["loss"]))
        best[optimizer] = {"optimizer_name": optimizer, **common, **named[optimizer], **run["swept"]}
        tuned_for = best[optimizer].pop("max_iters")
        best[optimizer].pop("seed", None)
        best[optimizer]["warmup_iters"] = round(best[optimizer]["warmup_iters"] * max_iters / tuned_for)
    return best
