"""The rows of a benchmark, and the times of contenders that take turns on the device's clock."""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from analysis.tables import markdown
from training.errors import UserError, file_errors
from training.foreign import read_json
from training.tracking import write_atomically

GPT2_SIZES = {  # layers, heads, width
    "30M": (6, 6, 384), "124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1.5B": (48, 25, 1600)
}  # fmt: skip
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"}
LLAMA_SIZES = {f"llama-{size}": size for size in ("30M", "124M")}  # as wide and deep, a third of the heads for keys


class Report:
    """The rows of one benchmark. Each is printed and written at once, so that a crash loses nothing."""

    def __init__(self, args):
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("this machine has no CUDA device: try it out with --device cpu and small models.")
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        self.path = Path(args.out)
        command = " ".join(["python", "bench.py", *sys.argv[1:]])
        self.content = {"device": device, "torch": torch.__version__, "commit": args.commit, "command": command}
        self.content |= {"rows": [], "errors": []}
        self.write()  # before anything is measured for a file that cannot be written
        print(f"{device}, torch {torch.__version__}, commit {args.commit}", flush=True)

    def add(self, contender, model, metric, value, unit):
        row = {"contender": contender, "model": model, "metric": metric, "value": value, "unit": unit}
        self.content["rows"].append(row)
        print(f"{model:>6}  {metric:<20} {contender:<14} {value:12.4f} {unit}", flush=True)
        self.write()

    def error(self, contender, model, metric, error):
        text = f"{contender} {model} {metric}: {type(error).__name__}: {error}"
        self.content["errors"].append(text)
        print(f"  failed: {text}", flush=True)
        self.write()

    def write(self):
        with file_errors(self.path, "name another file with --out"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")


def timed(function, calls, device):
    """Milliseconds a call of `calls` calls in a row, on the device's clock.

    One call comes before, to keep the device busy: then the host can be ahead of the device, as in training.
    """
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) * 1e3 / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    function()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def alternate(functions, rounds, calls, device, failed):
    """{name: median milliseconds}. The contenders take turns, so that a change of clock rates affects all of them.

    failed(name, error=error) is called for one that raises, which has no time then.
    """
    times = {name: [] for name in functions}
    for round_ in range(rounds + 1):  # the first round warms up and compiles
        for name, function in functions.items():
            if times[name] is None:
                continue
            try:
                took = timed(function, calls if round_ else 3, device)
                if round_:
                    times[name].append(took)
            except Exception as error:  # one contender's failure must not cost the others their rows
                times[name] = None
                failed(name, error=error)
    return {name: statistics.median(values) for name, values in times.items() if values}


def load_module(path, name):
    if not path.is_file():
        raise UserError(f"{path} is missing: name a checkout of the peer's repository.")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def markdown_table(path):
    """A result as a table: a line for each model and contender, a column for each metric."""
    try:
        rows, values = read_json(path)["rows"], {}
        metrics = dict.fromkeys((row["metric"], row["unit"]) for row in rows)
        models = list(dict.fromkeys(row["model"] for row in rows))
        for row in rows:
            cells = values.setdefault((row["model"], row["contender"]), {})
            cells[row["metric"], row["unit"]] = _number(float(row["value"]), row["metric"], row["unit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of this script ({type(error).__name__}: {error}).") from None
    head = "model", "contender", *(_head(*metric) for metric in metrics)
    lines = [(*key, *(values[key].get(metric, "") for metric in metrics)) for key in values]
    return "\n".join(markdown([head, *sorted(lines, key=lambda line: models.index(line[0]))], left=(0, 1)))


def _head(metric, unit):
    for suffix in ("_ms", "_bytes", "_gb_per_s", "_gib", "_seconds", "_per_second"):
        metric = metric.removesuffix(suffix)
    unit = "GiB" if unit == "bytes" else unit
    return unit if metric in unit else metric.replace("_", " ") + f", {unit}" * (unit != "share")


def _number(value, metric, unit):
    if unit == "share":
        return f"{value:.2%}"
    value = value * 2**-30 if metric.endswith("_bytes") else value
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"


def model_names(text, known=GPT2_SIZES):
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    return names


def model_shape(name):
    """The model's settings of a name in GPT2_SIZES or LLAMA_SIZES."""
    layers, heads, width = GPT2_SIZES[LLAMA_SIZES.get(name, name)]
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width}
    return shape | LLAMA | {"n_kv_head": max(1, heads // 3)} if name in LLAMA_SIZES else shape
