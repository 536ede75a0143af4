"""Measure the tokens a second of prepare.py and of tiktoken alone, and the input pipeline's time in a training step.

The text is Python's standard library, at most 20 MB. "tiktoken" is `encode_ordinary_batch` on the same documents in
memory, with the same number of threads. prepare.py also reads, hashes and splits them and writes train.bin and val.bin.
"""

import contextlib
import io
import itertools
import json
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import tiktoken
import torch

from benchmarks.report import Report, alternate
from data import corpus
from data.python import prepare as python
from data.shakespeare_char import prepare as shakespeare_char
from data.text import prepare as text
from train_adam import AdamConfig
from training.config import load_config
from training.optimizers import make_optimizer
from training.run import Run
from training.tokenizer import get_tokenizer

TEXT_BYTES = 20_000_000
CONFIG_124M = Path(__file__).resolve().parent.parent / "config/train_gpt2_small_adam.py"
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "total_bs": 16, "batch_size": 16}
ROUNDS = 5


def add_arguments(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    help = "device of the training step (default: %(default)s)"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"), help=help)


def run(args):
    report = Report(args)
    get_tokenizer("gpt2")  # fills tiktoken's cache
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        measure_tokenizing(report, write_sources(folder / "source"), folder)
        measure_training(report, folder, args.device)


def write_sources(folder):
    """Write the standard library's files to `folder` as NAME.py and NAME.txt, each content once; return their texts."""
    folder.mkdir()
    texts, size = {}, 0
    for path in python._python_files([sysconfig.get_path("stdlib")]):
        content = path.read_bytes()
        if size < TEXT_BYTES and len(content) <= python.MAX_BYTES and content.strip() and python.is_utf8(content):
            texts[content.decode("utf-8-sig")] = content
            size += len(content)
    for i, content in enumerate(texts.values()):
        for kind in ("py", "txt"):
            (folder / f"{i:05}.{kind}").write_bytes(content)
    return list(texts)


def measure_tokenizing(report, texts, folder):
    threads = corpus.arguments("", __file__).parse_args([]).num_proc
    source, counts = folder / "source", {}
    size = sum(len(text.encode()) for text in texts)
    print(f"{size / 1e6:.1f} MB in {len(texts)} documents, {threads} threads", flush=True)

    def bare_tiktoken():
        encoded = tiktoken.get_encoding("gpt2").encode_ordinary_batch(texts, num_threads=threads)
        counts["tiktoken"] = sum(map(len, encoded))

    def prepare(module, *arguments):
        name = module.__name__.split(".")[1]
        argv = ["prepare.py", *arguments, "--out_dir", folder / name, "--num_proc", threads, "--force"]
        patch, unseen = mock.patch("sys.argv", list(map(str, argv))), io.StringIO()
        with patch, contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            module.main()
        meta = json.loads((folder / name / "meta.json").read_text())
        counts[name] = meta["train_tokens"] + meta["val_tokens"]

    def prepare_python():
        with mock.patch.object(python.sysconfig, "get_path", return_value=str(source)):
            prepare(python)

    def prepare_characters():
        documents = [("val" if i % 100 == 0 else "train", text) for i, text in enumerate(texts)]
        with mock.patch.object(shakespeare_char, "splits", return_value=documents):
            prepare(shakespeare_char)

    contenders = {"tiktoken": bare_tiktoken, "text": lambda: prepare(text, "--source", source, "--val_fraction", 0.01)}
    contenders |= {"python": prepare_python, "shakespeare_char": prepare_characters}

    failed = partial(report.error, model="gpt2", metric="tokens_per_second")
    times = alternate(contenders, ROUNDS, 1, "cpu", failed)
    speeds = {name: counts[name] / milliseconds * 1e3 for name, milliseconds in times.items()}
    for name, speed in speeds.items():
        report.add(name, "characters" if name == "shakespeare_char" else "gpt2", "tokens_per_second", speed, "tokens/s")
    for name in ("text", "python"):
        if {name, "tiktoken"} <= speeds.keys():
            report.add(name, "gpt2", "share_of_tiktoken", speeds[name] / speeds["tiktoken"], "share")


def measure_training(report, folder, device):
    """Time the same AdamW steps with the run's batches and with one batch that stays on the device."""
    if device == "cuda":
        model, argv = "124M", [str(CONFIG_124M)]
        settings = {"total_bs": 64, "batch_size": 64, "dataset": folder / "text"}
    else:
        model, argv, settings = "tiny", [], TINY | {"dataset": folder / "shakespeare_char"}
    settings |= {"out_dir": folder / "out", "device": device}
    with Run(load_config(AdamConfig, argv + [f"--{key}={value}" for key, value in settings.items()])) as run:
        run.set_optimizer(make_optimizer)
        resident, steps = run.train_batch(0), itertools.count(1)

        def step(batch):
            run.backward(batch)
            run.optimizer_step()

        contenders = {"resident batch": lambda: step(resident), "pipeline": lambda: step(run.train_batch(next(steps)))}

        failed = partial(report.error, model=model, metric="train_step_ms")
        times = alternate(contenders, 3 * ROUNDS, 5, device, failed)
        for name, milliseconds in times.items():
            report.add(name, model, "train_step_ms", milliseconds, "ms")
        if len(times) == 2:
            overhead = times["pipeline"] / times["resident batch"] - 1
            report.add("pipeline", model, "input_pipeline_overhead", overhead, "share")
