"""The names of all metrics and of a run's files; reading metrics.jsonl, one JSON object a line.

lines = read_metrics("out/run/metrics.jsonl")       # [{"step": 0, "tokens": 0, "val/loss": 10.9, ...}, ...]
"""

import contextlib

from training.errors import file_errors
from training.foreign import parse_json, read_bytes

METRICS, CONFIG, STATE = "metrics.jsonl", "config.json", "sweep.json"  # of a run, of a run, of a sweep

NAMES = {
    "step": "optimizer steps before this line's",
    "tokens": "training tokens in those steps",
    "sequences": "training sequences in those steps",
    "epoch": "these sequences over those of one epoch",
    "epoch/NAME": "the same of one corpus of a mixture",
    "flops": "FLOPs of those steps: forward, backward and curvature estimates",
    "seconds": "training time; without compilation, evaluation and checkpoints",
    "train/loss": "mean cross-entropy of the step's batch, nats a token",
    "val/loss": "the same on the fixed windows of val.bin, before the step",
    "val/accuracy": "share of the tokens in the same windows that the model gives the highest probability",
    "val/accuracy/NAME": "the same on one corpus of a mixture",
    "val/loss/NAME": "the same on one corpus of a mixture; val/loss is their mean by the shares",
    "train/spike": "train/loss over the median of the lines before it (101 at most)",
    "lr": "learning rate of the matrices",
    "grad_norm": "global 2-norm of the gradient before clipping",
    "train/clip_rate": "share of the steps whose grad_norm was above grad_clip",
    "stage/length": "tokens in a sequence of the stage of block_size_schedule that ends before this line's step",
    "stage/clip_rate": "train/clip_rate of that stage's steps",
    "train/skipped": "steps that were not finite and were skipped",
    "train/skipped_matrices": "whitened Muon's updates of single matrices that were not finite and were skipped",
    "curvature/loss": "cross-entropy of the last curvature estimate against its sampled labels (sophiah has none)",
    "curvature/grad_norm": "global 2-norm of its gradient (sophiah: of its Hessian-vector product)",
    "curvature/skipped": "curvature estimates that were not finite and were skipped",
    "train/win_rate": "share of Sophia's coordinates that were not clipped",
    "train/win_rate/GROUP": "the same in one parameter group",
    "hessian_norm": "1-norm of the curvature average",
    "hessian_norm2": "2-norm of the curvature average",
    "param_norm": "2-norm of all parameters",
    "momentum_norm": "2-norm of the gradient average",
    "tokens_per_second": "since the line before",
    "mfu": "model FLOPs utilization: share of the devices' peak, curvature estimates not counted",
    "slowest_rank": "the rank that the others waited for longest since the line before",
    "seconds_behind": "how much longer it worked in that time than the median rank",
    "memory_gib": "peak memory of rank 0's GPU",
}
LONGEST = 1 << 20  # bytes of a line; longer ones are no metrics
FORMER_NAMES = {"train/win_rate/vectors": "train/win_rate/scalars"}  # of runs from before the group was renamed


def read_metrics(path, about=None):
    """The lines of a metrics.jsonl as dicts, under today's names; a last line that was cut off is left out.

    With `about`, a longer file gives about that many lines, evenly spread, and all lines that have a val/loss.
    """
    with file_errors(path, "make it readable"):
        text = read_bytes(path)
    lines = []
    for part in text.splitlines() if about is None else _thinned(text, about):
        with contextlib.suppress(ValueError):
            line = parse_json(part) if len(part) < LONGEST else None
            if isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0:
                lines.append({FORMER_NAMES.get(key, key): value for key, value in line.items()})
    return lines


def _thinned(text, about):
    """The wanted lines of `text`, found by their bytes, so that only these are parsed."""
    places, key = list(range(0, len(text), max(1, len(text) // about))), b'"val/loss"'
    at = text.find(key)
    while at >= 0:
        places.append(at)
        at = text.find(key, at + len(key))
    for start in sorted({text.rfind(b"\n", 0, at) + 1 for at in places}):
        end = text.find(b"\n", start)
        yield text[start : end if end >= 0 else len(text)]
