"""Llama, Qwen3, GPT-NeoX and ReLU^2 by settings: against a float64 reference in plain loops, and in everything that
the default model is used for. Hugging Face's own models are in tests/training/test_hf.py."""

import itertools
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, Cache, GPTConfig, cross_entropy
from sample import generate
from sophia import hutchinson
from tests.test_model import randomize, tokens
from train_adam import AdamConfig
from training import memory
from training.config import load_config
from training.curvature import hessian_vector_product
from training.step import ModelLoss

SHAPE = dict(block_size=16, vocab_size=97, n_layer=2, n_head=4, n_embd=32)
LLAMA = dict(norm="rmsnorm", position="rope", n_kv_head=2, mlp="swiglu")
KINDS = {
    "gpt2": dict(bias=True),
    "llama": LLAMA,
    "qwen3": LLAMA | dict(qk_norm=True, norm_eps=1e-6, rope_base=1e6, tie_embeddings=False, mlp_hidden=40),
    "neox": dict(
        bias=True, position="rope", rope_dim=4, parallel_block=True, tie_embeddings=False, gelu="exact", norm_eps=1e-4
    ),
    "relu2": dict(mlp="relu2", n_kv_head=1, qk_norm=True, scale_attn_by_inverse_layer_idx=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def small(kind, **settings):
    """A model of that kind in float64 whose weights are far from their initialization."""
    return randomize(GPT(GPTConfig(**{**SHAPE, **KINDS[kind], **settings})).double())


def reference(model, idx, window=math.inf):
    """Logits (T, V) of idx (T,) from the weights alone, head by head; RoPE by complex numbers.

    window: how many of the last tokens a query sees in each layer, itself included.
    """
    c, w, T = model.config, model.state_dict(), len(idx)
    kv_heads, width = c.n_kv_head or c.n_head, c.n_embd // c.n_head

    def norm(x, name, rms=c.norm == "rmsnorm"):
        centered = x if rms else x - x.mean(-1, keepdim=True)
        scaled = centered / ((centered**2).mean(-1, keepdim=True) + c.norm_eps) ** 0.5
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def turned(x):
        if c.position != "rope":
            return x
        half = (c.rope_dim or width) // 2
        rows = [[t * c.rope_base ** (-i / half) for i in range(half)] for t in range(T)]
        angles = torch.tensor(rows, dtype=torch.float64)
        z = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag, x[:, 2 * half :]), -1)

    def attention(x, layer):
        name, heads = f"transformer.h.{layer}.attn", []
        q, k, v = linear(x, f"{name}.c_attn").split([c.n_embd, kv_heads * width, kv_heads * width], -1)
        for h in range(c.n_head):
            shared = h * kv_heads // c.n_head
            q_h, k_h, v_h = q.split(width, -1)[h], k.split(width, -1)[shared], v.split(width, -1)[shared]
            if c.qk_norm:
                q_h, k_h = norm(q_h, f"{name}.q_norm", True), norm(k_h, f"{name}.k_norm", True)
            scores = turned(q_h) @ turned(k_h).T / math.sqrt(width)
            if c.scale_attn_by_inverse_layer_idx:
                scores = scores / (layer + 1)
            for i, j in itertools.product(range(T), repeat=2):
                if j > i or i - j >= window:
                    scores[i, j] = -math.inf
            heads.append(scores.softmax(-1) @ v_h)
        return linear(torch.cat(heads, -1), f"{name}.c_proj")

    def mlp(x, layer):
        name = f"transformer.h.{layer}.mlp"
        y = linear(x, f"{name}.c_fc")
        if c.mlp == "swiglu":
            gate, up = y.split(y.shape[-1] // 2, -1)
            y = gate / (1 + torch.exp(-gate)) * up
        elif c.mlp == "relu2":
            y = y.clamp(min=0) ** 2
        elif c.gelu == "exact":
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        else:
            y = y * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return linear(y, f"{name}.c_proj")

    x = w["transformer.wte.weight"][idx]
    if c.position == "learned":
        x = x + w["transformer.wpe.weight"][:T]
    for layer in range(c.n_layer):
        attended = x + attention(norm(x, f"transformer.h.{layer}.ln_1"), layer)
        x = attended + mlp(norm(x if c.parallel_block else attended, f"transformer.h.{layer}.ln_2"), layer)
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@kinds
def test_logits_are_those_of_the_formulas(kind):
    model, idx = small(kind), tokens(16)
    expected = reference(model, idx)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(idx[None], idx[None])[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", [k for k in KINDS["qwen3"] | KINDS["neox"] if k != "bias"] + ["mlp relu2"])
def test_every_setting_changes_the_logits(setting):
    """Else the reference could miss that a setting has no effect."""
    key, _, value = setting.partition(" ")
    kind = next(kind for kind in ("qwen3", "neox", "relu2") if key in KINDS[kind])
    settings = {**SHAPE, **KINDS[kind]}
    other = {**settings, key: value} if value else {k: v for k, v in settings.items() if k != key}
    if key == "position":
        other |= {"rope_base": 1e4, "rope_dim": 0}
    if key == "mlp":
        other["gelu"] = "tanh"
    models = [GPT(GPTConfig(**s)) for s in (settings, other)]
    shared = {k: v for k, v in models[0].state_dict().items() if v.shape == models[1].state_dict().get(k, v[:0]).shape}
    models[1].load_state_dict(shared, strict=False)
    logits = [randomize(model).double()(tokens(1, 16))[0] for model in models]
    assert (logits[0] - logits[1]).abs().max() > 1e-5


def test_the_default_is_gpt2_bit_for_bit():
    """The losses that the model had when it knew GPT-2 only: four steps of SGD from a seed, on torch's CPU kernels."""
    torch.manual_seed(7)
    model = GPT(GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=4, n_embd=32))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1.0), []
    idx = torch.randint(97, (3, 32), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        loss = model(idx, idx.roll(1))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = ["0x1.268e92p+2", "0x1.0690c8p+2", "0x1.d79028p+1", "0x1.9fe5bep+1"]
    assert losses == pytest.approx([float.fromhex(number) for number in expected], abs=1e-6)  # equal on x86


@kinds
def test_compiled_checkpointed_and_in_pieces_it_has_the_same_gradients(kind):
    model, idx, targets = small(kind, n_layer=1).train(), tokens(3, 16), tokens(3, 16, seed=2)
    model(idx, targets)[1].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    def same(loss):
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-7, atol=1e-9, msg=name)

    same(torch.compile(model, fullgraph=True, backend="aot_eager")(idx, targets)[1])
    same(ModelLoss(model, False, False)(idx, targets, cross_entropy))
    model.activation_checkpointing = True
    same(model(idx, targets)[1])


