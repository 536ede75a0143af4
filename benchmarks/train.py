"""Time training steps of this repository, nanoGPT and the official one: one process, in turns, medians.

The training loop is timed: reading the batch, forward, backward, clipping at 1.0 and the optimizer's step, with bf16
autocast and torch.compile for all. Compilation comes before and is reported as its own row.
"""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.compilation import CANDIDATES, candidate
from benchmarks.report import GPT2_SIZES, LLAMA_SIZES, Report, alternate, load_module, model_names, model_shape
from data.corpus import positive
from model import GPT, GPTConfig
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import load_config
from training.errors import UserError
from training.flops import peak_flops
from training.optimizers import OPTIMIZERS, SECOND_ORDER, OptimizerContainer, make_optimizer
from training.run import Run

# Sequences. At 124M on an H200 nanoGPT was fastest at 64 of 12, 32 and 64, and ours as fast at 128. 355M: only 32 ran.
MICRO_BATCH = {"30M": 128, "124M": 64, "355M": 32, "774M": 16, "1.5B": 8}
MICRO_BATCH |= {name: MICRO_BATCH[size] for name, size in LLAMA_SIZES.items()}
OFFICIAL_MICRO_BATCH = {"30M": 64, "124M": 32, "355M": 32, "774M": 8, "1.5B": 4}  # only 32 ran here
ACCUMULATION = 8  # micro-batches in a step where curvature and scaling are measured: at 124M x 64 half a million tokens
ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser):
    parser.add_argument("--nanogpt", metavar="PATH", help="checkout of karpathy/nanoGPT")
    parser.add_argument("--official", metavar="PATH", help="checkout of the official Sophia repository")
    names = (*GPT2_SIZES, *LLAMA_SIZES)
    kind = partial(model_names, known=names)
    parser.add_argument("--models", type=kind, default="124M,355M", help=f"some of {', '.join(names)}")
    some = "some of speed, curvature, muon, checkpointing, scaling, fsdp, start; default: %(default)s"
    parser.add_argument("--parts", default="speed,curvature,checkpointing,scaling,fsdp", help=some)
    parser.add_argument(
        "--optimizers",
        default="adamw,muon,whitened_muon,sophiag",
        help="for the parts scaling and fsdp (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each contender; the row is their median")
    parser.add_argument("--steps", type=positive, default=10, help="steps in one turn")
    parser.add_argument("--block_size", type=positive, default=1024)
    parser.add_argument("--compile", default="True", choices=("True", "False"))


def run(args):
    parts = {"speed": speed, "curvature": curvature, "muon": muon, "checkpointing": checkpointing}
    parts |= {"scaling": scaling, "fsdp": fsdp, "start": start_up}
    chosen = args.parts.split(",")
    if unknown := sorted(set(chosen) - set(parts)):
        raise UserError(f"--parts {','.join(unknown)}: expected some of {','.join(parts)}.")
    args.optimizers = args.optimizers.split(",")
    if unknown := sorted(set(args.optimizers) - OPTIMIZERS.keys()):
        raise UserError(f"--optimizers {','.join(unknown)}: expected some of {','.join(OPTIMIZERS)}.")
    for path in (args.nanogpt, args.official):
        if path and not (Path(path) / "model.py").is_file():
            raise UserError(f"{path} has no model.py: name a checkout of the peer's repository.")
    report = Report(args)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        write_tokens(args.folder)
        for model in args.models:
            for part in chosen:
                parts[part](report, model, args)


def write_tokens(folder, count=4_000_000):
    """Write random tokens, of which some are common: the speed does not depend on the text."""
    tokens = (np.random.default_rng(0).zipf(1.2, count) - 1) % 50257
    for split in ("train", "val"):
        tokens.astype("<u2").tofile(folder / f"{split}.bin")


def settings(model, args, micro_batch, **more):
    values = {
        "dataset": args.folder, **model_shape(model), "block_size": args.block_size,
        "batch_size": micro_batch, "total_bs": micro_batch, "max_iters": 10**6, "warmup_iters": 10,
        "learning_rate": 3e-4, "eval_interval": 10**9, "eval_tokens": args.block_size, "log_interval": 10**9,
        "device": args.device, "compile": args.compile,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in (values | more).items()]


