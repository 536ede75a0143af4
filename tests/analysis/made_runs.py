"""Finished runs written to disk for tests, without training."""

import json
import pathlib

CONFIG = {
    "config": {
        "optimizer_name": "adamw", "seed": 1, "max_iters": 100, "lr_decay_iters": 100, "learning_rate": 1e-3,
        "total_bs": 24, "block_size": 64, "eval_tokens": 8192, "wandb_project": "sophia",
    },
    "git_commit": "0123456789abcdef",
    "clean": True,
    "data": {"train_sha256": "aa" * 32, "val_sha256": "bb" * 32},
    "tokenizer": {"characters": "abc"},
    "model": {"num_params": 1000},
    "device_name": "cpu",
    "world_size": 1,
}  # fmt: skip
VAL = {0: 4.0, 50: 2.1, 75: 2.0, 100: 2.05}  # the best is not the last


def write_run(folder, val=VAL, shift=0.0, flops=6000.0, **facts):
    """Metrics every 5 steps, half a second and 1536 tokens a step; `facts` replace parts of config.json.

    flops: FLOPs of a token; None for an older run that does not log them.
    """
    folder.mkdir(parents=True)
    config = {key: value | facts.pop(key, {}) if key == "config" else value for key, value in CONFIG.items()}
    (folder / "config.json").write_text(json.dumps(config | facts))
    lines = []
    for step in range(0, config["config"]["max_iters"] + 1, 5):
        line = {"step": step, "tokens": 1536 * step, "seconds": 0.5 * step}
        if flops is not None:
            line["flops"] = flops * line["tokens"]
        if step < config["config"]["max_iters"]:
            line |= {"train/loss": 2.0 + 2.0 * 0.9**step + shift, "lr": 1e-3, "grad_norm": 1.5, "train/clip_rate": 0.25}
        if step in val:
            line["val/loss"] = None if val[step] is None else val[step] + shift
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def write_seeds(tmp_path, name, losses, steps=100, flops=6000.0, **config):
    """Finished runs of one optimizer: one seed for each loss."""
    val = {0: 4.0, steps // 10 * 5: 2.0}
    return [
        write_run(
            tmp_path / f"{name}_{steps}_seed{i}",
            val=val | {steps: loss},
            flops=flops,
            config={"optimizer_name": name, "seed": i, "max_iters": steps, "lr_decay_iters": steps, **config},
        )
        for i, loss in enumerate(losses)
    ]


def edit(run, **facts):
    """Replace facts in a run's config.json."""
    path = pathlib.Path(run, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def slow_down(run, factor):
    """Multiply the seconds in a run's metrics."""
    path = pathlib.Path(run, "metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"seconds": factor * line["seconds"]}) + "\n" for line in lines))
