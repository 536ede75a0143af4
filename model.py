"""GPT-2 in one file: learned positions, pre-LayerNorm, tied embedding.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).to("cuda")
    logits, loss = model(idx, targets)                       # (B, T) int64 each

Parameters have nanoGPT's names. One difference to nanoGPT: the GELU is by default the tanh approximation that GPT-2 was
trained with (`gelu_new` in Hugging Face), not the exact one, so that OpenAI's weights give OpenAI's logits.
OpenAI's weights and Hugging Face models are read and written by training/hf.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, targets) -> scalar
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")  # wte is the output matrix too


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # in the Linear and LayerNorm layers; OpenAI's GPT-2 has them
    scale_attn_by_inverse_layer_idx: bool = False  # divide the attention scores of layer i = 1, 2, ... by i
    gelu: str = "tanh"  # the approximation that GPT-2 was trained with, or "exact", as in nanoGPT

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be divisible by n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.gelu not in ("tanh", "exact"):
            raise ValueError(f"gelu must be 'tanh' or 'exact', got {self.gelu!r}")


class Cache:
    """Keys and values of the tokens that a layer has seen, at most `room` tokens: a new token costs one position."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self.k, self.v = torch.empty(0), torch.empty(0)  # (B, H, room, C/H) from the first tokens on

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens, (B, H, T, C/H) each; return keys and values of all tokens so far, as views of the cache."""
        if not self.length:
            self.k, self.v = (y.new_empty(*y.shape[:2], self.room, y.size(3)) for y in (k, v))
        seen, self.length = self.length, self.length + k.size(2)
        self.k[:, :, seen : self.length], self.v[:, :, seen : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """x (B, T, C). With a cache: all tokens so far while it is empty, then one token at a time."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))  # (B, H, T, C/H)
        causal = True
        if cache is not None:
            k, v = cache.append(k, v)
            causal = k.size(2) == T  # a single new token sees all others
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))

    def gelu(self, x: Tensor) -> Tensor:
        if self.approximate == "none" or not torch.compiler.is_compiling():
            return F.gelu(x, approximate=self.approximate)
        # The same function, as (1 + tanh(z)) / 2 = sigmoid(2z); it compiles to a faster kernel.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # (B, T, C)
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32 or better. logits (B, T, V), targets (B, T) int64, -1 = no label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(dtype), targets.flatten(), ignore_index=-1)


class GPT(nn.Module):
    """GPT-2 with random weights. Built on the CPU and then moved, a seed gives the same model on every device."""

    transformer: Any  # a type checker does not know a ModuleDict's attributes

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep only each block's input and recompute the rest
        device = torch.get_default_device()
        with torch.device("meta"):  # no memory and no random numbers yet: `init_weights` draws each weight once
            self.transformer = nn.ModuleDict(dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config, layer_idx) for layer_idx in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
            ))  # fmt: skip
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.to_empty(device=device)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.init_weights()

    def init_weights(self) -> None:
        """As GPT-2: N(0, 0.02^2), biases 0. c_proj, which adds to the residual stream, has 0.02 / sqrt(2 n_layer)."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                n_added = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n_added))
            else:  # LayerNorm weights and all biases
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss: Loss = cross_entropy, caches: list[Cache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and loss of tokens idx, (B, T) int64.

        With targets: logits (B, T, V) and `loss(logits, targets)`, a scalar. Without: the last position's logits
        (B, 1, V) and None. With caches, one for each layer, idx are the tokens that follow those in the caches: any
        number at first, then one at a time.
        """
        x = self.hidden(idx, caches)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, V)
        return logits, loss(logits, targets)

    def hidden(self, idx: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """The last hidden states (B, T, C) of idx (B, T) int64, in autocast's dtype; lm_head makes them logits."""
        seen = caches[0].length if caches else 0
        if seen + idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens are more than the model's block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[seen : seen + idx.size(1)]  # (B, T, C)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x = self.transformer.drop(x).to(dtype)
        for layer, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, caches[layer] if caches else None)
        return self.transformer.ln_f(x).to(dtype)

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; as in nanoGPT, non_embedding leaves out positions and counts the tied matrix once."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups for an optimizer: "matrices" (weights of Linear layers, decayed), "embeddings" (wte, wpe) and
        "scalars" (LayerNorm, biases). They are sorted by name, so the order never changes.

        "split" of the matrices: into how many equal blocks of rows each one falls. It is 3 for the matrix that holds
        query, key and value, else 1.
        """
        named = sorted(self.named_parameters())
        matrices = {name: p for name, p in named if p.dim() > 1 and name not in EMBEDDINGS}
        split = [3 if name.endswith("c_attn.weight") else 1 for name in matrices]
        return [
            {"name": "matrices", "params": list(matrices.values()), "weight_decay": weight_decay, "split": split},
            {"name": "embeddings", "params": [p for name, p in named if name in EMBEDDINGS], "weight_decay": 0.0},
            {"name": "scalars", "params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]

    def flops_per_token(self, block_size: int | None = None) -> int:
        """FLOPs of forward and backward for one token of a sequence: 6N + 12LHQT (PaLM, arXiv:2204.02311, appendix B),
        N = num_params(), H heads of width Q; attention is counted as if it were not causal."""
        T = block_size or self.config.block_size
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        seed: int | None = None, vocab_size: int | None = None, top_p: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue idx (B, T) int64 -> (B, T + max_new_tokens), in eval mode, each token from the last `block_size`.

        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        seed: makes the text reproducible on one device; None: torch's global generator.
        vocab_size: ids from here on (padding) are never drawn.
        top_p: sample among the fewest tokens that together have this probability.

        Until idx and the new tokens are `block_size` long, a token costs one position, thanks to a cache of keys and
        values. From then on it costs `block_size` positions, since every token moves to another learned position.
        """
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, seed, vocab_size, top_p)
        return torch.cat((idx, *tokens), dim=1)

    @torch.no_grad()
    def stream(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        seed: int | None = None, vocab_size: int | None = None, top_p: float | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the tokens of `generate` one by one, (B, 1) each."""
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature must be >= 0 and top_k >= 1, got temperature={temperature}, top_k={top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
        training = self.training
        self.eval()
        block_size, caches = self.config.block_size, [Cache(self.config.block_size) for _ in self.transformer.h]
        new = idx = idx[:, -block_size:]
        try:
            for _ in range(max_new_tokens):
                if idx.size(1) <= block_size:
                    logits, _ = self(new, caches=caches)
                else:
                    idx = idx[:, -block_size:]
                    logits, _ = self(idx)
                new = sample(logits[:, -1, :vocab_size], temperature, top_k, generator, top_p)
                idx = torch.cat((idx, new), dim=1)
                yield new
        finally:
            self.train(training)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None, top_p: float | None = None
) -> Tensor:
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
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)  # likelier ones already have top_p
        # Draw in the vocabulary's order: if rounding swaps the ranks of two tokens, a seed still draws the same one.
        probs = torch.zeros_like(logits).scatter(-1, candidates, probs)
    else:
        probs = logits.softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)