class Ours:
    """A run of train_adam.py or train_sophiag.py whose steps are taken one by one. torch_muon: torch.optim.Muon."""

    def __init__(self, argv, out_dir, optimizer="adamw"):
        self.sophia, torchs = optimizer in SECOND_ORDER, optimizer == "torch_muon"
        argv = [*argv, f"--out_dir={out_dir}", f"--optimizer_name={'muon' if torchs else optimizer}"]
        self.config = load_config(SophiaConfig if self.sophia else AdamConfig, argv)
        self.run = Run(self.config)
        self.run.set_optimizer(make_torch_muon if torchs else make_optimizer)
        self.steps = self.run.steps()

    def __call__(self):
        step, run = next(self.steps), self.run
        if self.sophia and step % self.config.hess_interval == 0:
            run.curvature_step(step)
        run.backward(run.train_batch(step))
        run.optimizer_step()

    def close(self):
        self.steps.close()
        self.run.__exit__(None, None, None)


def make_torch_muon(config, groups, device):
    """torch.optim.Muon for the hidden matrices, query, key and value as one, and AdamW for the rest."""
    matrices = next(group for group in groups if group["name"] == "matrices")
    others = [group for group in groups if group is not matrices]
    muon = torch.optim.Muon(matrices["params"], lr=config.learning_rate, adjust_lr_fn="match_rms_adamw")
    return OptimizerContainer(muon=muon, adamw=torch.optim.AdamW(others, fused=device.type == "cuda"))


class Peer:
    """A peer's model in nanoGPT's training loop, which fetches the next batch while the device works."""

    def __init__(self, model, optimizer, micro_batch, args):
        self.model, self.optimizer, self.shape = model, optimizer, (micro_batch, args.block_size)
        self.compiled = torch.compile(model) if args.compile == "True" else model
        self.tokens, self.device = np.memmap(args.folder / "train.bin", dtype=np.uint16, mode="r"), args.device
        self.autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
        self.batch = self.fetch()

    def fetch(self):
        rows, length = self.shape
        starts = torch.randint(len(self.tokens) - length, (rows,)).tolist()
        windows = torch.from_numpy(np.stack([self.tokens[i : i + length + 1] for i in starts]).astype(np.int64))
        pair = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        return [b.pin_memory().to("cuda", non_blocking=True) for b in pair] if self.device == "cuda" else pair

    def __call__(self):
        with self.autocast:
            _, loss = self.compiled(*self.batch)
        self.batch = self.fetch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self):
        self.model = self.compiled = self.optimizer = None


def peer_model(module, model, args):
    shape = model_shape(model) | {"vocab_size": GPTConfig.vocab_size, "block_size": args.block_size}
    return module.GPT(module.GPTConfig(**shape, bias=False, dropout=0.0)).to(args.device)


def make_nanogpt(model, args):
    gpt = peer_model(load_module(Path(args.nanogpt) / "model.py", "nanogpt_model"), model, args)
    optimizer = gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), args.device)
    return Peer(gpt, optimizer, MICRO_BATCH[model], args)


def make_official(model, args):
    """Its model and its SophiaG.step; the curvature pass of its script, every 10th step, is left out."""
    ours = sys.modules["sophia"]
    try:  # its model imports its own sophia.py by this name
        sys.modules["sophia"] = load_module(Path(args.official) / "sophia.py", "official_sophia")
        module = load_module(Path(args.official) / "model.py", "official_model")
    finally:
        sys.modules["sophia"] = ours
    gpt = peer_model(module, model, args)
    optimizer = gpt.configure_optimizers("sophiag", 0.2, 3e-4, (0.965, 0.99), 0.05, args.device)
    return Peer(gpt, optimizer, OFFICIAL_MICRO_BATCH[model], args)


def start(report, name, model, make, args):
    """A contender after its first steps, or None if it failed. Report its compilation time and memory."""
    gc.collect()
    on_gpu, contender = args.device == "cuda", None
    synchronize = torch.cuda.synchronize if on_gpu else torch.cpu.synchronize
    if on_gpu:
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
    try:
        contender = make()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        contender()
        synchronize()
        report.add(name, model, "compile_seconds", time.perf_counter() - begun, "s")
        contender()
        if on_gpu:
            synchronize()
            report.add(name, model, "peak_gib", (torch.cuda.max_memory_allocated() - base) / 2**30, "GiB")
        return contender
    except Exception as error:  # one contender's failure must not cost the others their rows
        report.error(name, model, "start", error)
        if contender:
            contender.close()  # its thread would keep its model in memory
        return None


@contextlib.contextmanager
def started(report, model, makers, args):
    contenders = {name: start(report, name, model, make, args) for name, make in makers.items()}
    contenders = {name: contender for name, contender in contenders.items() if contender}
    try:
        yield contenders
    finally:
        for contender in reversed(contenders.values()):  # each gives the signals back to the one before
            contender.close()
        contenders.clear()
        torch._dynamo.reset()


