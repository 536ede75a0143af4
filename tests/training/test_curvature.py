"""Hessian-vector products of the model, forward over reverse, against backward over backward; as one graph; in bf16."""

import pytest
import torch

from model import GPT, GPTConfig
from sophia import hutchinson
from training.curvature import hessian_vector_product


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # away from the start, where much of the Hessian is close to 0
    tokens = torch.randint(64, (4, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    named = dict(model.named_parameters())
    estimates = hutchinson(lambda: model(inputs, targets)[1], named.values(), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in named.items()}
    return model, inputs, targets, vectors, dict(zip(named, estimates, strict=True))


def norm(tensors):
    return torch.nn.utils.get_total_norm(list(tensors))


@pytest.mark.parametrize("compiled", [False, True])
def test_is_what_backward_over_backward_gives(case, compiled):
    model, inputs, targets, vectors, estimates = case
    function = torch.compile(hessian_vector_product, fullgraph=True, backend="aot_eager") if compiled else None
    products = (function or hessian_vector_product)(model, inputs, targets, vectors)
    assert norm(estimates.values()) > 1e-2
    for name, estimate in estimates.items():
        torch.testing.assert_close(products[name] * vectors[name], estimate, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_of_some_parameters(case):
    """With the vectors of the others 0 the whole Hessian gives the same."""
    model, inputs, targets, vectors, _ = case
    some = {name: vector for name, vector in vectors.items() if "mlp" in name}
    whole = {name: vector if name in some else torch.zeros_like(vector) for name, vector in vectors.items()}
    products = hessian_vector_product(model, inputs, targets, some)
    expected = hessian_vector_product(model, inputs, targets, whole)
    assert list(products) == list(some) and norm(products.values()) > 1e-3
    for name, product in products.items():
        torch.testing.assert_close(product, expected[name], rtol=1e-9, atol=1e-12)


def test_under_autocast(case):
    """In float32, and as near to float64 as backward over backward is: 1.7% off."""
    model, inputs, targets, vectors, estimates = case
    narrow = GPT(model.config)
    narrow.load_state_dict(model.state_dict())
    vectors = {name: vector.float() for name, vector in vectors.items()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        products = hessian_vector_product(narrow, inputs, targets, vectors)
    assert all(product.dtype == torch.float32 for product in products.values())
    off = norm([products[name] * vectors[name] - estimate for name, estimate in estimates.items()])
    assert 0 < off < 0.03 * norm(estimates.values())
