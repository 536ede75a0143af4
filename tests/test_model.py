"""model.py against numbers counted by hand, PyTorch's own counts and what sampling must do."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, MLP, GPTConfig, cross_entropy
from sample import draw, generate

SMALL = dict(block_size=32, vocab_size=97, n_layer=3, n_head=4, n_embd=32)
SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


def randomize(model):
    """Weights far from their initialization, biases included, so that every one of them moves the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = re.search(r"ln_|norm", name) and name.endswith("weight")
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (1 if gain else 0))
    return model.eval()


def small_gpt(**settings):
    return randomize(GPT(GPTConfig(**{**SMALL, **settings})))


def tokens(*shape, vocab_size=97, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ----- forward and loss


def test_state_dict_has_the_names_of_nanogpt():
    names = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        names |= {f"transformer.h.0.{layer}.weight", f"transformer.h.0.{layer}.bias"}
    names |= {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert set(small_gpt(n_layer=1, bias=True).state_dict()) == names
    assert set(small_gpt(n_layer=1).state_dict()) == {n for n in names if n.endswith("weight")}


@pytest.mark.parametrize("position", [0, 10, 31])
def test_a_token_changes_no_earlier_logits(position):
    model, idx = small_gpt(), tokens(1, 32)
    changed = idx.clone()
    changed[0, position] = (idx[0, position] + 1) % 97
    difference = (model(idx, idx)[0] - model(changed, idx)[0]).abs().amax(dim=-1)[0]  # (T,)
    assert difference[:position].sum() == 0
    assert (difference[position:] > 1e-3).all()


def test_no_t_by_t_matrix_is_kept_for_backward():
    model, shapes = small_gpt(block_size=96).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        model(tokens(2, 96), tokens(2, 96))
    assert any(96 in shape for shape in shapes)
    assert not any(list(shape).count(96) > 1 for shape in shapes)


def test_cross_entropy_skips_minus_one_and_is_exact_for_bfloat16():
    logits, targets = torch.randn(2, 8, 97, dtype=torch.float64), tokens(2, 8)
    targets[0, :5] = -1
    by_hand = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets >= 0].mean()
    torch.testing.assert_close(cross_entropy(logits, targets), by_hand, rtol=1e-12, atol=0)
    rounded = logits.bfloat16()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(rounded, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), cross_entropy(rounded.double(), targets), rtol=1e-6, atol=0)


def test_any_loss_of_logits_and_targets():
    model, idx, uniforms = small_gpt(), tokens(2, 32), torch.rand(2, 32)

    def sampled_label_loss(logits, u):
        labels = (logits.detach().softmax(-1).cumsum(-1) < u[..., None]).sum(-1).clamp(max=logits.size(-1) - 1)
        return cross_entropy(logits, labels)

    logits, loss = model(idx, uniforms, loss=sampled_label_loss)
    torch.testing.assert_close(loss, sampled_label_loss(logits, uniforms))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(idx, uniforms, loss=sampled_label_loss)[1], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1], rtol=1e-5, atol=0)


def test_bfloat16_autocast_gives_bfloat16_logits_and_a_float32_loss():
    model, idx = GPT(GPTConfig(**SMALL)), tokens(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert abs(loss - model(idx, idx)[1]) < 0.01
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_compiled_bfloat16_on_cuda_agrees_with_float32_on_cpu():
    model, idx = GPT(GPTConfig(**{**SMALL, "n_embd": 64})), tokens(4, 32)
    expected = model(idx, idx)[1].item()
    compiled = torch.compile(model.cuda(), fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = compiled(idx.cuda(), idx.cuda())[1]
    loss.backward()
    assert abs(loss.item() - expected) < 0.01


def test_too_many_tokens():
    with pytest.raises(ValueError, match="33 tokens are more than the model's block_size=32"):
        small_gpt()(tokens(1, 33))


# ----- initialization


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=5000, n_layer=4, n_head=4, n_embd=128))
    _, loss = model(tokens(8, 64, vocab_size=5000), tokens(8, 64, vocab_size=5000, seed=2))
    assert abs(loss.item() - math.log(5000)) < 0.1


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=128, bias=True))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == ("ln_" in name and name.endswith("weight"))).all(), name
        else:
            std = 0.005 if "c_proj" in name else 0.02  # 0.02 / sqrt(2 * 8 layers)
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name
    torch.manual_seed(0)
    again = GPT(model.config).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_embd=30), "n_embd must be divisible by n_head, got n_embd=30 and n_head=4"),
        (dict(n_layer=0), "n_layer must be at least 1, got 0"),
        (dict(vocab_size=-1), "vocab_size must be at least 1, got -1"),
        (dict(dropout=1.0), "dropout must be in .* got 1.0"),
    ],
)
def test_impossible_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **settings})


# ----- counting


