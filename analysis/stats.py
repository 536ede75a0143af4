"""Verdicts on final losses by Welch's test, and speed-ups over the baseline.

A speed-up is the cost at which the baseline reaches the same final loss, divided by the cost of this optimizer. It is
read off the final losses of the baseline at several training horizons, each with a schedule of its own.
"""

import math

import numpy as np

from analysis.runs import unshared_by_device

ALPHA = 0.01  # with five optimizers against one baseline, one false claim in 20 tables


def verdict(ours, baseline):
    """(p of Welch's two-sided t-test or None, the verdict in words) for the final losses of two groups."""
    from scipy import stats

    if diverged := int(np.sum(~np.isfinite(ours))):
        return None, f"diverged in {diverged} of {len(ours)}"
    if min(len(ours), len(baseline)) < 2:
        return None, "no claim: one seed"
    if not np.isfinite(baseline).all() or not (np.ptp(ours) or np.ptp(baseline)):
        return None, "no claim: the baseline diverged" if np.ptp(ours) else "no claim: seeds do not differ"
    p = float(stats.ttest_ind(ours, baseline, equal_var=False).pvalue)
    if p < ALPHA:
        return p, "better" if np.mean(ours) < np.mean(baseline) else "worse"
    return p, f"no difference shown with n = {len(ours)} and {len(baseline)}"


def p_text(p):
    """'0.0143', '6e-05'; '' without a test."""
    return "" if p is None else f"{p:.4f}" if p >= 1e-4 else f"{p:.0e}"


def is_baseline(group, groups, parameters):
    """Whether `group` is finished, of the baseline's optimizer and of this model size."""
    return group.finished and group.optimizer == groups[0].optimizer and group.parameters == parameters


def baseline_of(group, groups):
    """The baseline for `group`: the same number of steps and model size; None if there is none.

    It is the group of the first run or, at other horizons and sizes, the best group of the baseline's optimizer.
    """
    found = [g for g in groups if is_baseline(g, groups, group.parameters) and g.steps == group.steps]
    if groups[0] in found:
        return groups[0]
    return min(found, key=lambda g: g.losses.mean(), default=None)


def baseline_horizons(group, groups):
    """The baseline's groups for `group`'s model size, one for each training horizon, the shortest first."""
    found = {g.steps: baseline_of(g, groups) for g in groups if is_baseline(g, groups, group.parameters)}
    return [found[steps] for steps in sorted(found) if np.isfinite(found[steps].losses).all()]


def steps_needed(horizons, losses, target):
    """Steps at which curves through `losses` (n, k) at `horizons` (k,) first fall to `target` (n,).

    Monotone cubic interpolation on log steps, never extrapolation. 0 if the shortest horizon is below the target
    already, inf if none reaches it.
    """
    from scipy.interpolate import PchipInterpolator

    grid = np.linspace(math.log(horizons[0]), math.log(horizons[-1]), 513)
    above = PchipInterpolator(np.log(horizons), losses, axis=1)(grid) - target[:, None]
    first = np.argmax(above <= 0, axis=1)
    last = np.maximum(first - 1, 0)
    rows = np.arange(len(target))
    fall = above[rows, last] - above[rows, first]
    share = np.divide(above[rows, last], fall, out=np.zeros_like(fall), where=fall > 0)
    steps = np.exp(grid[last] + share * (grid[first] - grid[last]))
    steps = np.where(above[:, 0] < 0, 0.0, steps)
    return np.where((above > 0).all(axis=1), np.inf, steps)


def baseline_needs(horizons, baseline, ours, draws=4000):
    """(steps, low, high) that the baseline needs for the mean of the losses `ours`; low and high None without seeds.

    horizons: the baseline's numbers of steps; baseline: the final losses at each. The 95% interval comes from draws of
    all means at once, each from Student's distribution around its value. The seeds' variance is taken as equal at all
    horizons, because there are few seeds. The interval does not include the error of the interpolation.
    """
    samples = [*baseline, ours]
    means, counts = (np.array([f(s) for s in samples], dtype=float) for f in (np.mean, len))
    steps = steps_needed(horizons, means[None, :-1], means[-1:])[0]
    freedom = int(counts.sum()) - len(samples)
    if freedom < 1 or len(ours) < 2:
        return steps, None, None
    spread = math.sqrt(sum(float(np.var(s)) * len(s) for s in samples) / freedom)
    random = np.random.default_rng(0)  # the same runs give the same interval
    scale = spread * np.sqrt(freedom / random.chisquare(freedom, (draws, 1)))
    drawn = means + scale * random.standard_normal((draws, len(samples))) / np.sqrt(counts)
    needed = np.sort(steps_needed(horizons, drawn[:, :-1], drawn[:, -1]))
    return steps, needed[int(0.025 * draws)], needed[int(0.975 * draws)]


def step_cost(group, baseline, key):
    """(cost of a baseline's step, as a share of the cost of one of the group's runs; or why it is unknown).

    key: the metric that measures cost: step, tokens, flops or seconds. One of the two results is None. Seconds are
    compared only between runs on the same device that had it to themselves; losses may come from any device.
    """
    ours, theirs = group.runs, [run for other in baseline for run in other.runs]
    if key == "seconds":
        timed, others = unshared_by_device(ours), unshared_by_device(theirs)
        if not timed or not others:
            return None, "shared"
        if not timed.keys() & others:
            return None, "other devices"
        device = max((device for device in timed if device in others), key=lambda device: len(timed[device]))
        ours, theirs = timed[device], others[device]
    if any(key not in run.final for run in [*ours, *theirs]):
        return None, "not logged"
    cost = np.mean([run.final[key] for run in ours])
    return (np.mean([run.final[key] / run.final["step"] for run in theirs]) / cost if cost else math.nan), None
