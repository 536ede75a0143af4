"""The learning rate against its closed form."""

import math

import pytest

from training.config import TrainConfig
from training.schedule import learning_rate

CONFIG = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109, max_iters=200)


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.1),  # already moves
        (4, 0.5),
        (9, 1.0),  # the peak
        (59, 0.55),  # half way: the mean of both ends
        (34, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter: cos(pi / 4)
        (109, 0.1),
        (150, 0.1),
    ],
)
def test_warm_up_and_cosine(step, rate):
    assert learning_rate(step, CONFIG) == pytest.approx(rate, rel=1e-12)


def test_without_decay_the_rate_is_constant():
    assert learning_rate(0, TrainConfig(learning_rate=0.3, decay_lr=False)) == 0.3