@pytest.mark.parametrize(
    "size, params",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameter_counts_of_the_released_models(size, params):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, bias=True, **SIZES[size]))
    assert model.num_params(non_embedding=False) == params
    assert model.num_params() == params - 1024 * SIZES[size]["n_embd"]


def test_flops_per_token_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    # a layer: 768*2304 + 768*768 + 2*768*3072 + 2*768 = 7,079,424; with wte 50304*768 and ln_f: N = 123,587,328
    assert model.num_params() == 123_587_328
    assert model.flops_per_token() == 741_523_968 + 113_246_208  # 6N + 12 * 12 layers * 768 * 1024
    assert model.flops_per_token(512) == 741_523_968 + 56_623_104


def test_flops_per_token_is_what_torch_counts():
    model = GPT(GPTConfig(block_size=16, vocab_size=512, n_layer=2, n_head=2, n_embd=128))
    idx = tokens(2, 16, vocab_size=512)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() / idx.numel() == pytest.approx(model.flops_per_token(), rel=0.02)


@pytest.mark.parametrize("bias", [False, True])
def test_parameter_groups_hold_every_parameter_once(bias):
    model = small_gpt(bias=bias)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in model.parameter_groups(0.1)}
    assert [g["weight_decay"] for g in model.parameter_groups(0.1)] == [0.1, 0.0, 0.0]
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    assert groups["embeddings"] == ["transformer.wpe.weight", "transformer.wte.weight"]
    assert len(groups["matrices"]) == 4 * 3 and groups["matrices"][0] == "transformer.h.0.attn.c_attn.weight"
    assert all(("ln_" in name) or name.endswith("bias") for name in groups["scalars"])
    assert all(group == sorted(group) for group in groups.values())
    split = model.parameter_groups(0.1)[0]["split"]
    assert split == [3 if name.endswith("attn.c_attn.weight") else 1 for name in groups["matrices"]]


# ----- text


def greedy(model, idx, n):
    for _ in range(n):
        logits, _ = model(idx[:, -32:], idx[:, -32:])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize(
    "settings", [dict(temperature=0), dict(temperature=1e-30), dict(temperature=1e-252), dict(top_k=1, temperature=5.0)]
)
@pytest.mark.parametrize("prompt_length", [1, 40])  # 40 is longer than block_size
def test_the_limits_of_sampling_are_greedy(settings, prompt_length):
    model, idx = small_gpt(), tokens(3, prompt_length)
    assert torch.equal(generate(model, idx, 8, **settings), greedy(model, idx, 8))


def test_a_seed_makes_text_reproducible():
    model, idx = small_gpt(), tokens(2, 4)
    state = torch.get_rng_state()
    first, again, other = (generate(model, idx, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()), "a seed must leave torch's global generator alone"
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (2, 24) and torch.equal(first[:, :4], idx)


def test_generate_turns_dropout_off_and_the_mode_back_on():
    model, idx = small_gpt(dropout=0.5), tokens(2, 4)
    expected = generate(model, idx, 10, seed=1)
    assert not model.training
    assert torch.equal(generate(model.train(), idx, 10, seed=1), expected)
    assert model.training


@pytest.mark.parametrize("top_k", [None, 3, 1000])
def test_sampled_frequencies(top_k):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    drawn = draw(logits.expand(40_000, -1), 0.7, top_k, torch.Generator().manual_seed(0))
    kept = logits if top_k != 3 else torch.where(logits >= 0.5, logits, -torch.inf)
    frequencies = drawn.flatten().bincount(minlength=5) / 40_000
    torch.testing.assert_close(frequencies, F.softmax(kept / 0.7, dim=0), atol=0.01, rtol=0)


@pytest.mark.parametrize("settings", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_impossible_sampling(settings):
    with pytest.raises(ValueError, match=r"temperature must be >= 0 and top_k >= 1|top_p must be above 0"):
        generate(small_gpt(), tokens(1, 1), 1, **settings)


def test_activation_checkpointing_keeps_one_tensor_a_block():
    model = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=6, n_head=2, n_embd=32))
    idx = torch.randint(50, (4, 64))
    kept = {}
    for model.activation_checkpointing in (False, True):
        saved = []

        def pack(tensor, saved=saved):
            if tensor.dim() > 1 and not isinstance(tensor, torch.nn.Parameter):
                saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx, idx)
        kept[model.activation_checkpointing] = sum(saved)
    assert kept[True] < 0.2 * kept[False]


def test_compiled_gelu_is_the_same_function():
    mlp = MLP(GPTConfig(n_head=2, n_embd=16)).double()
    x = torch.randn(4, 16, dtype=torch.float64) * 3
    torch.testing.assert_close(torch.compile(mlp, backend="eager")(x), mlp(x), rtol=1e-12, atol=1e-14)
