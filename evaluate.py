"""Loss, perplexity and bits per byte of a model on a complete split, each token predicted from a long context.

python evaluate.py --out_dir=out/demo_sophiag
python evaluate.py --init_from=gpt2 --dataset=wikitext103 --split=val --stride=512

A window of block_size tokens moves over the split by `stride` tokens. Each token counts once, in the first window that
holds it: it is predicted from at least block_size - stride tokens before it (fewer at the very start).
stride = block_size is fastest. With a smaller stride, a model that uses its context has a lower loss.
"""

import math
import sys
from dataclasses import dataclass

from training.errors import UserError, command  # first: Ctrl-C during the other imports is then quiet

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from training.config import ModelSource, load_config, setting
from training.data import check_split, open_dataset
from training.distributed import Distributed
from training.hf import load_model
from training.terminal import warn


@dataclass
class EvaluateConfig(ModelSource):
    dataset: str = setting("", "folder under data/ (or its path), or a mixture; default: that of the run")
    split: str = setting("val", "which split of the dataset", choices=("train", "val"))
    stride: int | None = setting(None, "tokens between window starts; default half of block_size", at_least=1)
    batch_size: int = setting(8, "windows in a forward pass", at_least=1)
    device: str = setting("auto", "auto (cuda, mps or cpu, the first there is), cuda, cuda:1, mps, cpu")
    dtype: str = setting("float32", "autocast type", choices=("float32", "bfloat16"))


def main(argv=None):
    config = load_config(EvaluateConfig, argv)
    device = Distributed(config.device).device
    model, tokenizer, settings = load_model(config.init_from, config.out_dir, config.checkpoint)
    dataset = config.dataset or settings.get("dataset")
    origin = config.out_dir if config.init_from == "resume" else config.init_from
    if not dataset:
        raise UserError(f"{origin} does not say what it was trained on; give --dataset=NAME.")
    block_size, corpus = model.config.block_size, open_dataset(dataset)
    stride = config.stride or max(1, block_size // 2)
    if stride > block_size:
        raise UserError(f"stride = {stride} would leave tokens out, block_size is {block_size}; lower it.")
    for part, _ in corpus.parts:
        sha256 = check_tokens(part, config.split, tokenizer, origin)
        known = settings.get("corpora", {}).get(part.name, settings).get(f"{config.split}_sha256", sha256)
        if sha256 != known and dataset == settings.get("dataset"):
            other = f"{config.split}.bin in {part.folder} is not that of the training of {origin} (its SHA-256 differs)"
            warn(f"{other}; the model may have seen its text.")
    model.to(device)
    results = []
    for part, share in corpus.parts:
        tokens = getattr(part, config.split)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            nats = total_nats(model, tokens, stride, config.batch_size)
        n_tokens, n_bytes = len(tokens) - 1, count_bytes(tokens, tokenizer) - count_bytes(tokens[:1], tokenizer)
        name = part.name if len(corpus.parts) > 1 else dataset
        print(f"{name} {config.split}: {n_tokens} tokens, {n_bytes} bytes; block_size {block_size}, stride {stride}")
        results.append((share, nats / n_tokens, n_bytes / n_tokens))
        measures = report(*results[-1][1:])
    if len(results) > 1:
        print(f"{dataset} {config.split}: the mean by the shares")
        measures = report(*(sum(result[0] * result[i] for result in results) for i in (1, 2)))
    return measures


def report(loss, bytes_per_token):
    """Print and return the measures of a loss in nats a token."""
    bits = loss / math.log(2) / bytes_per_token if bytes_per_token else math.nan
    measures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}
    print("  ".join(f"{name} {value:.4f}" for name, value in measures.items()))
    return measures


def check_tokens(corpus, split, tokenizer, origin):
    """The SHA-256 of a split. UserError where its tokens are too few, damaged, or not those the model reads."""
    corpus.check_tokenizer(tokenizer.spec, origin)
    if len(getattr(corpus, split)) < 2:
        raise UserError(f"{corpus.folder}/{split}.bin has one token only, of which nothing is to be predicted.")
    largest, sha256 = check_split(corpus, split)
    if largest >= tokenizer.vocab_size:
        beyond = f"token {largest}, beyond the model's {tokenizer.vocab_size}"
        raise UserError(f"{corpus.folder}/{split}.bin holds {beyond}; prepare it again.")
    return sha256


def count_bytes(tokens, tokenizer):
    """UTF-8 bytes of the text of `tokens`; the end-of-text token has none."""
    of_token = tokenizer.token_bytes()
    return sum(int(of_token[tokens[i : i + (1 << 24)]].sum()) for i in range(0, len(tokens), 1 << 24))


def summed_loss(logits, targets):
    """Sum of the cross-entropy in nats over the targets that are not -1."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1, reduction="sum")


@torch.no_grad()
def total_nats(model, tokens, stride, batch_size):
    """The sum of -log p over all `tokens` but the first."""
    model.eval()
    device, n = model.lm_head.weight.device, len(tokens) - 1  # to be predicted
    T = min(model.config.block_size, n)  # models from elsewhere may have windows of 100,000 tokens
    starts = range(0, max(n - T + stride, 1), stride)  # the last window is the first that reaches the end
    total = 0.0
    for first in tqdm(range(0, len(starts), batch_size), unit="batch", disable=None, file=sys.stderr):
        batch = starts[first : first + batch_size]
        inputs, targets = np.zeros((len(batch), T), np.int64), np.full((len(batch), T), -1)
        for row, start in enumerate(batch):
            window = tokens[start : start + T + 1]
            old = T - stride if start else 0  # targets that the window before it counted
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, old : len(window) - 1] = window[old + 1 :]
        loss = model(*(torch.from_numpy(array).to(device) for array in (inputs, targets)), loss=summed_loss)[1]
        total += loss.item()
    return total


if __name__ == "__main__":
    command(main)
