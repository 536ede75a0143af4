"""Print text from a trained model, token by token. It continues a prompt or starts a document.

python sample.py --out_dir=out/demo_sophiag --start="KING RICHARD:" --num_samples=3 --temperature=0.7
python sample.py --out_dir=out/demo_sophiag --start=FILE:prompt.txt --max_new_tokens=200
python sample.py --init_from=gpt2-xl --start="The meaning of life is" --top_p=0.95

    tokens = generate(model, idx, 100, temperature=0.8, top_k=200, seed=1)  # idx (B, T) int64 -> (B, T + 100)
"""

import os
import sys
from dataclasses import dataclass

from training.errors import UserError, command  # first: Ctrl-C during the other imports is then quiet

# isort: split
import torch

from model import Cache
from training.config import ModelSource, load_config, setting
from training.distributed import Distributed
from training.hf import load_model
from training.terminal import warn

FILE = "FILE:"  # such a start names the file with the prompt
LONGEST = 1 << 24  # characters in it


@dataclass
class SampleConfig(ModelSource):
    start: str = setting("", "prompt, or FILE:PATH; default: the end-of-text token, or a newline if there is none")
    num_samples: int = setting(1, "texts to print; text i = 0, 1, ... uses seed + i", at_least=1)
    max_new_tokens: int = setting(500, "new tokens in a text, without the prompt", at_least=1)
    temperature: float = setting(0.8, "0: always the most likely token; 1: the model's own probabilities", at_least=0.0)
    top_k: int | None = setting(200, "sample only among the k most likely tokens; None: all", at_least=1)
    top_p: float | None = setting(None, "sample among the fewest tokens of this probability", above=0.0, at_most=1.0)
    seed: int = setting(1337, "the same seed gives the same text on the same device", at_least=0, below=2**32)
    device: str = setting("auto", "auto (cuda, mps or cpu, the first there is), cuda, cuda:1, mps, cpu")


def main(argv=None):
    config = load_config(SampleConfig, argv)
    device = Distributed(config.device).device
    model, tokenizer, _ = load_model(config.init_from, config.out_dir, config.checkpoint)
    prompt = prompt_ids(config.start, tokenizer)
    if len(prompt) > model.config.block_size:
        seen = f"each new one is drawn from the last block_size = {model.config.block_size}"
        warn(f"the prompt has {len(prompt)} tokens, {seen}.")
    sys.stdout.exact = not sys.stdout.isatty()  # a file gets the text as it is, a terminal no control characters
    model.to(device)
    idx = torch.tensor([prompt], device=device)  # (1, T)
    for i in range(config.num_samples):
        if i:
            print("---------------")
        if config.start:
            print(tokenizer.decode(prompt), end="")
        sampling = (config.temperature, config.top_k, config.seed + i, tokenizer.vocab_size, config.top_p)
        tokens = stream(model, idx, config.max_new_tokens, *sampling)
        for text in decode_stream((token.item() for token in tokens), tokenizer, prompt):
            print(text, end="", flush=True)
        print()


def prompt_ids(start, tokenizer):
    """The token ids of `start`, at least one."""
    if not start and tokenizer.eot is not None:
        return [tokenizer.eot]
    text = start or "\n"
    if start.startswith(FILE):
        path = os.path.expanduser(start.removeprefix(FILE))
        try:
            with open(path, encoding="utf-8-sig") as file:  # perhaps a pipe
                text = file.read(LONGEST + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"start = {start!r}: cannot read {path} ({reason}); name a text file.") from None
        if len(text) > LONGEST:
            raise UserError(f"start = {start!r}: {path} has more than {LONGEST:,} characters; name a shorter text.")
        if not text:
            raise UserError(f"start = {start!r}: {path} is empty; leave --start out to begin a document.")
    try:
        ids = tokenizer.encode(text)
    except UserError:
        if start:
            raise
        ids = []  # a vocabulary without a newline
    if not ids:
        raise UserError(f"start = {start!r:.80} gives no token of this model; give another prompt.")
    return ids


def decode_stream(ids, tokenizer, prompt=()):
    """Yield the text of `ids` after `prompt` piece by piece, each as soon as it is complete.

    A character can be cut over several tokens: half of one decodes to U+FFFD. The text of a token can
    depend on the token before it, such as the blank before a word.
    """
    before, waiting = list(prompt[-1:]), []

    def text():
        return tokenizer.decode(before + waiting)[len(tokenizer.decode(before)) :]

    for i in ids:
        waiting.append(i)
        if not text().endswith("\ufffd"):
            yield text()
            before, waiting = waiting, []
    yield text()


def generate(model, idx, max_new_tokens, *args, **settings):
    """Continue idx (B, T) int64 -> (B, T + max_new_tokens) with the tokens of `stream`."""
    return torch.cat((idx, *stream(model, idx, max_new_tokens, *args, **settings)), dim=1)


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, vocab_size=None, top_p=None):
    """Yield the tokens that follow idx (B, T) int64 one by one, (B, 1) each. The model is in eval mode meanwhile.

    temperature: 0 takes the likeliest token.
    top_k: sample among the k likeliest tokens.
    seed: makes the text reproducible on one device; None: torch's global generator.
    vocab_size: ids from here on (padding) are never drawn.
    top_p: sample among the fewest tokens that together have this probability.

    A cache of keys and values makes a token cost one position until text and prompt are `block_size` long. From then
    on a token costs `block_size` positions if positions are learned, since every token moves to another one. With rope
    it still costs one: each layer attends to the keys of the last `block_size` tokens, as they were computed.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature must be >= 0 and top_k >= 1, got temperature={temperature}, top_k={top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
    training = model.training
    model.eval()
    block_size = model.config.block_size
    new = idx = idx[:, -block_size:]
    caches = [Cache(min(block_size, idx.size(1) + max_new_tokens)) for _ in model.transformer.h]
    try:
        for _ in range(max_new_tokens):
            if idx.size(1) <= block_size or model.config.position == "rope":
                logits, _ = model(new, caches=caches)
            else:
                logits, _ = model(idx[:, -block_size:])
            new = draw(logits[:, -1, :vocab_size], temperature, top_k, generator, top_p)
            idx = torch.cat((idx[:, -block_size:], new), dim=1)
            yield new
    finally:
        model.train(training)


def draw(logits, temperature, top_k, generator, top_p=None):
    """Draw one token (B, 1) for each row of logits (B, V): by temperature, then top_k, then top_p."""
    if temperature < torch.finfo(torch.float32).tiny:  # float32 rounds it to 0
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no small temperature overflows
    if top_k is not None or top_p is not None:
        k = logits.size(-1) if top_k is None else min(top_k, logits.size(-1))
        best, candidates = logits.topk(k)  # (B, k) each, likeliest first
        probs = best.softmax(dim=-1)
        if top_p is not None:
            least = max(top_p, torch.finfo(torch.float32).tiny)  # float32 rounds less to 0
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= least, 0.0)  # likelier ones already have top_p
        # Draw in the vocabulary's order: if rounding swaps the ranks of two tokens, a seed still draws the same one.
        probs = torch.zeros_like(logits).scatter(-1, candidates, probs)
    else:
        probs = logits.softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)


if __name__ == "__main__":
    command(main)
