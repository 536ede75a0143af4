"""Figure 2 of arXiv:2305.14342: five optimizers on a function with sharp and flat directions and a local maximum in x.

    python -m experiments.toy2d.toy2d        # writes assets/toy2d.png

Every optimizer starts at the same point. Its learning rate is the best of one grid for all: it needs the fewest steps
until it stays within 0.05 of the minimum. Newton's method has no learning rate.
"""

from pathlib import Path

import numpy as np
import torch

from analysis.figures import COLOURS, new_figure
from sophia import SophiaH

START, MINIMUM = (0.2, 0.0), (1.0, 4.0)
STEPS, NEAR = 300, 0.05
GRID = tuple(10 ** (k / 4) for k in range(-12, 3))  # 1e-3 to 3.2, four to a decade


def loss(point):
    """8 (x - 1)^2 (1.3 x^2 + 2 x + 1) + (y - 4)^2 / 2: along x minima at -0.65 and 1 (the lowest), a maximum at 0."""
    x, y = point.unbind(-1)
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + (y - 4) ** 2 / 2


def hessian_diagonal(point):
    return torch.func.hessian(loss)(point.detach()).diagonal()


OPTIMIZERS = {
    "Gradient descent": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "SignGD": lambda params, lr: torch.optim.SGD(params, lr=lr),  # of the gradient's sign
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "Newton": lambda params, lr: torch.optim.SGD(params, lr=1.0),  # of the gradient over the Hessian, which is diagonal
    # rho = lr: where nothing is clipped this is Newton's step. No averages, as nothing here is stochastic.
    "Sophia": lambda params, lr: SophiaH(params, lr=lr, rho=lr, betas=(0.0, 0.0), weight_decay=0.0),
}


def trajectory(name, lr):
    """(STEPS + 1, 2): the points that the optimizer visits from START."""
    point = torch.nn.Parameter(torch.tensor(START, dtype=torch.double))
    optimizer = OPTIMIZERS[name]([point], lr)
    points = [point.detach().clone()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(point).backward()
        if name == "Sophia":
            optimizer.update_hessian([hessian_diagonal(point)])
        elif name == "SignGD":
            point.grad.sign_()
        elif name == "Newton":
            point.grad /= hessian_diagonal(point)
        optimizer.step()
        points.append(point.detach().clone())
    return torch.stack(points)


def steps_to_minimum(points):
    """Steps after which the optimizer stays near the minimum, or None if it does not."""
    far = ~((points - torch.tensor(MINIMUM, dtype=torch.double)).norm(dim=-1) < NEAR)  # NaN is far
    last = far.nonzero()[-1].item()
    return None if last == STEPS else last + 1


def best(name):
    """(learning rate or None, points, steps to the minimum or None) for the best learning rate of the grid."""
    runs = [(lr, trajectory(name, lr)) for lr in ((None,) if name == "Newton" else GRID)]
    runs = [(lr, points, steps_to_minimum(points)) for lr, points in runs]
    return min(runs, key=lambda run: STEPS + 1 if run[2] is None else run[2])


def draw(runs, path):
    figure, (axes,) = new_figure(1, 1, width=7.2, height=6.8)
    x, y = np.meshgrid(np.linspace(-1.0, 1.6, 400), np.linspace(-0.6, 5.0, 400))
    height = loss(torch.from_numpy(np.stack([x, y], -1))).numpy()
    levels = np.geomspace(0.05, 60, 22)
    axes.contour(x, y, height, levels=levels, colors="0.8", linewidths=0.7, zorder=1)
    for (name, (lr, points, steps)), color in zip(runs.items(), COLOURS, strict=False):
        shown = points[: (steps or 12) + 1].numpy()
        outcome = f"{steps} steps" if steps else "stops at the maximum in x"
        label = f"{name}: {outcome}" + (f" (lr {lr:.2g})" if lr else "")
        width, size = (2.2, 5) if name == "Sophia" else (1.0, 2.2)
        axes.plot(*shown.T, "o-", color=color, label=label, markersize=size, linewidth=width, zorder=3)
    axes.plot(*START, "ks", markersize=7, zorder=4)
    axes.annotate("start", START, xytext=(8, -12), textcoords="offset points")
    axes.plot(*MINIMUM, "k*", markersize=14, zorder=4)
    axes.annotate("minimum", MINIMUM, xytext=(38, -4), textcoords="offset points")
    axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    axes.annotate("maximum in x", (0, 4), xytext=(-88, 2), textcoords="offset points")
    axes.set(xlim=(-1.0, 1.6), ylim=(-0.6, 5.0), xlabel="x (sharp, not convex)", ylabel="y (flat)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def main():
    runs = {name: best(name) for name in OPTIMIZERS}
    for name, (lr, points, steps) in runs.items():
        end = ", ".join(f"{v:.3f}" for v in points[-1].tolist())
        print(f"{name:<18} lr {'none' if lr is None else f'{lr:.3g}':<7} steps to the minimum {steps}, ends at ({end})")
    draw(runs, Path(__file__).resolve().parents[2] / "assets/toy2d.png")


if __name__ == "__main__":
    main()