def compare(report, model, makers, sequences, args, steps=None):
    """{name: milliseconds of a step}; tokens/s and MFU are reported. sequences: {name: those in a step}."""
    failed = partial(report.error, model=model, metric="step")
    with started(report, model, makers, args) as contenders:
        times = alternate(contenders, args.rounds, steps or args.steps, args.device, failed)
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**model_shape(model), block_size=args.block_size))
    peak = peak_flops(report.content["device"], "bfloat16")
    for name, milliseconds in times.items():
        speed = sequences[name] * args.block_size / milliseconds * 1e3
        report.add(name, model, "tokens_per_second", speed, "tokens/s")
        if peak:
            report.add(name, model, "mfu", gpt.flops_per_token(args.block_size) * speed / peak, "share")
    return times


def own_settings(device):
    """{contender: its settings} of this repository's contenders that this device serves."""
    found, capability = {"ours": {}}, torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    if capability >= (8, 9):
        found["ours_fp8"] = {"fp8": True}
    if capability[0] == 9:
        found["ours_fp8_loss"] = {"fp8_loss": True}
        found["ours_fp8_both"] = {"fp8": True, "fp8_loss": True}
    return found


def speed(report, model, args):
    micro = MICRO_BATCH[model]
    makers = {}
    for name, more in own_settings(args.device).items():
        makers[name] = partial(Ours, settings(model, args, micro, **more), args.folder / f"{name}_{model}")
    if args.nanogpt and model in GPT2_SIZES:
        makers["nanogpt"] = lambda: make_nanogpt(model, args)
    if args.official and model in GPT2_SIZES:
        makers["official"] = lambda: make_official(model, args)
    sizes = dict.fromkeys(makers, micro) | {"official": OFFICIAL_MICRO_BATCH.get(model)}
    for name in compare(report, model, makers, sizes, args):
        report.add(name, model, "micro_batch", sizes[name], "sequences")


def curvature(report, model, args):
    """Sophia's extra time over AdamW's, estimates every 10 steps included, as a share of AdamW's time."""
    over_adamw(report, model, args, ("sophiag", "sophiah"), ACCUMULATION * MICRO_BATCH[model], "curvature_overhead")


def muon(report, model, args):
    """The extra time of Muon, whitened Muon and torch's Muon over AdamW's, as a share of AdamW's time.

    A step has 128 sequences. Whitened Muon computes its roots every 10 steps. With `_blocks` it whitens in blocks as
    wide as the model; with `_blocks_2` it also computes the roots every 2 steps.
    """
    blocks = [f"--whiten_max_width={model_shape(model)['n_embd']}"]
    variants = {
        "whitened_muon_blocks": ("whitened_muon", blocks),
        "whitened_muon_blocks_2": ("whitened_muon", [*blocks, "--whiten_interval=2"]),
    }
    names = "muon", "whitened_muon", *variants, "torch_muon"
    over_adamw(report, model, args, names, 128, "muon_overhead", variants)


def over_adamw(report, model, args, names, total_bs, metric, variants=None):
    """names: of optimizers, or of `variants`: {name: (optimizer, more settings)}."""
    micro = min(MICRO_BATCH[model], total_bs)
    argv, makers = settings(model, args, micro, total_bs=total_bs), {}
    for name in ("adamw", *names):
        optimizer, more = (variants or {}).get(name, (name, []))
        makers[f"ours_{name}"] = partial(Ours, argv + more, args.folder / f"{metric}_{model}_{name}", optimizer)
    sequences, steps = dict.fromkeys(makers, total_bs), 10  # one estimate in each turn
    times = compare(report, model, makers, sequences, args, steps)
    for name in set(times) - {"ours_adamw"} if "ours_adamw" in times else ():
        report.add(name, model, metric, times[name] / times["ours_adamw"] - 1, "share")
        report.add(name, model, "step_ms_over_adamw", times[name] - times["ours_adamw"], "ms")


def checkpointing(report, model, args):
    micro = MICRO_BATCH[model]
    argv = settings(model, args, micro, activation_checkpointing=True)
    makers = {"ours_checkpointing": lambda: Ours(argv, args.folder / f"checkpointing_{model}")}
    compare(report, model, makers, dict.fromkeys(makers, micro), args)


