"""GPT-2 in one file and, by settings, its modern kin: Llama, Qwen3, GPT-NeoX and what lies between them.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).to("cuda")
    logits, loss = model(idx, targets)                       # (B, T) int64 each

Parameters have nanoGPT's names. One difference to nanoGPT: the GELU is by default the tanh approximation that GPT-2 was
trained with (`gelu_new` in Hugging Face), not the exact one, so that OpenAI's weights give OpenAI's logits.
OpenAI's weights and Hugging Face models are read and written by training/hf.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, targets) -> scalar
Rope = tuple[Tensor, Tensor]  # cosines and sines of the angles, (T, 1, rope_dim / 2) each
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")  # the last if it is not wte
CHOICES = {
    "gelu": ("tanh", "exact"), "norm": ("layernorm", "rmsnorm"), "position": ("learned", "rope"),
    "mlp": ("gelu", "swiglu", "relu2"),
}  # fmt: skip
ONLY_WITH = {"gelu": ("mlp", "gelu"), "rope_base": ("position", "rope"), "rope_dim": ("position", "rope")}


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
    norm: str = "layernorm"  # or "rmsnorm" (arXiv:1910.07467)
    norm_eps: float = 1e-5
    position: str = "learned"  # or "rope": queries and keys are rotated by their position (arXiv:2104.09864)
    rope_base: float = 10000.0
    rope_dim: int = 0  # how many coordinates of each head are rotated; 0: all
    n_kv_head: int = 0  # heads of keys and values, each for n_head / n_kv_head queries (arXiv:2305.13245); 0: n_head
    mlp: str = "gelu"  # or "swiglu" (arXiv:2002.05202), "relu2" (arXiv:2109.08668)
    mlp_hidden: int = 0  # 0: 4 n_embd; for swiglu 8/3 n_embd, as many parameters, rounded up to a multiple of 64
    qk_norm: bool = False  # RMSNorm of every query and key, with a gain for each coordinate of a head (as in Qwen3)
    tie_embeddings: bool = True  # one matrix for tokens in and out
    parallel_block: bool = False  # the MLP reads the block's input, as attention does (as in GPT-NeoX)

    def __post_init__(self) -> None:
        """Put the numbers of this model where 0 stands for the default. ValueError for a model that cannot be."""
        self.n_kv_head = self.n_kv_head or self.n_head
        self.mlp_hidden = self.mlp_hidden or (-(-self.n_embd // 24) * 64 if self.mlp == "swiglu" else 4 * self.n_embd)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "mlp_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for larger, smaller in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
            a, b = getattr(self, larger), getattr(self, smaller)
            if a % b:
                numbers = f"got {larger}={a} and {smaller}={b}; change one of them"
                raise ValueError(f"{larger} must be divisible by {smaller}, {numbers}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("norm_eps", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        for name, (other, value) in ONLY_WITH.items():
            if getattr(self, name) != getattr(GPTConfig, name) and getattr(self, other) != value:
                remedy = f"{other}={getattr(self, other)!r} does not use it; leave it out, or set {other}={value!r}"
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: {remedy}")
        if self.position == "rope":
            self.rope_dim, most = self.rope_dim or self.head_dim, self.head_dim
            if self.rope_dim % 2 or not 0 < self.rope_dim <= most:
                limits = f"even and at most n_embd / n_head = {most}"
                raise ValueError(f"rope_dim must be {limits}, got {self.rope_dim}; change it, n_embd or n_head")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value in c_attn."""
        return self.n_embd, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim


