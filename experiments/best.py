"""The best settings of each optimizer in a finished tuning, for sweep files that run them at other lengths.

from experiments.best import best_of
optimizers = best_of("30m_tuning", steps=1560)
"""

from pathlib import Path
from runpy import run_path

from training.foreign import read_json

EXPERIMENTS = Path(__file__).resolve().parent


def best_of(name, steps, only=None):
    """The `optimizers` of a sweep: each with the settings of its lowest loss in experiments/NAME/sweep.json.

    max_iters and seed are left out; the warm-up keeps its share of the run. only: some of the optimizers.
    ValueError for an optimizer whose tuning has not ended: it would have had fewer runs than the others.
    """
    state, best = read_json(EXPERIMENTS / name / "sweep.json"), {}
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
        best[optimizer]["warmup_iters"] = round(best[optimizer]["warmup_iters"] * steps / tuned_for)
    return best


def whitened_muon(steps):
    """The settings of 30m_whitening's variant `both` at another length."""
    whitening = sweep_of("30m_whitening")
    settings = whitening["settings"] | whitening["variants"]["both"]
    warmup = round(settings["warmup_iters"] * steps / settings.pop("max_iters"))
    return settings | {"warmup_iters": warmup}


def with_seeds(optimizers, held_out, only="", **common):
    """What a sweep file defines: the optimizers, or those that `only` names, with the seeds of `held_out`.

    The sweep files that use it have these options: steps, the training horizon; held_out, seeds that no tuning used;
    only, some of the optimizers. Steps and seeds are lists of swept values, so that labels hold them.
    """
    names = only.split(",") if only else optimizers
    seeds = [int(seed) for seed in held_out.split(",")]
    return {"common": {"seed": seeds} | common, "optimizers": {name: optimizers[name] for name in names}}


def sweep_of(name):
    """The names that experiments/NAME/sweep.py assigns, for a sweep file with the same ranges."""
    return run_path(str(EXPERIMENTS / name / "sweep.py"))
