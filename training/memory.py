"""The memory that a micro-batch takes, by the formula of docs/scaling.md, and the largest micro-batch that fits.

sequences = estimate(config, memory=80 * 2**30, ranks=1)
batch_size = largest(micro_batch_sizes(480, ranks=1), fits=lambda size: ..., guess=sequences)
"""

import bisect
import math
import os

import torch

from model import GPT, GPTConfig
from muon import _blocks
from training.config import model_config
from training.exchange import MUON_TRIPS

FREE = 0.1  # share of the memory that is left to the libraries and to fragmentation


def micro_batch_sizes(total_bs, ranks):
    """The micro-batches into which a step of total_bs sequences can be divided, rising."""
    return [size for size in range(1, total_bs // ranks + 1) if total_bs % (size * ranks) == 0]


def token_bytes(config, vocab_size):
    """Bytes that a token of a micro-batch takes.

    34 bytes a layer and unit of width are the activations in bfloat16, measured on an H200 (docs/speed.md); 6 bytes a
    row of the vocabulary are the logits of an evaluation.
    """
    layers = 2 * config.n_layer + 68 if config.activation_checkpointing else 34 * config.n_layer
    return (2 if config.dtype == "float32" else 1) * max(layers * config.n_embd, 6 * vocab_size)


def estimate(config, memory, ranks, vocab_size=GPTConfig.vocab_size):
    """How many sequences fit at once in `memory` bytes of a rank; 0 if not even one does."""
    left = (1 - FREE) * memory - state_bytes(config, ranks, vocab_size)
    return max(0, int(left / (token_bytes(config, vocab_size) * config.block_size)))


def state_bytes(config, ranks, vocab_size=GPTConfig.vocab_size):
    """Bytes of a rank's parameters, gradients and two moments, float32 each; with fsdp of its share of them.

    A sharded rank that accumulates gradients over several micro-batches keeps what fsdp_keep says until the last. Muon
    has one moment of a matrix, and its share of the whitening factors (float32) and roots (bfloat16).
    """
    parameters, matrices = sizes(config, vocab_size)
    muon = config.optimizer_name in MUON_TRIPS
    shards = (config.fsdp_shard or ranks) if config.fsdp else 1
    accumulates = config.fsdp_keep != "nothing" and (config.gradient_accumulation_steps or 1) > 1
    state = (12 * parameters - 4 * matrices * muon) / shards + 4 * parameters / (1 if accumulates else shards)
    if config.fsdp and config.fsdp_keep == "all":
        state += 2 * parameters
    if muon and config.optimizer_name != "muon":
        squares = {"input": slice(1, 2), "output": slice(0, 1), "both": slice(2)}[config.whiten_sides]
        widths = [width for shape in _hidden_matrices(_model(config, vocab_size)) for width in shape[squares]]
        blocks = [_blocks(width, config.whiten_max_width) for width in widths]
        factors = sum(n * (width // n) ** 2 for n, width in zip(blocks, widths, strict=True))
        state += 6 * factors / (shards if config.fsdp else ranks)
    return state


def sizes(config, vocab_size=GPTConfig.vocab_size):
    """(numbers in the model's parameters, those in its hidden matrices)."""
    model = _model(config, vocab_size)
    return model.num_params(non_embedding=False), sum(map(math.prod, _hidden_matrices(model)))


def _model(config, vocab_size):
    """The model of a run with this config, without memory."""
    with torch.device("meta"):
        return GPT(model_config(config, vocab_size))


def _hidden_matrices(model):
    """(rows, columns) of the matrices of all blocks; query, key and value are three, SwiGLU's gate and values two."""
    group = model.parameter_groups(0.0)[0]
    for p, split in zip(group["params"], group["split"], strict=True):
        rows = split if isinstance(split, tuple) else (len(p) // split,) * split
        yield from ((count, p.size(1)) for count in rows)


def largest(sizes, fits, guess):
    """The largest of the rising `sizes` for which fits(size), searched from `guess` on; None if none fits."""
    i = max(0, bisect.bisect_right(sizes, guess) - 1)
    if fits(sizes[i]):
        while i + 1 < len(sizes) and fits(sizes[i + 1]):
            i += 1
        return sizes[i]
    return next((size for size in reversed(sizes[:i]) if fits(size)), None)


def memory_of(device):
    """Bytes of memory of a rank's device; of a CPU its share of the host's. None where the system does not say it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    except (AttributeError, ValueError, ZeroDivisionError, OSError):
        return None


def sentence(error, config, device_name, memory, ranks, vocab_size):
    """What a run says that has used up its memory."""
    host = isinstance(error, MemoryError | OSError) or "DefaultCPUAllocator" in str(error) or device_name == "cpu"
    size, where = config.batch_size, "the host" if host else f"the GPU ({device_name})"
    sizes, remedies = micro_batch_sizes(config.total_bs, ranks), []
    fit = estimate(config, memory, ranks, vocab_size) if memory else size
    smaller = [s for s in sizes if size == "auto" or s < size]
    within = [s for s in smaller if s <= fit] or smaller[:1]
    if within and size != "auto":
        remedies.append(f"--batch_size={within[-1]} (it would fit by the formula of docs/scaling.md)")
    remedies += [f"--{name}=True" for name in ("activation_checkpointing", "fsdp") if not getattr(config, name)]
    model = f"{config.n_layer} layers of width {config.n_embd} and block_size = {config.block_size}"
    problem = f"the memory of {where} is too small for batch_size = {size}, with {model}"
    return f"{problem}; use {' or '.join(remedies) or 'a smaller model'}"
