"""A run whose settings changed at a resume is never pooled as a seed and never a finished schedule."""

import numpy as np
import pytest

from analysis.runs import group, read_run, unclean
from analysis.stats import baseline_horizons
from analysis.tables import report
from tests.analysis.made_runs import edit, write_seeds
from training.errors import UserError


def changed(run, step=50, **settings):
    edit(run, history=[{"step": step, "changed": settings}])
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": [0.1, 1e-3]},
        {"learning_rate": [0.1, 1e-3], "min_lr": [5e-3, 5e-5], "max_iters": [50, 100], "lr_decay_iters": [50, 100]},
        {"max_iters": [50, 100]},
        {"seed": [7, 2]},
        {"total_bs": [12, 24], "gradient_accumulation_steps": [1, 2]},
        {"dtype": ["float32", "float16"]},
        {"train_sha256": ["a", "b"], "dataset": ["/a", "/b"]},
        {"a_setting_of_the_future": [1, 2]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_changed_run_has_a_row_of_its_own(tmp_path, settings):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.01, 2.02, 2.03])
    for run in runs[2:]:
        changed(run, **settings)
    groups = group([read_run(run) for run in runs])
    assert [len(one.runs) for one in groups] == [2, 1, 1]
    assert [one.finished for one in groups] == [True, False, False]
    assert len({one.label for one in groups}) == 3 and groups[0].label == "adamw"
    assert groups[1].label.startswith(f"adamw, changed mid-run: {next(iter(settings))}")
    assert baseline_horizons(groups[0], groups) == [groups[0]]
    text = "\n".join(report(groups))
    assert text.count("settings changed") == 2 and "not finished" not in text
    assert f"{runs[3]} changed {next(iter(settings))}" in text


def test_a_changed_baseline_is_no_baseline(tmp_path):
    (run,) = write_seeds(tmp_path, "adamw", [2.0])
    groups = group([read_run(run) for run in [changed(run, beta1=[0.8, 0.9]), *write_seeds(tmp_path, "lion", [1.9])]])
    assert "no baseline at this horizon" in "\n".join(report(groups))


@pytest.mark.parametrize(
    "settings",
    [
        {"out_dir": ["a", "b"], "wandb_log": [True, False], "wandb_run_name": ["", "x"], "log_interval": [1, 5]},
        {
            "eval_interval": [5, 10],
            "keep_checkpoints": [0, 3],
            "nccl_timeout": [600, 9],
            "device": ["cuda:0", "cuda:1"],
        },
        {"dataset": ["/here/data", "/there/data"], "torch": ["2.11", "2.12"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_train_leave_a_seed(tmp_path, settings):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.01])
    (one,) = group([read_run(run) for run in [runs[0], changed(runs[1], **settings)]])
    assert len(one.runs) == 2 and one.finished and len(one.timed) == 2


def test_a_change_before_the_first_step_is_none(tmp_path):
    (run,) = write_seeds(tmp_path, "adamw", [2.0])
    assert read_run(changed(run, step=0, learning_rate=[1.0, 1e-3])).finished


def test_a_run_that_moved_to_other_gpus_keeps_its_losses_and_not_its_times(tmp_path):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.01])
    changed(runs[1], world_size=[1, 2], gradient_accumulation_steps=[2, 1])
    (one,) = group([read_run(run) for run in runs])
    assert one.finished and len(one.timed) == 1 and np.isnan(one.runs[1].final["seconds"])


def test_a_run_of_two_codes_is_not_clean(tmp_path):
    runs = [read_run(changed(run, source_sha256=["a", "b"])) for run in write_seeds(tmp_path, "adamw", [2.0])]
    assert unclean(runs) == runs and runs[0].finished


@pytest.mark.parametrize("history", [5, [5], [{}], [{"step": "x", "changed": {}}], [{"step": 1, "changed": 3}]])
def test_a_damaged_history_is_refused(tmp_path, history):
    (run,) = write_seeds(tmp_path, "adamw", [2.0])
    edit(run, history=history)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_run(run)
