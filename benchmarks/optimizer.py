"""Time an optimizer step, a curvature update and clipping, against peers and against the memory's bandwidth."""

import gc
import itertools
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import nn

import sophia
from benchmarks.report import GPT2_SIZES, Report, alternate, load_module, model_names
from data.corpus import positive
from model import GPTConfig
from muon import Muon, WhitenedMuon
from training.optimizers import OptimizerContainer, amp_scaling


def add_arguments(parser):
    parser.add_argument("--official", metavar="PATH", help="checkout of the official Sophia repository")
    parser.add_argument("--models", type=model_names, default="124M,355M,774M", help=f"some of {', '.join(GPT2_SIZES)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=positive, default=11, help="turns of each contender; the row is their median")
    parser.add_argument("--calls", type=positive, default=10, help="calls in one turn")


def gpt2_shapes(name):
    """GPT-2's parameters: tied head, padded vocabulary, 1024 positions, no biases."""
    layers, _, width = GPT2_SIZES[name]
    block = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width), (width, 4 * width)]
    return [(GPTConfig.vocab_size, width), (GPTConfig.block_size, width), *block * layers, (width,)]


def optimizer_contenders(args):
    """{name: function of parameters that builds the optimizer}, with decayed and undecayed groups as in training."""

    def divided(params):
        """The hidden matrices; and embeddings, norms."""
        matrices = [p for p in params[2:] if p.dim() > 1]
        return matrices, params[:2] + [p for p in params[2:] if p.dim() == 1]

    def with_groups(cls, params, **settings):
        matrices, others = divided(params)
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return cls(groups, lr=1e-6, weight_decay=0.1, **settings)

    def beside_adamw(cls, params, **settings):
        """For the hidden matrices, and fused AdamW for the rest."""
        matrices, others = divided(params)
        split = {} if cls is torch.optim.Muon else {"split": [3, 1, 1, 1] * (len(matrices) // 4)}
        muon = cls(matrices, lr=1e-6, weight_decay=0.1, **split, **settings)
        return OptimizerContainer(muon=muon, adamw=torch.optim.AdamW(others, lr=1e-6, fused=True))

    if args.device == "cuda":
        contenders = {
            "sophia": partial(with_groups, sophia.SophiaG, fused=True),
            "adamw_fused": partial(with_groups, torch.optim.AdamW, fused=True),
            "muon": partial(beside_adamw, Muon),
            "muon_fused": partial(beside_adamw, Muon, fused=True),
            "whitened_muon": partial(beside_adamw, WhitenedMuon),  # roots every 10 steps: once in 10 calls
            "whitened_muon_fused": partial(beside_adamw, WhitenedMuon, fused=True),
            "whitened_muon_blocks": partial(beside_adamw, WhitenedMuon, fused=True, max_width=768),
            "whitened_muon_blocks_2": partial(beside_adamw, WhitenedMuon, fused=True, max_width=768, interval=2),
            "torch_muon": partial(beside_adamw, torch.optim.Muon),
        }
    else:
        contenders = {
            "sophia": partial(with_groups, sophia.SophiaG),
            "adamw_foreach": partial(with_groups, torch.optim.AdamW, foreach=True),
            "sophia_foreach": partial(with_groups, sophia.SophiaG, foreach=True),
        }
    if args.official:
        official = load_module(Path(args.official) / "sophia.py", "official_sophia")
        contenders["official"] = partial(with_groups, official.SophiaG)
    return contenders


def run(args):
    contenders = optimizer_contenders(args)
    report = Report(args)
    for model in args.models:
        if args.device == "cuda":
            for name, build in contenders.items():
                measure_peak(report, name, model, build)
        measure_times(report, model, contenders, args)


def make_parameters(model, device):
    generator = torch.Generator(device).manual_seed(0)
    return [nn.Parameter(torch.randn(s, device=device, generator=generator) * 0.02) for s in gpt2_shapes(model)]


def make_gradients(params, seed):
    generator = torch.Generator(params[0].device).manual_seed(seed)
    return [torch.randn(p.shape, device=p.device, generator=generator) * 1e-3 for p in params]


def measure_peak(report, name, model, build):
    """Report the peak of bytes in use during estimate, clipping and steps. The floor: p, g and two states.

    Bytes are counted as requested. The allocator's rounding is the same for every optimizer (3% at 774M).
    """
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_stats()["requested_bytes.all.current"]
    try:
        params = make_parameters(model, "cuda")
        optimizer = build(params)
        for p, g in zip(params, make_gradients(params, 1), strict=True):
            p.grad = g
        torch.cuda.reset_peak_memory_stats()
        if hasattr(optimizer, "max_grad_norm"):
            optimizer.max_grad_norm = 1.0
        for _ in range(2):
            if hasattr(optimizer, "update_hessian"):
                optimizer.update_hessian()
            optimizer.step()
        report.add(name, model, "peak_bytes", torch.cuda.memory_stats()["requested_bytes.all.peak"] - start, "bytes")
        if name == "sophia":
            report.add("floor", model, "peak_bytes", 4 * sum(p.nbytes for p in params), "bytes")
    except Exception as error:
        report.error(name, model, "peak_bytes", error)


def measure_times(report, model, contenders, args):
    gc.collect()
    params = make_parameters(model, args.device)
    count = sum(p.numel() for p in params)
    # Gradients alternate between two places in memory, as in training, where they are freed and allocated again.
    turn = itertools.cycle([make_gradients(params, seed) for seed in (1, 2)])
    optimizers = {name: build(params) for name, build in contenders.items()}

    def with_gradients(call, optimizer):
        for p, g in zip(params, next(turn), strict=True):
            p.grad = g
        call(optimizer)

    def clip_and_step(optimizer):
        if hasattr(optimizer, "max_grad_norm"):
            optimizer.max_grad_norm = 1.0
            optimizer.step()
            optimizer.max_grad_norm = None
        else:
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

    finite = torch.zeros((), device=args.device)

    def as_in_training(optimizer):
        """With `found_inf`, which the training scripts set: else it reads the gradients once more to look for inf."""
        with amp_scaling(optimizer, None, finite):
            optimizer.update_hessian()

    source, target, results = torch.randn(count, device=args.device), torch.empty(count, device=args.device), {}
    estimating = {n: o for n, o in optimizers.items() if hasattr(o, "update_hessian")}
    metrics = {  # what is timed, whose, and the bytes a parameter that it moves at least
        "step_ms": (lambda optimizer: optimizer.step(), optimizers, 24),
        "clip_step_ms": (clip_and_step, optimizers, 28),
        "update_hessian_ms": (as_in_training, estimating, 12),
        "update_hessian_checked_ms": (lambda optimizer: optimizer.update_hessian(), estimating, 12),
    }
    for metric, (call, of, _) in metrics.items():
        functions = {name: partial(with_gradients, call, optimizer) for name, optimizer in of.items()}
        functions["floor"] = lambda: target.copy_(source)
        failed = partial(report.error, model=model, metric=metric)
        results[metric] = alternate(functions, args.rounds, args.calls, args.device, failed)
    copy_ms = statistics.median(times["floor"] for times in results.values())
    report.add("floor", model, "copy_gb_per_s", 8e-6 * count / copy_ms, "GB/s")
    for metric, (_, _, bytes_per_parameter) in metrics.items():
        for name, value in (results[metric] | {"floor": copy_ms * bytes_per_parameter / 8}).items():
            report.add(name, model, metric, value, "ms")
