"""Reading runs, refusing what cannot be compared, grouping seeds, labels."""

import json
import pathlib
import time

import numpy as np
import pytest

from analysis.runs import check_comparable, group, label, read_run, unclean
from tests.analysis.made_runs import edit, write_run, write_seeds
from training.errors import UserError


def groups_of(*folders):
    return group([read_run(folder) for folder in folders])


# ----- reading


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda run: (run / "config.json").unlink(), "config.json is missing"),
        (lambda run: (run / "config.json").write_text('{"config": {"total'), "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"config": {}}'), "config.json is damaged .KeyError: 'data'"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
        (lambda run: edit(run, git_commit=5), "config.json is damaged"),
        (lambda run: replace(run / "config.json", '"max_iters": 100', '"max_iters": "x"'), "max_iters = 'x'"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 0, "train/loss": 4.0}\n'), "has no val/loss"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b""), "has no val/loss"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "val/loss": 4.0}\n'), "has no val/loss"),
    ],
)
def test_damaged_runs_are_refused(tmp_path, damage, message):
    write_run(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "a")


def test_long_runs_are_thinned_while_they_are_read(tmp_path):
    """A run of 100k lines is read in less than a second, and no evaluation is lost."""
    extra = {key: 0.123456789 for key in ("train/loss", "lr", "grad_norm", "train/clip_rate", "param_norm", "mfu")}
    lines = []
    for step in range(100_001):
        line = {"step": step, "tokens": 1536 * step, "seconds": 0.5 * step} | extra
        lines.append(json.dumps(line | ({"val/loss": step + 0.5} if step % 1000 == 0 else {})))
    write_run(tmp_path / "a", config={"max_iters": 100_000})
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    start = time.process_time()
    run = read_run(tmp_path / "a")
    assert time.process_time() - start < 1
    assert [line["step"] for line in run.evaluations] == list(range(0, 100_001, 1000)) and run.finished
    assert 1000 < len(run.lines) < 1300 and np.diff([line["step"] for line in run.lines]).max() < 120
    assert run.curve("train/loss", "tokens")[0][-1] == run.lines[-1]["tokens"]


@pytest.mark.parametrize(
    "facts, clean",
    [
        ({}, True),
        ({"clean": False}, False),
        ({"clean": None, "git_commit": None}, False),
        ({"clean": None}, False),
        ({"git_commit": "0123-dirty"}, False),
    ],
)
def test_a_run_is_clean_only_with_a_clean_commit(tmp_path, facts, clean):
    runs = [read_run(write_run(tmp_path / name, config={"seed": i})) for i, name in enumerate("ab")]
    edit(runs[1].name, **facts)
    runs[1] = read_run(runs[1].name)
    assert unclean(runs) == ([] if clean else [runs[1]])


def test_a_run_from_before_the_fact_is_clean_unless_its_commit_says_dirty(tmp_path):
    run = pathlib.Path(write_run(tmp_path / "a"))
    replace(run / "config.json", '"clean": true, ', "")
    assert read_run(run).clean
    edit(run, git_commit="0123-dirty")
    assert not read_run(run).clean


# ----- comparable


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"data": {"train_sha256": "cc" * 32, "val_sha256": "bb" * 32}}, "training data (SHA-256) (cccccccccccccccc,"),
        ({"data": {"train_sha256": "aa" * 32, "val_sha256": "cc" * 32}}, "validation data (SHA-256)"),
        ({"tokenizer": "gpt2"}, "tokenizer (gpt2, not {'characters'"),
        ({"config": {"total_bs": 48}}, "total_bs * block_size (3072, not 1536)"),
        ({"config": {"total_bs": 12, "block_size": 128}}, "block_size (128, not 64)"),
        ({"config": {"eval_tokens": 4096}}, "eval_tokens (4096, not 8192)"),
        ({"model": {"num_params": 2000}}, "model parameters (2000, not 1000)"),
    ],
)
def test_runs_that_differ_in_their_conditions_are_refused(tmp_path, facts, message):
    a, b = (write_run(tmp_path / name, config={"seed": i}) for i, name in enumerate("ab"))
    runs = [read_run(run) for run in (a, b, write_run(tmp_path / "c", **facts))]
    with pytest.raises(UserError) as error:
        check_comparable(runs)
    assert f"{tmp_path / 'c'} differs from {a} in {message}" in str(error.value)
    if "model" in facts:
        check_comparable(runs, scaling=True)


def test_other_seeds_rates_and_micro_batches_are_comparable(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"batch_size": 3, "seed": 2})
    runs = [read_run(a), read_run(b)]
    check_comparable(runs)
    assert len(group(runs)) == 2


