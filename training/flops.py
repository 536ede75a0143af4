"""FLOPs that a run has computed, and the peak FLOP/s of its device.

flops = run_flops(step, config, model.flops_per_token, estimate_cost=1)    # of the steps before `step`
peak = peak_flops(torch.cuda.get_device_name(), "bfloat16")                # FLOP/s
"""

import math
import re

from training.schedule import stages

# Dense tensor-core peaks in TFLOP/s: (bfloat16 and float16, TF32), from NVIDIA's datasheets and whitepapers, with sums
# in float32 as PyTorch takes them; half of what a datasheet gives with 2:4 sparsity. A pattern matches the whole name:
# "A10" is neither A100 nor A10G. A laptop's RTX 4090 and a slice of a GPU (MIG) are not in the table.
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

# FLOPs of a curvature estimate over those of a training gradient on as many tokens. A sampled-label gradient costs as
# much. A Hessian-vector product differentiates the backward pass, twice the forward's work, forward: three times.
ESTIMATE_COST = {None: 0, "labels": 1, "hutchinson": 3}


def peak_flops(device_name, dtype):
    """Peak FLOP/s of a device, named as `torch.cuda.get_device_name()` does, in "bfloat16", "float16" or "float32".

    None for a device that is not in the table: then there is no MFU rather than a guess. "float32" is TF32, which has
    to be switched on.
    """
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device_name)
    for pattern, (half, tf32) in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            peak = half if dtype == "float16" or (dtype == "bfloat16" and tf32) else tf32
            return peak and peak * 1e12
    return None


def run_flops(step, config, flops_per_token, estimate_cost=0):
    """FLOPs of the steps before `step`: forward and backward passes and curvature estimates, not the optimizer's own.

    flops_per_token: sequence length -> FLOPs of forward and backward for one token (`GPT.flops_per_token`).
    estimate_cost: of ESTIMATE_COST. Estimates are taken on hess_bs sequences every hess_interval steps, from
    sophia_start_iter on; each step carries its share of them.
    """
    lengths = dict(stages(config))
    first_estimate = getattr(config, "sophia_start_iter", 0)
    share = config.hess_bs / config.total_bs / config.hess_interval if estimate_cost else 0.0
    starts, total, length = sorted({0, first_estimate, *lengths}), 0, None
    for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
        length = lengths.get(start, length)
        cost = flops_per_token(length) * (1 + (estimate_cost * share if start >= first_estimate else 0.0))
        total += max(0, min(step, end) - start) * config.total_bs * config.block_size * cost
    return round(total)