class Cache:
    """Keys and values of the last `room` tokens that a layer has seen: a new token costs one position.

    A token beyond `room` takes the place of the oldest one. The order of keys means nothing to a query after them.
    """

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0  # length: of all tokens seen
        self.k, self.v = torch.empty(0), torch.empty(0)  # (B, n_kv_head, room, C/H) from the first tokens on

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens, (B, n_kv_head, T, C/H) each; return keys and values of the last `room`, as views."""
        if not self.length:
            self.k, self.v = (y.new_empty(*y.shape[:2], self.room, y.size(3)) for y in (k, v))
        at, self.length = self.length % self.room, self.length + k.size(2)
        self.k[:, :, at : at + k.size(2)], self.v[:, :, at : at + k.size(2)] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or better. torch's warns in autocast."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(self.weight.dtype)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rope_angles(config: GPTConfig, positions: Tensor) -> Rope:
    """Cosines and sines of position * rope_base^(-2i / R), (T, 1, R/2) each, i < R/2, R = rope_dim. positions (T,)."""
    exponents = torch.arange(0, config.rope_dim, 2, device=positions.device, dtype=positions.dtype) / config.rope_dim
    angles = positions[:, None, None] * (1 / config.rope_base**exponents)  # rounded as in Hugging Face
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs of coordinates (i, i + R/2) of x (B, T, H, C/H); those from R on stay."""
    cos, sin = rope
    a, b, rest = x.split([cos.size(-1), cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.rows, self.head_dim = config.qkv_rows, config.head_dim
        self.c_attn = nn.Linear(config.n_embd, sum(self.rows), bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None for _ in "qk")
        self.resid_dropout = nn.Dropout(config.dropout)
        self.grouped, self.dropout = config.n_kv_head < config.n_head, config.dropout
        self.scale = self.head_dim**-0.5 / (layer_idx + 1 if config.scale_attn_by_inverse_layer_idx else 1)

    def forward(self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None) -> Tensor:
        """x (B, T, C). With a cache: all tokens so far while it is empty, then one token at a time."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.c_attn(x).split(self.rows, dim=2))  # (B, T, H, C/H)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (y.to(v.dtype).transpose(1, 2) for y in (q, k, v))  # (B, H, T, C/H); k, v: n_kv_head for H
        causal = cache is None or not cache.length  # else a single new token, which sees all others
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=self.scale, enable_gqa=self.grouped)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind, hidden = config.mlp, config.mlp_hidden
        self.c_fc = nn.Linear(config.n_embd, (2 if self.kind == "swiglu" else 1) * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.relu(x).square() if self.kind == "relu2" else self.gelu(x)
        return self.dropout(self.c_proj(x))

    def gelu(self, x: Tensor) -> Tensor:
        if self.approximate == "none" or not torch.compiler.is_compiling():
            return F.gelu(x, approximate=self.approximate)
        # The same function, as (1 + tanh(z)) / 2 = sigmoid(2z); it compiles to a faster kernel.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.parallel = config.parallel_block

    def forward(self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None) -> Tensor:  # (B, T, C)
        y = x + self.attn(self.ln_1(x), rope, cache)
        return y + self.mlp(self.ln_2(x if self.parallel else y))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32 or better. logits (B, T, V), targets (B, T) int64, -1 = no label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(dtype), targets.flatten(), ignore_index=-1)


def make_embedding(rows: int, width: int) -> nn.Embedding:
    """Without nn.Embedding's own random weights: to draw them on the meta device, torch imports its compiler first."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class GPT(nn.Module):
    """A model with random weights. Built on the CPU and then moved, a seed gives the same model on every device."""

    transformer: Any  # a type checker does not know a ModuleDict's attributes

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep only each block's input and recompute the rest
        device = torch.get_default_device()
        with torch.device("meta"):  # no memory and no random numbers yet: `init_weights` draws each weight once
            learned = config.position == "learned"
            self.transformer = nn.ModuleDict(dict(
                wte=make_embedding(config.vocab_size, config.n_embd),
                **({"wpe": make_embedding(config.block_size, config.n_embd)} if learned else {}),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config, layer_idx) for layer_idx in range(config.n_layer)]),
                ln_f=make_norm(config),
            ))  # fmt: skip
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.to_empty(device=device)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        else:
            self.lm_head.to_empty(device=device)
        for name, p in self.named_parameters() if device.type != "meta" else ():
            self.init_weight(name, p)

    def init_weight(self, name: str, p: Tensor) -> None:
        """As GPT-2, for every setting: N(0, 0.02^2), biases 0, gains 1. c_proj, which adds to the residual stream, has
        0.02 / sqrt(2 n_layer)."""
        if p.dim() > 1:
            n_added = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
            nn.init.normal_(p, std=0.02 / math.sqrt(n_added))
        else:  # gains of norms, and all biases
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
        seen, T, rope = caches[0].length if caches else 0, idx.size(1), None
        if (T if self.config.position == "rope" else seen + T) > self.config.block_size:
            raise ValueError(f"{seen + T} tokens are more than the model's block_size={self.config.block_size}")
        if seen and T > 1:
            raise ValueError(f"after its first tokens a cache takes one at a time, got {T}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.transformer.wpe.weight[seen : seen + T]
        else:
            exact = torch.promote_types(x.dtype, torch.float32)
            rope = rope_angles(self.config, torch.arange(seen, seen + T, device=x.device, dtype=exact))
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = self.transformer.drop(x).to(dtype)
        for layer, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, caches[layer] if caches else None)
        return self.transformer.ln_f(x).to(dtype)

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters. As in nanoGPT, non_embedding leaves out what multiplies nothing: positions, and the
        matrix of input tokens if it is not the output matrix too."""
        left_out = EMBEDDINGS[int(self.config.tie_embeddings) : 2] if non_embedding else ()
        return sum(p.numel() for name, p in self.named_parameters() if name not in left_out)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups for an optimizer: "matrices" (weights of the blocks' Linear layers, decayed), "embeddings" (wte, wpe,
        lm_head) and "scalars" (norms, biases). They are sorted by name, so the order never changes.

        "split" of the matrices: into how many equal blocks of rows each one falls: 3 for query, key and value, 2 for
        swiglu's gate and values, else 1. With fewer heads of keys than of queries it is a tuple, the rows of each.
        """
        named = sorted(self.named_parameters())
        matrices = {name: p for name, p in named if p.dim() > 1 and name not in EMBEDDINGS}
        rows, gated = self.config.qkv_rows, self.config.mlp == "swiglu"
        blocks = {"c_attn": rows if len(set(rows)) > 1 else 3, "c_fc": 2 if gated else 1, "c_proj": 1}
        split = [blocks[name.split(".")[-2]] for name in matrices]
        return [
            {"name": "matrices", "params": list(matrices.values()), "weight_decay": weight_decay, "split": split},
            {"name": "embeddings", "params": [p for name, p in named if name in EMBEDDINGS], "weight_decay": 0.0},
            {"name": "scalars", "params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]

    def flops_per_token(self, block_size: int | None = None) -> int:
        """FLOPs of forward and backward for one token of a sequence: 6N + 12LHQT (PaLM, arXiv:2204.02311, appendix B),
        N = num_params(), H heads of width Q; attention is counted as if it were not causal. Fewer heads of keys and
        values do not change its products."""
        T = block_size or self.config.block_size
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T
