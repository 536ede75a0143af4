"""What was best for each optimizer in the equal tunings, to be run at other lengths: sweep files are made with it.

common = {"max_iters": [1560], "seed": [1, 2, 3]}
optimizers = run_path("config/best.py")["best_of"]("30m_python_one_rate", "30m_python", max_iters=1560)
"""

import json
from pathlib import Path


def best_of(*names, max_iters, only=None):
    """The `optimizers` of a sweep: each with the settings of its lowest loss in the sweeps whose results are in
    assets/evidence/NAME/sweep.json, all but max_iters. The warm-up keeps its share of the run. only: some of them.
    """
    best = {}
    for name in names:
        path = Path(__file__).resolve().parents[1] / "assets" / "evidence" / name / "sweep.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        for run in state["runs"]:
            optimizer, loss = run["optimizer"], run["loss"]
            if run["seed"] is not None or loss is None or (only and optimizer not in only):
                continue  # of fresh seeds, not done, or not wanted
            if optimizer not in best or float(loss) < best[optimizer][0]:
                settings = {**state["sweep"]["common"], **state["sweep"]["optimizers"][optimizer], **run["swept"]}
                best[optimizer] = float(loss), {"optimizer_name": optimizer, **settings}
    for _, settings in best.values():
        settings["warmup_iters"] = round(settings["warmup_iters"] * max_iters / settings.pop("max_iters"))
    return {optimizer: settings for optimizer, (_, settings) in best.items()}
