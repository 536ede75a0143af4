"""The learning rate against its closed forms."""

import math
import re

import pytest

from training.config import TrainConfig, load_config
from training.errors import UserError
from training.schedule import SCHEDULES, learning_rate

SETTINGS = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 9, "lr_decay_iters": 109, "max_iters": 200}


def rate(step, **settings):
    return learning_rate(step, TrainConfig(**SETTINGS | settings))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step, expected", [(0, 0.1), (4, 0.5), (8, 0.9), (9, 1.0)])
def test_every_schedule_warms_up(schedule, step, expected):
    assert rate(step, lr_schedule=schedule, restart_iters=20) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "step, expected",
    [
        (59, 0.55),  # half way: the mean of both ends
        (34, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter: cos(pi / 4)
        (109, 0.1),
        (150, 0.1),
    ],
)
def test_cosine(step, expected):
    assert rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step, expected", [(34, 0.775), (59, 0.55), (108, 0.109), (109, 0.1), (150, 0.1)])
def test_linear(step, expected):
    assert rate(step, lr_schedule="linear") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step, expected", [(59, 1.0), (81, 1.0), (82, 1.0), (95, 0.567), (108, 0.134), (109, 0.1)])
def test_wsd(step, expected):
    """Falls in the last quarter of 109 steps, from 81.75 on; 27.25 steps."""
    value = rate(step, lr_schedule="wsd", wsd_decay=0.25)
    exact = 1 - 0.9 * max(0, step - 81.75) / 27.25
    assert value == pytest.approx(exact, rel=1e-12) and value == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("step, expected", [(81, 1.0), (82, 0.9138), (95, 0.3724), (108, 0.1167), (109, 0.1)])
def test_wsd_sqrt(step, expected):
    """1 - sqrt(0.25 / 27.25) is 0.9042 after a quarter step; half-way the rate is below half."""
    assert rate(step, lr_schedule="wsd_sqrt", wsd_decay=0.25) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("schedule", ["wsd", "wsd_sqrt"])
def test_wsd_does_not_fall_before_the_warm_up_ends(schedule):
    assert rate(9, lr_schedule=schedule, wsd_decay=1.0) == 1.0


def test_wsd_of_the_complete_run_is_linear():
    assert rate(59, lr_schedule="wsd", wsd_decay=1.0) == pytest.approx(0.55)


@pytest.mark.parametrize(
    "step, expected",
    [
        (14, 0.55),  # periods of 10, 20, 40 and 80 steps from 9, 19, 39 and 79 on
        (18, 0.1 + 0.9 * 0.5 * (1 + math.cos(0.9 * math.pi))),
        (19, 1.0),
        (29, 0.55),
        (39, 1.0),
        (59, 0.55),
        (79, 1.0),
        (99, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),
        (109, 0.1),  # cut off
    ],
)
def test_cosine_restarts(step, expected):
    assert rate(step, lr_schedule="cosine_restarts", restart_iters=10) == pytest.approx(expected, rel=1e-12)


def test_restarts_of_one_length():
    at = [rate(step, lr_schedule="cosine_restarts", restart_iters=10, restart_multiplier=1.0) for step in range(9, 109)]
    assert at == pytest.approx(at[:10] * 10, rel=1e-12) and at[0] == 1.0


def test_constant_has_a_warm_up_and_without_decay_there_is_none():
    assert rate(150, lr_schedule="constant") == 1.0
    assert rate(0, decay_lr=False) == rate(150, decay_lr=False) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, length", [(0, 1), (0, 3), (3, 3), (2, 3)])
def test_step_0_moves_in_the_shortest_runs(schedule, warmup, length):
    settings = {"lr_schedule": schedule, "warmup_iters": warmup, "lr_decay_iters": length, "min_lr": 0.0}
    rates = [rate(step, restart_iters=1, **settings) for step in range(length)]
    assert rates[0] > 0 and all(math.isfinite(value) and 0 <= value <= 1 for value in rates)


@pytest.mark.parametrize("schedule, floor", [("cosine", 0.05), ("linear", 0.0), ("wsd_sqrt", 0.0), ("constant", 0.05)])
def test_the_default_floor(schedule, floor):
    words = ["--learning_rate=1", f"--lr_schedule={schedule}", "--max_iters=100", "--warmup_iters=0"]
    config = load_config(TrainConfig, words)
    assert config.min_lr == floor
    assert learning_rate(100, config) == (1.0 if schedule == "constant" else floor)


@pytest.mark.parametrize(
    "steps, multiplier, message",
    [
        (34, 2, None),  # periods of 10, 20 and 40 steps end at 14, 34 and 74
        (35, 2, "cuts off .* learning rate of 1; complete periods end at steps 34 and 74"),
        (54, 2, r"cuts off .* learning rate of 0\.562; complete periods end at steps 34 and 74"),
        (8, 2, "complete periods end at steps 4 and 14"),
        (4, 2, None),
        (29, 1.5, None),  # 10 and 15
        (30, 1.5, "complete periods end at steps 29 and 52"),
        (52, 1.5, None),  # 22.5
    ],
)
def test_a_period_that_is_cut_off_is_warned_of(capsys, steps, multiplier, message):
    words = ["--learning_rate=1", "--lr_schedule=cosine_restarts", "--restart_iters=10", "--warmup_iters=4"]
    load_config(TrainConfig, [*words, f"--max_iters={steps}", f"--restart_multiplier={multiplier}"])
    error = capsys.readouterr().err
    assert bool(error) == bool(message) and re.search(message or "^$", error), error


def test_restarts_need_their_period():
    with pytest.raises(UserError, match="restart_iters"):
        load_config(TrainConfig, ["--lr_schedule=cosine_restarts"])
