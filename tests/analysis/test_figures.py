"""Figures: files that open and repeat, what is drawn and what is not."""

import math

import numpy as np
import pytest

from analysis import figures
from analysis.runs import group, read_run
from sweep import Trial
from tests.analysis.made_runs import edit, write_run, write_seeds
from training.errors import UserError


def groups_of(runs):
    return group([read_run(run) for run in runs])


def test_the_figures_of_compare_are_named_labelled_and_repeatable(tmp_path):
    runs = [
        write_run(tmp_path / f"{name}{i}", shift=i / 10, tokenizer="gpt2", config={"optimizer_name": name, "seed": i})
        for name in ("adamw", "lion", "muon")
        for i in range(3)
    ]
    prefix, names = tmp_path / "new" / "figure", ("figure", "figure_training", "figure_final")
    assert figures.draw(groups_of(runs), prefix) == [f"{prefix.with_name(name)}.png" for name in names]
    svg = {name: prefix.with_name(f"{name}.svg").read_bytes() for name in names}
    for name in names:
        assert prefix.with_name(f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for text in (b"loss (nats a token)", b"training time (seconds)", b"FLOPs", b"tokens", b"optimizer steps", b"lion"):
        assert text in svg["figure"]
    for text in (b"learning rate", b"gradient norm", b"win rate", b"tokens a second", b"GiB", b"not logged"):
        assert text in svg["figure_training"]
    figures.draw(groups_of(runs), prefix)
    assert svg == {name: prefix.with_name(f"{name}.svg").read_bytes() for name in names}


def drawn_losses(tmp_path, monkeypatch, runs):
    """The figure of losses, not written."""
    monkeypatch.setattr(figures, "save", lambda figure, prefix: figure)
    return figures.draw_losses([(one, {"color": "C0"}) for one in groups_of(runs)], tmp_path, "nats")


def test_many_groups_are_drawn_without_training_losses(tmp_path, monkeypatch):
    runs = [*write_seeds(tmp_path, "adamw", [1.8]), *write_seeds(tmp_path, "lion", [1.7])]
    few = drawn_losses(tmp_path, monkeypatch, runs)
    monkeypatch.setattr(figures, "LEGEND", 1)
    many = drawn_losses(tmp_path, monkeypatch, runs)
    for figure, curves in ((few, 4), (many, 2)):  # a panel; that of the steps has the legend's too
        assert len(figure.axes[1].lines) == curves
        assert any("train/loss" in text.get_text() for text in figure.legends[0].get_texts()) == (curves == 4)
    assert few.axes[0].get_ylim()[1] > 2.0 > many.axes[0].get_ylim()[1]  # the loss half way


def test_panels_without_numbers_are_left_out_or_say_why(tmp_path, monkeypatch):
    runs = [*write_seeds(tmp_path, "adamw", [1.8], flops=None), *write_seeds(tmp_path, "lion", [1.7], flops=None)]
    labels = [axes.get_xlabel() for axes in drawn_losses(tmp_path, monkeypatch, runs).axes]
    assert labels == ["optimizer steps", "tokens", "training time (seconds)"]
    edit(runs[0], device_name="NVIDIA H200")
    assert drawn_losses(tmp_path, monkeypatch, runs).axes[-1].get_xlabel().endswith("of several devices")
    for run in runs:
        edit(run, shared_device=True)
    texts = [text.get_text() for text in drawn_losses(tmp_path, monkeypatch, runs).axes[-1].texts]
    assert texts == ["these runs shared their GPU"]


def test_the_final_losses_of_named_optimizers(tmp_path, monkeypatch):
    """Means and 95% intervals (t(0.975, 1) = 12.7062 times 0.01) at each horizon, of the best settings there."""
    runs = []
    for steps, loss in ((100, 2.0), (200, 1.8), (400, 1.7)):
        runs += write_seeds(tmp_path, "adamw", [loss - 0.01, loss + 0.01], steps=steps)
    runs += write_seeds(tmp_path / "worse", "adamw", [2.5, 2.6], beta1=0.5)
    runs += [*write_seeds(tmp_path, "sgd", [3.0]), *write_seeds(tmp_path, "lion", [1.9]),
             *write_seeds(tmp_path, "lion", [math.nan], steps=200)]  # fmt: skip
    name = figures.draw_final_losses(groups_of(runs), tmp_path / "final", {"lion": "Lion", "adamw": "AdamW"})
    assert name == f"{tmp_path / 'final'}.png" and (tmp_path / "final.svg").exists()
    monkeypatch.setattr(figures, "save", lambda figure, prefix: figure)
    (axes,) = figures.draw_final_losses(groups_of(runs), "", {"lion": "Lion", "adamw": "AdamW"}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["AdamW", "Lion"], "as they are drawn"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "200", "400"]
    lion, adamw = axes.containers
    assert list(lion.lines[0].get_ydata()) == [1.9] and list(adamw.lines[0].get_ydata()) == [2.0, 1.8, 1.7]
    assert [top - low for (_, low), (_, top) in adamw.lines[2][0].get_segments()] == pytest.approx([0.254124] * 3)
    with pytest.raises(UserError, match="no finished run of muon"):
        figures.draw_final_losses(groups_of(runs), "x", {"muon": "Muon"})


def test_losses_that_follow_a_power_of_the_size_give_its_exponent(tmp_path):
    """Losses that follow N^-0.1 exactly; two sizes of the other optimizer get no fit."""
    runs = []
    for name, sizes in (("adamw", (1e6, 1e7, 1e8)), ("lion", (1e6, 1e7))):
        for n in sizes:
            val, config = {0: 9.0, 100: 10 * n**-0.1}, {"optimizer_name": name}
            runs.append(write_run(tmp_path / f"{name}{n}", val=val, model={"num_params": int(n)}, config=config))
    figures.draw(groups_of(runs), tmp_path / "s", scaling=True)
    svg = (tmp_path / "s_scaling.svg").read_text()
    assert "adamw: loss ∝ N^(-0.1000 ± 0.0000)" in svg and "lion: loss" not in svg and "parameters (N)" in svg


def test_running_mean():
    steps = np.arange(10.0)
    assert np.allclose(figures.running_mean([steps, steps**2], 3), [steps[1:-1], steps[1:-1] ** 2 + 2 / 3])
    assert np.array_equal(figures.running_mean([steps], 1), [steps])


def test_a_line_is_drawn_through_a_grid_and_a_star_at_a_random_searchs_best(tmp_path):
    """In a heat map a run that was not drawn has no text, and one that diverged says so."""

    def trials(name, places, values):
        return [
            Trial(name, {"lr": i, "rho": j}, [], None, 1, loss=loss)
            for (i, j), loss in zip(places, values, strict=True)
        ]

    grid = trials("whole", [(1, 1), (1, 2), (2, 1), (2, 2)], [1.0, 2.0, 3.0, math.inf])
    part = trials("part", [(2, 1), (1, 2), (1, 3)], [1.5, math.inf, 2.5])
    figures.draw_sweep(grid, tmp_path / "grid")
    figures.draw_sweep(part, tmp_path / "part")
    figures.draw_sweep(grid + part, tmp_path / "both")
    texts = {path.parent.name: path.read_text() for path in tmp_path.glob("*/sweep_lr.svg")}
    assert {name: ("<!-- (line: best over" in text, "star: best" in text) for name, text in texts.items()} == {
        "grid": (True, False), "part": (False, True), "both": (True, True),
    }  # fmt: skip
    cells = {name: (tmp_path / "both" / f"sweep_{name}.svg").read_text() for name in ("whole", "part")}
    assert cells["whole"].count("diverged") == cells["part"].count("diverged") == 1
    assert "<!-- nan" not in cells["part"] and "<!-- 1.500 -->" in cells["part"] and "<!-- 2.500 -->" in cells["part"]
