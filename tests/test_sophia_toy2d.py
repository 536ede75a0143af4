"""What arXiv:2305.14342 says of its two-dimensional example (figure 2)."""

import pytest
import torch

from assets.toy2d import GRID, OPTIMIZERS, hessian_diagonal, loss, steps_to_minimum, trajectory


def test_the_function_is_the_papers():
    points = torch.tensor([[1.0, 4.0], [0.0, 4.0], [0.2, 0.0]], dtype=torch.double)
    assert loss(points).tolist() == pytest.approx([0.0, 8.0, 8 * 0.64 * 1.452 + 8.0])
    assert hessian_diagonal(points[1]).tolist() == pytest.approx([-27.2, 1.0])  # a maximum along x
    assert hessian_diagonal(points[0]).tolist() == pytest.approx([68.8, 1.0])


def test_newton_ends_at_the_local_maximum_in_x():
    points = trajectory("Newton", None)
    assert points[-1].tolist() == pytest.approx([0.0, 4.0], abs=1e-6)
    assert steps_to_minimum(points) is None


def test_sophia_reaches_the_minimum_in_the_fewest_steps():
    """One learning rate of Sophia's against every other method at its best of the grid."""
    points = trajectory("Sophia", 1.0)
    sophia = steps_to_minimum(points)
    assert points[-1].tolist() == pytest.approx([1.0, 4.0], abs=1e-6) and sophia <= 5
    for name in OPTIMIZERS.keys() - {"Sophia", "Newton"}:
        steps = [s for lr in GRID if (s := steps_to_minimum(trajectory(name, lr)))]
        assert min(steps) > 10 * sophia