@kinds
def test_bfloat16_autocast_stays_close(kind):
    model, idx = small(kind).float(), tokens(2, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert abs(loss - model(idx, idx)[1]) < 0.05


@kinds
def test_a_model_of_bfloat16_weights_stays_close(kind):
    model, idx = small(kind), tokens(2, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    expected = model(idx, idx)[1].item()
    loss = model.bfloat16()(idx, idx)[1]
    loss.backward()
    assert abs(loss.item() - expected) < 0.05
    generate(model, idx[:, :4], 20)


@pytest.mark.gpu
@kinds
def test_compiled_bfloat16_on_cuda_agrees_with_float32_on_cpu(kind):
    """Also with fewer heads of keys than of queries, for which not every attention kernel is made."""
    model, idx = GPT(GPTConfig(**SHAPE | {"block_size": 128, "n_embd": 256} | KINDS[kind])), tokens(4, 128)
    expected = model(idx, idx)[1].item()
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(model, fullgraph=True)(idx.cuda(), idx.cuda())[1]
    loss.backward()
    assert abs(loss.item() - expected) < 0.01
    assert all(p.grad.isfinite().all() for p in model.parameters())


@kinds
def test_hessian_vector_products(kind):
    model, inputs, targets = small(kind, n_layer=1), tokens(2, 8), tokens(2, 8, seed=2)
    named = dict(model.named_parameters())
    estimates = hutchinson(lambda: model(inputs, targets)[1], named.values(), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in named.items()}
    products = hessian_vector_product(model, inputs, targets, vectors)
    for (name, product), estimate in zip(products.items(), estimates, strict=True):
        torch.testing.assert_close(product * vectors[name], estimate, rtol=1e-6, atol=1e-8)


# ----- text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].get("position") == "rope"])
@pytest.mark.parametrize("length", [1, 9, 16, 30])
def test_with_rope_a_token_sees_the_last_block_size_tokens_and_costs_one_position(kind, length, monkeypatch):
    """A sliding window over the cache, against one pass over all tokens in which each sees a window of block_size."""
    model, idx, positions, forward = small(kind), tokens(1, length), [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda m, x, **more: positions.append(x.size(1)) or forward(m, x, **more))
    text = generate(model, idx, 24, temperature=0)[0]
    assert positions == [min(length, 16)] + [1] * 23
    seen = text[max(0, length - 16) :]
    expected = reference(model, seen[:-1], window=16).argmax(-1)
    assert torch.equal(seen[min(length, 16) :], expected[min(length, 16) - 1 :])
    assert not torch.equal(expected, reference(model, seen[:-1]).argmax(-1)), "the window has to matter"


def test_rope_reads_no_more_than_block_size_at_once():
    with pytest.raises(ValueError, match="17 tokens are more than the model's block_size=16"):
        small("llama")(tokens(1, 17))


@kinds
def test_a_cache_takes_one_token_at_a_time_after_the_first(kind):
    """Two would see each other, and what comes after them."""
    model = small(kind)
    caches = [Cache(16) for _ in range(2)]
    model(tokens(1, 3), caches=caches)
    with pytest.raises(ValueError, match="takes one at a time, got 2"):
        model(tokens(1, 2), caches=caches)


# ----- counting


def test_parameters_and_flops_by_hand():
    """n_layer 6, n_embd 384, n_head 6, n_kv_head 2, SwiGLU: as config/train_llama_30m_adam.py has it."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, **LLAMA))
        untied = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, tie_embeddings=False, **LLAMA))
    # a block: 384 * (384 + 128 + 128) + 384^2 + 384 * 2 * 1024 + 1024 * 384 + 2 * 384 = 1,573,632
    n = 6 * 1_573_632 + 50304 * 384 + 384
    assert (model.num_params(), model.num_params(non_embedding=False)) == (n, n)
    assert (untied.num_params(), untied.num_params(non_embedding=False)) == (n, n + 50304 * 384)
    assert model.flops_per_token(512) == untied.flops_per_token(512) == 6 * n + 12 * 6 * 384 * 512


@pytest.mark.parametrize("n_embd, mlp, hidden", [(384, "swiglu", 1024), (400, "swiglu", 1088), (384, "relu2", 1536)])
def test_the_hidden_width_has_as_many_parameters_as_gpt2s(n_embd, mlp, hidden):
    assert GPTConfig(n_embd=n_embd, n_head=4, mlp=mlp).mlp_hidden == hidden
    assert GPTConfig(n_embd=n_embd, n_head=4, mlp=mlp, mlp_hidden=100).mlp_hidden == 100


@kinds
def test_flops_per_token_is_what_torch_counts(kind):
    """All products exactly. N counts norms and biases too, which have none."""
    model, idx = small(kind), tokens(2, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
        model(idx, idx)[1].backward()
    without_products = 6 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() == idx.numel() * (model.flops_per_token() - without_products)


def test_the_formula_for_memory_takes_each_block_of_a_fused_matrix_as_one():
    """Whitening factors of a Llama-like layer: query, two of n_kv_head, c_proj, gate, values, and the MLP's c_proj."""
    small = [f"--{key}={value}" for key, value in (SHAPE | LLAMA | {"mlp_hidden": 48}).items() if key != "vocab_size"]
    config = load_config(AdamConfig, [*small, "--optimizer_name=whitened_muon"])
    shapes = 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    matrices = sum(rows * columns for rows, columns in shapes)
    parameters = matrices + 97 * 32 + 5 * 32
    assert memory.sizes(config, 97) == (parameters, matrices)
    factors = sum(rows**2 + columns**2 for rows, columns in shapes)
    assert memory.state_bytes(config, 1, 97) == 16 * parameters - 4 * matrices + 6 * factors


@pytest.mark.parametrize(
    "kind, qkv, fc", [("gpt2", 3, 1), ("llama", (32, 16, 16), 2), ("neox", 3, 1), ("relu2", (32, 8, 8), 1)]
)
def test_parameter_groups_name_the_blocks_of_rows(kind, qkv, fc):
    model = small(kind)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in model.parameter_groups(0.1)}
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert set(groups["embeddings"]) == embeddings & set(names.values())
    assert all(p.dim() == 1 for p in model.parameter_groups(0.1)[2]["params"])
    assert [name.split(".")[-2] for name in groups["matrices"]] == ["c_attn", "c_proj", "c_fc", "c_proj"] * 2
    assert model.parameter_groups(0.1)[0]["split"] == [qkv, 1, fc, 1] * 2


# ----- initialization and refusals


@kinds
def test_initial_weights_are_as_gpt2s(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | {"n_embd": 256, "vocab_size": 512} | KINDS[kind]))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (not name.endswith("bias"))).all(), name
        else:
            std = 0.01 if "c_proj" in name else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert p.std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(norm="batchnorm"), "norm must be 'layernorm' or 'rmsnorm', got 'batchnorm'"),
        (dict(position="alibi"), "position must be 'learned' or 'rope'"),
        (dict(mlp="relu"), "mlp must be 'gelu' or 'swiglu' or 'relu2', got 'relu'"),
        (dict(n_kv_head=3), "n_head must be divisible by n_kv_head, got n_head=4 and n_kv_head=3; change one"),
        (dict(n_kv_head=-1), "n_kv_head must be at least 1, got -1"),
        (dict(n_kv_head=8), "n_head must be divisible by n_kv_head"),
        (dict(mlp_hidden=-4), "mlp_hidden must be at least 1"),
        (dict(position="rope", rope_dim=3), "rope_dim must be even and at most n_embd / n_head = 8, got 3"),
        (dict(position="rope", rope_dim=10), "rope_dim must be even and at most n_embd / n_head = 8, got 10"),
        (dict(position="rope", n_embd=20), "rope_dim must be even .* = 5, got 5; change it, n_embd or n_head"),
        (dict(position="rope", rope_base=0.0), "rope_base must be above 0"),
        (dict(norm_eps=math.inf), "norm_eps must be above 0 and finite"),
        (dict(rope_dim=4), "rope_dim=4 has no effect: position='learned' does not use it; leave it out, or set"),
        (dict(rope_base=1e6), "rope_base=1000000.0 has no effect"),
        (dict(mlp="swiglu", gelu="exact"), "gelu='exact' has no effect: mlp='swiglu' does not use it"),
    ],
)
def test_models_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SHAPE, **settings})
