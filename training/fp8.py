"""The blocks' Linear layers in FP8 (float8), through torchao. The output matrix is in training/fp8_loss.py.

to_fp8(model, torch.device("cuda"))
"""

import torch

from training.errors import UserError
from training.fp8_loss import ROWS, gradient_errors, is_hopper


def to_fp8(model, device, emulate=False):
    """Replace the Linear layers of the blocks by layers that multiply in FP8, with one scale for each tensor.

    Parameters, their names, gradients and optimizer states stay as they are. Embeddings and norms stay in autocast's
    precision; `fp8_loss` is about the output matrix. `emulate` rounds the same way, slowly, on any device.
    Raises UserError if the device has no FP8 products, or a width of the products is no multiple of 16.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"fp8 needs an NVIDIA GPU with FP8 products (H100, L40S), this is {name}; leave it off.")
    sizes = {name: getattr(model.config, name) for name in ("n_embd", "block_size", "mlp_hidden")}
    sizes["(n_head + 2 n_kv_head) * n_embd / n_head"] = sum(model.config.qkv_rows)
    for name, size in sizes.items():
        if size % 16:
            raise UserError(f"fp8 needs {name} to be a multiple of 16, got {size}; change it, or leave fp8 off.")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model.transformer.h, config=Float8LinearConfig(emulate=emulate))


def check_fp8_tokens(tokens, name="fp8"):
    """Refuse micro-batches of `tokens` (sizes) if one is no multiple of 16. A weight's gradient sums over it."""
    if wrong := [n for n in tokens if n % 16]:
        few = f"{name} needs a multiple of 16 tokens in every micro-batch, one of this run has {wrong[0]}"
        raise UserError(f"{few}; change batch_size, hess_bs or the length of a sequence, or leave {name} off.")


def check_fp8_loss(device, config, tokens):
    """Refuse a device, a model's `config` or sizes of micro-batches (`tokens`) that fp8_loss.py cannot serve."""
    if device.type != "cuda" or not is_hopper(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"fp8_loss needs a Hopper GPU (H100, H200), this is {name}; leave it off.")
    for name in ("n_embd", "vocab_size"):
        if getattr(config, name) % 16:
            size = getattr(config, name)
            raise UserError(f"fp8_loss needs {name} to be a multiple of 16, got {size}; change it, or leave it off.")
    check_fp8_tokens(tokens, "fp8_loss")  # the loss of others would stay in bf16
    if min(tokens) < ROWS:
        few = f"fp8_loss needs {ROWS:,} tokens or more in a micro-batch, the smallest of this run has {min(tokens):,}"
        raise UserError(f"{few}; raise batch_size, or leave fp8_loss off.")
    *errors, bias = gradient_errors(config.n_embd, config.vocab_size, device)
    if not all(error < 0.1 for error in (*errors, 10 * bias)):  # NaN is not below either
        found = " and ".join(f"{error:.2g}" for error in errors)
        raise UserError(f"fp8_loss computes wrong gradients here (relative errors {found}, {bias:.2g} of a sum of "
                        "probabilities), as with some versions of Triton; leave it off.")  # fmt: skip
