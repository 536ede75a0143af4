"""What a run on a GPU finds out before its first step: where compiled code is kept, and the kernel that attention has.

keep_compiled_code(device)                        # before anything is compiled
print(attention_line(model.config, torch.bfloat16, device))
"""

import os
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from training.fp8_loss import is_hopper
from training.lock import fcntl

KERNELS = {
    "CUDNN_ATTENTION": "cuDNN", "FLASH_ATTENTION": "FlashAttention-2", "EFFICIENT_ATTENTION": "memory-efficient",
    "MATH": "plain products, which are slow and keep block_size^2 numbers for each head",
}  # fmt: skip
PREFERRED = 91501  # the cuDNN whose attention torch (2.10 to 2.13) prefers on Hopper, 9.15.1
COST = "a step's attention took 41 ms with FlashAttention-2 and 25 ms with cuDNN (355M, 32 x 1024 tokens, bf16, H200)"


def keep_compiled_code(device):
    """Let torch.compile keep its code in the user's cache folder. Its default, in /tmp, goes with a reboot or a job.

    TORCHINDUCTOR_CACHE_DIR has precedence. A folder that is full, read-only or without file locks is not used. Code for
    a CPU stays in /tmp: it is for this very processor, and machines with others may share the user's folder.
    """
    if device.type != "cuda" or fcntl is None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(1 << 16))  # an empty file fits on a full disk
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def attention_line(config, dtype, device):
    """A line that names the kernel of training's attention for a model of GPTConfig `config`.

    It asks the function that F.scaled_dot_product_attention asks: torch's order of preference, as Python sees it, is
    another before the first attention. Where torch does not answer, the line says so.
    """
    try:
        x = torch.empty(1, config.block_size, sum(config.qkv_rows), dtype=dtype, device=device, requires_grad=True)
        q, k, v = (y.unflatten(2, (-1, config.head_dim)).transpose(1, 2) for y in x.split(config.qkv_rows, dim=2))
        grouped = config.n_kv_head < config.n_head
        kind = torch._fused_sdp_choice(q, k, v, dropout_p=config.dropout, is_causal=True, enable_gqa=grouped)
        kernel, version = KERNELS[SDPBackend(kind).name], torch.backends.cudnn.version() or 0
        if kernel == "FlashAttention-2" and is_hopper(device):
            old = f" (torch prefers cuDNN from {PREFERRED} on, this is {version})" if version < PREFERRED else ""
            kernel += f"{old}; {COST}"
        return f"attention: {kernel}"
    except Exception as error:  # a private function of torch; no run ends by it
        return f"attention: unknown ({type(error).__name__})"
