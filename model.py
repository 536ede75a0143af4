"""GPT-2 in one file: learned positions, pre-LayerNorm, tied embedding, and its weights from and to Hugging Face.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384)).to("cuda")
    logits, loss = model(idx, targets)                       # (B, T) int64 each
    model = GPT.from_pretrained("gpt2")                      # OpenAI's weights; model.to_hf().save_pretrained("gpt2")

Parameters have nanoGPT's names. One difference to nanoGPT: the GELU is by default the tanh approximation that GPT-2 was
trained with (`gelu_new` in Hugging Face), not the exact one, so that OpenAI's weights give OpenAI's logits.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face keeps these transposed, (in, out)


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

    def __post_init__(self):
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
    """The keys and values of the tokens that a layer has seen, at most `room`: the next token costs one position."""

    def __init__(self, room):
        self.room, self.length, self.k, self.v = room, 0, None, None

    def append(self, k, v):
        """Those of T more tokens, (B, H, T, C/H) each -> those of all tokens so far, views of the cache."""
        if self.k is None:
            self.k, self.v = (y.new_empty(*y.shape[:2], self.room, y.size(3)) for y in (k, v))
        seen, self.length = self.length, self.length + k.size(2)
        self.k[:, :, seen : self.length], self.v[:, :, seen : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def forward(self, x, cache=None):  # (B, T, C); with a cache: all tokens when it is empty, then one at a time
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))  # (B, H, T, C/H)
        causal = True
        if cache is not None:
            k, v = cache.append(k, v)
            causal = k.size(2) == T  # a last token alone sees all
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))

    def gelu(self, x):
        if self.approximate == "none" or not torch.compiler.is_compiling():
            return F.gelu(x, approximate=self.approximate)
        y = x.to(
            torch.promote_types(x.dtype, torch.float32)
        )  # the same function, (1 + tanh(z)) / 2 = sigmoid(2z), which compiles to a faster kernel
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):  # (B, T, C)
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(logits, targets):
    """Mean cross-entropy in nats, in float32 or better. logits (B, T, V), targets (B, T) int64, -1 = no label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(dtype), targets.flatten(), ignore_index=-1)


