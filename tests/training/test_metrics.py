"""Reading metrics.jsonl, of any age and in any condition."""

import train_sophiag
from tests.conftest import read_lines
from training.metrics import NAMES, read_metrics


def test_lines_that_are_not_metrics_are_left_out(tmp_path):
    (tmp_path / "m").write_text('[1]\n{"step": "x"}\n{"no": 1}\nnoise\n\n{"step": 3}\n')
    assert read_metrics(tmp_path / "m") == [{"step": 3}]


def test_old_names_are_read_as_todays(tmp_path):
    (tmp_path / "m").write_text('{"step": 3, "train/win_rate/vectors": 0.5, "train/win_rate/matrices": 0.25}\n')
    assert read_metrics(tmp_path / "m") == [{"step": 3, "train/win_rate/scalars": 0.5, "train/win_rate/matrices": 0.25}]


def test_every_metric_of_a_run_is_named(tiny, tmp_path):
    train_sophiag.main([*tiny, "--max_iters=4"])
    names = NAMES.keys() | {f"train/win_rate/{group}" for group in ("matrices", "embeddings", "scalars")}
    assert all(line.keys() <= names for line in read_lines(tmp_path / "out"))