# ----- groups


def test_seeds_are_one_group_and_settings_are_not(tmp_path):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.1], out_dir="here", wandb_log=True)
    runs += write_seeds(tmp_path, "adamw", [2.2], steps=200, min_lr=1e-5)
    runs += write_seeds(tmp_path / "x", "adamw", [2.3], learning_rate=2e-3, beta1=0.8, beta2=0.9, grad_clip=2.0)
    groups = groups_of(*runs)
    assert [len(one.runs) for one in groups] == [2, 1, 1]
    assert groups[2].label == "adamw, adamw_100", "too many differences to list: the name of the folder"
    assert [one.label for one in groups_of(*runs[:3])] == [
        "adamw, max_iters=100", "adamw, max_iters=200, min_lr=1e-05"
    ]  # fmt: skip


def test_settings_that_are_off_or_unknown_to_older_runs_make_no_group(tmp_path):
    runs = write_seeds(tmp_path / "old", "adamw", [2.0, 2.01])
    runs += write_seeds(tmp_path / "7", "adamw", [2.02], seed=7, embedding_lr=None)
    runs += write_seeds(tmp_path / "8", "adamw", [2.03], seed=8, embedding_lr=None, eigenbasis=False)
    runs += write_seeds(tmp_path / "9", "adamw", [2.04], seed=9, norm="layernorm", n_kv_head=0, norm_eps=1e-5)
    runs += write_seeds(tmp_path / "own", "adamw", [1.8, 1.81], embedding_lr=0.1)
    found = [(one.label, len(one.runs)) for one in groups_of(*runs)]
    assert found == [("adamw", 5), ("adamw, embedding_lr=0.1", 2)]


def test_runs_from_other_weights_are_no_seeds_of_each_other(tmp_path):
    runs = write_seeds(tmp_path, "adamw", [2.0, 2.01])
    for i, facts in enumerate([{"config": {"init_from": "hf:base"}}, {"weights": "hf:base"}, {"weights": "gpt2"}], 7):
        config = {"max_iters": 100, "seed": i, "init_from": "resume"} | facts.pop("config", {})
        runs.append(write_run(tmp_path / str(i), config=config, **facts))
    found = [(one.label, len(one.runs)) for one in groups_of(*runs)]
    assert found == [("adamw", 2), ("adamw, weights=hf:base", 2), ("adamw, weights=gpt2", 1)]


def test_the_former_name_of_the_scalars_makes_no_group(tmp_path):
    runs = [
        write_run(tmp_path / name, config={"seed": i, "adamw_for": f"embeddings+{name}"})
        for i, name in enumerate(("vectors", "scalars"))
    ]
    (one,) = groups_of(*runs)
    assert [run.config["adamw_for"] for run in one.runs] == ["embeddings+scalars"] * 2


def test_sophia_with_adamw_or_eigenbasis_is_another_optimizer(tmp_path):
    runs = write_seeds(tmp_path, "sophiag", [1.9, 1.91], adamw_for="none")
    runs += write_seeds(tmp_path / "2", "sophiag", [1.8, 1.81], adamw_for="embeddings")
    runs += write_seeds(tmp_path / "3", "sophiag", [1.7], adamw_for="embeddings", eigenbasis=True)
    runs += write_seeds(tmp_path / "4", "sophiag", [1.6], adamw_for="none", eigenbasis=True, spectral=True)
    names = ["sophiag", "sophiag+adamw", "sophiag+eigenbasis+adamw", "sophiag+eigenbasis+spectral"]
    assert [one.optimizer for one in groups_of(*runs)] == names


def test_the_same_settings_and_seed_twice_are_refused(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with pytest.raises(UserError, match=f"{b} repeats {a}"):
        groups_of(a, b)


# ----- labels of a sweep's runs


def test_labels_name_steps_and_seed_and_hash_other_settings():
    nine = {f"setting{i}": 1 / (3 + i) for i in range(9)}
    assert label("adamw", {}) == "adamw"
    assert label("adamw", {"seed": 3, "max_iters": 780}) == "adamw_780_seed3"
    assert label("adamw", {"dataset": "/a/b", "max_iters": 780, "seed": 3}) == "adamw_780_c3284f_seed3"
    assert len(label("adamw", nine)) == len("adamw_") + 6 and label("adamw", nine) != label("adamw", nine | {"lr": 1})
    assert label("adamw", nine) == label("adamw", dict(reversed(nine.items()))), "the order of the settings is free"