class GPT(nn.Module):
    """GPT-2 with random weights. Build it on the CPU, then move it: so a seed gives the same model on every device."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep only each block's input, and compute the rest again
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

    def init_weights(self):
        """GPT-2's: N(0, 0.02^2), 1/sqrt(2 n_layer) of that for what is added to the residual stream, biases 0."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                n_added = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n_added))
            else:  # LayerNorm weights and all biases
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)

    def forward(self, idx, targets=None, loss=cross_entropy, caches=None):
        """idx (B, T) int64 -> (logits of the last position (B, 1, V), None), or with targets
        (logits (B, T, V), loss(logits, targets)). `loss` is any function that returns a scalar. With `caches`, one
        `Cache` a layer, idx are the tokens that follow those in them: any number at first, then one at a time."""
        x = self.hidden(idx, caches)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, V)
        return logits, loss(logits, targets)

    def hidden(self, idx, caches=None):
        """idx (B, T) int64 -> what the output matrix is multiplied with, (B, T, C), in autocast's dtype."""
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

    def num_params(self, non_embedding=True):
        """Number of parameters; as nanoGPT counts them, without position embeddings (the tied matrix counts once)."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def parameter_groups(self, weight_decay):
        """Groups for an optimizer: "matrices" (weights of Linear layers, decayed), "embeddings" (wte, which is also
        the output matrix, and wpe) and "vectors" (LayerNorm, biases). Sorted by name, so the order never changes."""
        groups = {"matrices": [], "embeddings": [], "vectors": []}
        for name, p in sorted(self.named_parameters()):
            embedding = name in ("transformer.wte.weight", "transformer.wpe.weight")
            groups["embeddings" if embedding else "matrices" if p.dim() > 1 else "vectors"].append(p)
        decay = {"matrices": weight_decay, "embeddings": 0.0, "vectors": 0.0}
        return [{"name": name, "params": groups[name], "weight_decay": decay[name]} for name in groups]

    def flops_per_token(self, block_size=None):
        """FLOPs of forward and backward for one token of a sequence: 6N + 12 L H Q T (PaLM, arXiv:2204.02311, app. B),
        N = num_params(), H heads of width Q; attention is counted as if it were not causal."""
        T = block_size or self.config.block_size
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, vocab_size=None, top_p=None):
        """Continue idx (B, T) int64 -> (B, T + max_new_tokens), each token from the last `block_size`, in eval mode.
        `temperature` 0 takes the likeliest token, `top_k` samples among the k likeliest, `top_p` among the fewest that
        together have this probability, `seed` makes the text reproducible on a device (None: torch's global
        generator), ids from `vocab_size` on (padding) never come.

        A token costs one position, from a cache of keys and values, until idx and the new tokens are `block_size` long;
        from then on it costs `block_size` positions: all tokens move to other learned positions each time."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, seed, vocab_size, top_p)
        return torch.cat((idx, *tokens), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, vocab_size=None, top_p=None):
        """Yield the tokens of `generate`, (B, 1) each, as they come."""
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

    def crop_block_size(self, block_size):
        """Forget the positions from block_size on, to go on with shorter sequences."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size can be cropped to 1..{self.config.block_size}, got {block_size}")
        self.config = replace(self.config, block_size=block_size)
        kept = self.transformer.wpe.weight.detach()[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    @classmethod
    def from_pretrained(cls, model_type, dropout=0.0):
        """OpenAI's weights by name; downloaded by transformers at the first use, then from its cache."""
        sizes = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        if model_type not in sizes:
            raise ValueError(f"no pretrained model is called {model_type!r}, choose one of {', '.join(sizes)}")
        from transformers import GPT2LMHeadModel

        try:
            return cls.from_hf(GPT2LMHeadModel.from_pretrained(model_type), dropout)
        except OSError as error:
            missing = f"the weights of {model_type} are neither in Hugging Face's cache (HF_HOME) nor downloadable now"
            raise ValueError(f"{missing}: run this once with access to huggingface.co") from error

    @classmethod
    def from_hf(cls, hf_model, dropout=0.0):
        """A float32 copy of a `transformers.GPT2LMHeadModel`. ValueError names a setting that GPT does not have."""
        from transformers import GPT2LMHeadModel

        if not isinstance(hf_model, GPT2LMHeadModel):
            raise ValueError(f"from_hf takes a GPT2LMHeadModel, got a {type(hf_model).__name__}")
        hf = hf_model.config
        for name, allowed in dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu"),  # the first two are one function
            n_inner=(None, 4 * hf.n_embd), layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,),
            add_cross_attention=(False,), reorder_and_upcast_attn=(False,), tie_word_embeddings=(True,),
        ).items():  # fmt: skip
            if getattr(hf, name) not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise ValueError(f"the Hugging Face model has {name}={getattr(hf, name)!r}, GPT can only be {expected}")
        shape = (hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd)
        gelu = "exact" if hf.activation_function == "gelu" else "tanh"
        with torch.device("meta"):
            model = cls(GPTConfig(*shape, dropout, True, hf.scale_attn_by_inverse_layer_idx, gelu))
        weights = {k: v.t() if k.endswith(CONV1D) else v for k, v in hf_model.state_dict().items()}
        return assign(model, weights, torch.float32)

    def to_hf(self, vocab_size=None):
        """A copy as `transformers.GPT2LMHeadModel`, in eval mode. `vocab_size` cuts the rows that pad the vocabulary
        (50257 for GPT-2's tokenizer); without it they stay. A model without biases gets zeros: the same function."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = self.config
        vocab_size = vocab_size or config.vocab_size
        if vocab_size > config.vocab_size:
            raise ValueError(f"vocab_size={vocab_size} is more than the {config.vocab_size} tokens of the model")
        end_of_text = 50256 if vocab_size > 50256 else None  # GPT-2's; other vocabularies have none
        with torch.device("meta"):
            hf_model = GPT2LMHeadModel(GPT2Config(
                vocab_size=vocab_size, n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head,
                n_embd=config.n_embd, scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
                activation_function="gelu" if config.gelu == "exact" else "gelu_new",
                resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
                bos_token_id=end_of_text, eos_token_id=end_of_text,
            ))  # fmt: skip
        weights = self.state_dict()
        for name, like in hf_model.state_dict().items():
            if name.endswith(".bias") and not config.bias:
                weights[name] = torch.zeros(like.shape, device=self.lm_head.weight.device)
            elif name.endswith(CONV1D):
                weights[name] = weights[name].t()
        weights["transformer.wte.weight"] = weights["lm_head.weight"] = weights["lm_head.weight"][:vocab_size]
        return assign(hf_model, weights, self.lm_head.weight.dtype).eval()


def sample(logits, temperature, top_k, generator, top_p=None):
    """One token (B, 1) for each row of logits (B, V): by temperature, then top_k, then top_p."""
    if temperature < torch.finfo(torch.float32).tiny:  # 0, or what float32 takes for it
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no small temperature overflows
    if top_k is not None or top_p is not None:
        k = logits.size(-1) if top_k is None else min(top_k, logits.size(-1))
        best, candidates = logits.topk(k)  # (B, k) each, likeliest first
        probs = best.softmax(dim=-1)
        if top_p is not None:
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)  # what likelier ones already make up
        # Drawn in the vocabulary's order: two tokens so close that rounding swaps their ranks do not swap their luck.
        probs = torch.zeros_like(logits).scatter(-1, candidates, probs)
    else:
        probs = logits.softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)


def assign(model, weights, dtype):
    """Give a model that was built on the meta device copies of `weights`, and tie its output matrix."""
    copies = {k: v.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for k, v in weights.items()}
    model.load_state_dict(copies, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


# Dense tensor-core peaks in TFLOP/s: (bfloat16 and float16, TF32), from NVIDIA's datasheets and whitepapers, with sums
# in float32 as PyTorch takes them; half of what a datasheet gives with 2:4 sparsity. A pattern matches the whole name:
# "A10" is neither A100 nor A10G, and a laptop's RTX 4090 or a slice of a GPU (MIG) is not in the table.
PEAK_TFLOPS = {
    r"B200": (2250, 1125),
    r"H200|H100 \d+GB HBM3|GH200 \d+GB": (989.4, 494.7),
    r"H200 NVL|H100 NVL": (835.5, 417.5),
    r"H100 PCIe": (756.5, 378),
    r"A100-(SXM4|SXM|PCIE)-[48]0GB|A100 80GB PCIe": (312, 156),
    r"A10": (125, 62.5),
    r"L40S": (362, 183),
    r"L4": (121, 60),
    r"RTX A6000": (154.8, 77.4),
    r"RTX 6000 Ada Generation": (364.2, 182.1),
    r"GeForce RTX 5090": (209.5, 104.8),
    r"GeForce RTX 4090": (165.2, 82.6),
    r"GeForce RTX 3090": (71.2, 35.6),
    r"V100-SXM2-\d+GB": (125, None),  # before Ampere: neither TF32 nor bfloat16
    r"V100-PCIE-\d+GB": (112, None),
    r"T4": (65, None),
}


def peak_flops(device_name, dtype):
    """Peak FLOP/s of a device, by `torch.cuda.get_device_name()`, in "bfloat16", "float16" or "float32"; None where the
    table has none: then there is no MFU, rather than a guess. "float32" is TF32, which has to be switched on."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device_name)
    for pattern, (half, tf32) in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            peak = half if dtype == "float16" or (dtype == "bfloat16" and tf32) else tf32
            return peak and peak * 1e12
    return None
