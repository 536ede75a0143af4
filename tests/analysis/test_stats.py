"""Verdicts and speed-ups: false claims at the stated rate, planted effects found, nothing extrapolated."""

import numpy as np
import pytest

from analysis.runs import group, read_run
from analysis.stats import baseline_needs, baseline_of, step_cost, steps_needed, verdict
from tests.analysis.made_runs import edit, write_seeds


@pytest.mark.parametrize("n", [2, 3, 5])
def test_identical_optimizers_show_no_difference(n):
    """In 98% of draws or more; the rule allows a false claim in 1%."""
    random = np.random.default_rng(n)
    words = [verdict(*random.normal(2, 0.02, (2, n)))[1] for _ in range(1000)]
    none = sum(word.startswith("no difference shown") for word in words)
    assert none >= 980 and none + words.count("better") + words.count("worse") == 1000


def test_welch_agrees_with_the_textbook():
    """Student (1908), additional hours of sleep, not paired: t = -1.8608 with 17.776 degrees, p = 0.07939."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    p, words = verdict(np.array(second), np.array(first))
    assert p == pytest.approx(0.07939, abs=1e-5) and words == "no difference shown with n = 10 and 10"


@pytest.mark.parametrize(
    "ours, baseline, words",
    [
        ([1.90, 1.91, 1.92], [2.00, 2.01, 2.02], "better"),
        ([2.10, 2.11, 2.12], [2.00, 2.01, 2.02], "worse"),
        ([1.0, np.inf, 1.0], [2.00, 2.01, 2.02], "diverged in 1 of 3"),
        ([1.0, 1.1], [2.0, np.inf], "no claim: the baseline diverged"),
        ([1.0], [2.0, 2.1], "no claim: one seed"),
        ([1.0, 1.0], [2.0, 2.0], "no claim: seeds do not differ"),
    ],
)
def test_verdicts_in_words(ours, baseline, words):
    assert verdict(np.array(ours), np.array(baseline))[1] == words


def test_the_baseline_has_the_same_horizon_and_size_and_is_the_best_there(tmp_path):
    runs = write_seeds(tmp_path, "adamw", [2.0]) + write_seeds(tmp_path, "adamw", [1.9], steps=200)
    runs += write_seeds(tmp_path / "best", "adamw", [1.8], steps=200, beta1=0.8)
    runs += write_seeds(tmp_path / "better", "adamw", [1.7], beta1=0.8)
    runs += write_seeds(tmp_path, "lion", [2.1], steps=200) + write_seeds(tmp_path, "muon", [2.1], steps=300)
    first, _, best, _, lion, muon = groups = group([read_run(run) for run in runs])
    assert baseline_of(lion, groups) is best and baseline_of(muon, groups) is None
    assert baseline_of(groups[3], groups) is first, "at the first run's horizon the first group is the baseline"


# ----- speed-ups


def curve(steps):
    """Final loss of a baseline with a complete schedule of so many steps."""
    return 2.5 + 20 * np.asarray(steps, dtype=float) ** -0.5


def test_a_planted_speed_up_is_found_within_its_interval():
    """Of 200 draws of 4 seeds each, 1.37 is in the 95% interval of at least 93%; the middle is 1.37 to 1%."""
    random, horizons, found = np.random.default_rng(0), [1000, 2000, 4000], []
    for _ in range(200):
        baseline = [curve(n) + random.normal(0, 0.005, 4) for n in horizons]
        ours = curve(1.37 * 1500) + random.normal(0, 0.005, 4)
        found.append(np.array(baseline_needs(horizons, baseline, ours, draws=1000)) / 1500)
    middle, low, high = np.transpose(found)
    assert np.mean((low <= 1.37) & (high >= 1.37)) >= 0.93
    assert np.median(middle) == pytest.approx(1.37, rel=0.01)
    assert np.median(high - low) < 0.2


def test_steps_needed_without_noise():
    horizons = [500, 1000, 2000, 4000]
    wanted = np.array([500, 700, 1000, 1371, 2000, 3000, 4000])
    found = steps_needed(horizons, np.tile(curve(horizons), (7, 1)), curve(wanted))
    assert found == pytest.approx(wanted, rel=0.01)
    outside = steps_needed(horizons, np.tile(curve(horizons), (2, 1)), curve([400, 5000]))
    assert outside.tolist() == [0, np.inf]
    bumpy = steps_needed([1, 2, 4], np.array([[3.0, 1.0, 2.0]]), np.array([1.5]))
    assert 1 < bumpy[0] < 2, "the first time it is reached"


def test_flops_come_from_the_runs_metrics(tmp_path):
    """2.5% more FLOPs a token for the same steps: the ratio is 1 / 1.025 of that in steps."""
    runs = write_seeds(tmp_path, "adamw", [2.0]) + write_seeds(tmp_path, "sophiag", [1.9], flops=6150.0)
    adamw, sophia = group([read_run(run) for run in runs])
    assert step_cost(sophia, [adamw], "step") == (0.01, None)
    assert step_cost(sophia, [adamw], "flops")[0] == pytest.approx(0.01 / 1.025)
    old = group([read_run(run) for run in write_seeds(tmp_path, "lion", [1.9], flops=None)])[0]
    assert step_cost(old, [adamw], "flops") == step_cost(sophia, [adamw, old], "flops") == (None, "not logged")


def test_seconds_are_compared_on_one_unshared_device(tmp_path):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.1]) + write_seeds(tmp_path, "lion", [1.9, 1.91])

    def ratio():
        adamw, lion = group([read_run(run) for run in runs])
        return step_cost(lion, [adamw], "seconds")

    assert ratio() == (0.01, None)
    edit(runs[2], device_name="NVIDIA H200")
    assert ratio() == (0.01, None), "the other of lion's runs is on the baseline's device"
    edit(runs[3], device_name="NVIDIA H200")
    assert ratio() == (None, "other devices")
    for run in runs[2:]:
        edit(run, shared_device=True)
    assert ratio() == (None, "shared")