def on_ranks(optimizer, model, args, passes, alone, **more):
    """{"together": {name of passes: tokens/s, "peak_gib"}, "alone": a list of such, one a rank} on two ranks.

    passes: {name: (total_bs of a rank alone, of both), in micro-batches}. Prints as it goes. See benchmarks/ranks.py.
    """
    micro = MICRO_BATCH[model]
    passes = {name: [micro * batches for batches in pair] for name, pair in passes.items()}
    argv = settings(model, args, micro, **more)
    folder = tempfile.mkdtemp(dir=args.folder)
    job = {"optimizer": optimizer, "argv": argv, "folder": folder, "passes": passes, "alone": alone}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "benchmarks.ranks", json.dumps(job | {"steps": args.steps})]
    found = {"alone": []}
    for line in lines_of(command):
        if line.startswith('{"'):
            print(f"{model:>6}  {optimizer}: {line.strip()}", flush=True)
            for key, speeds in json.loads(line).items():
                found[key] = [*found[key], speeds] if key == "alone" else speeds
    return found


def lines_of(command, environment=None):
    """Yield the lines that a command prints. RuntimeError with the error that it printed if it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        to = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "cwd": ROOT, "env": environment}
        process = subprocess.Popen(command, **to)
        yield from process.stdout
        if process.wait():
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["no output"]
            raise RuntimeError(next((line for line in lines if "rror:" in line), lines[-1]))


def start_up(report, model, args):
    """Seconds from a command to the end of its first step, compile cache empty and warm; and the speed after that.

    For a run and for each other way to compile it of benchmarks/compilation.py.
    """
    micro = MICRO_BATCH[model]
    once = settings(model, args, micro, max_iters=1, warmup_iters=0, log_interval=1, overwrite=True)
    for name in CANDIDATES:
        command = [sys.executable, "-m", "benchmarks.compilation", name, *once, f"--out_dir={args.folder / 'start'}"]
        cache = tempfile.mkdtemp(dir=args.folder)
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        try:
            for metric in ("start_cold", "start_warm"):
                begun = time.perf_counter()
                took = [time.perf_counter() - begun for line in lines_of(command, environment) if "train/loss" in line]
                report.add(name, model, metric, took[0], "s")
        except Exception as error:
            report.error(name, model, "start", error)

    def make(name):
        with candidate(name):
            return Ours(settings(model, args, micro), args.folder / f"start_{name}_{model}")

    compare(report, model, {name: partial(make, name) for name in CANDIDATES}, dict.fromkeys(CANDIDATES, micro), args)


def scaling(report, model, args):
    """Tokens/s of two GPUs over one, at the same micro-batch.

    One GPU is the mean of both, which run one rank each at the same time: GPUs of one model differ, and of two the
    slower one sets the pace. Measured with a batch of ACCUMULATION micro-batches, and with one micro-batch for each
    rank and step, where every backward pass waits for an exchange of gradients.
    """
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        return print("  scaling: left out, one GPU here", flush=True)
    passes = {"scaling_2gpu": (ACCUMULATION, ACCUMULATION), "scaling_2gpu_one_pass": (1, 2)}
    for optimizer in args.optimizers:
        try:
            found = on_ranks(optimizer, model, args, passes, alone=True)
        except Exception as error:
            report.error(f"ours_{optimizer}", model, "scaling_2gpu", error)
            continue
        for name in passes:
            single = statistics.mean(speeds[name] for speeds in found["alone"])
            report.add(f"ours_{optimizer}", model, name, found["together"][name] / single, "times one GPU")


def fsdp(report, model, args):
    """Parameters, gradients and states sharded over two GPUs; the last of the optimizers with checkpointing too."""
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        return print("  fsdp: left out, one GPU here", flush=True)
    passes = {"tokens_per_second": (0, ACCUMULATION), "one_pass_tokens_per_second": (0, 2)}
    contenders = [(name, f"ours_{name}_fsdp", False) for name in args.optimizers]
    for optimizer, name, checkpoints in [*contenders, (args.optimizers[-1], "ours_fsdp_checkpointing", True)]:
        more = {"fsdp": True, "activation_checkpointing": checkpoints}
        try:
            found = on_ranks(optimizer, model, args, passes, alone=False, **more)["together"]
        except Exception as error:
            report.error(name, model, "tokens_per_second", error)
            continue
        for metric in passes:
            report.add(name, model, metric, found[metric], "tokens/s")
        report.add(name, model, "micro_batch", MICRO_BATCH[model], "sequences")
        if "peak_gib" in found:
            report.add(name, model, "peak_gib", found["peak_gib"], "GiB")
