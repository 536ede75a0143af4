"""The Linear layers of a model in FP8 (float8), through torchao: on an H100 or newer their products are twice as fast.

to_fp8(model, torch.device("cuda"))
"""

import torch

from training.errors import UserError


def to_fp8(model, device, emulate=False):
    """Replace the Linear layers of the blocks by ones that multiply in FP8, scaled tensor by tensor.

    Parameters, their names, gradients and the optimizer's states stay as they are; the output matrix, the embeddings
    and the LayerNorms stay in autocast's precision. With `emulate` it runs anywhere, slowly, with the same rounding.
    Raises UserError where the device has no FP8 products, torchao is missing, or width or length is no multiple of 16.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"fp8 needs an NVIDIA GPU with FP8 products (H100, L40S), this is {name}; leave it off.")
    for name in ("n_embd", "block_size"):  # over one the products sum forward, over the other in a weight's gradient
        if (size := getattr(model.config, name)) % 16:
            raise UserError(f"fp8 needs {name} to be a multiple of 16, got {size}.")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("fp8 needs a package: pip install torchao.") from None
    convert_to_float8_training(model.transformer.h, config=Float8LinearConfig(emulate=emulate))
