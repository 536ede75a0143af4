"""FLOPs: the table of peaks, and a run's count against sums by hand."""

import pytest

from training.config import TrainConfig
from training.flops import peak_flops, run_flops


@pytest.mark.parametrize(
    "name, dtype, teraflops",
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 156),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "float16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peak_flops_are_those_of_the_whole_name(name, dtype, teraflops):
    assert peak_flops(name, dtype) == (teraflops and pytest.approx(teraflops * 1e12))


def settings(**changed):
    values = {"total_bs": 4, "block_size": 8, "hess_bs": 2, "hess_interval": 10, **changed}
    config = TrainConfig()
    vars(config).update(values)
    return config


def cost(length):
    return 100 + length


@pytest.mark.parametrize(
    "changed, estimate_cost, step, expected",
    [
        ({}, 0, 5, 5 * 32 * 108),
        ({}, 1, 20, 20 * 32 * 108 * 1.05),  # half a batch every 10 steps
        ({}, 3, 20, 20 * 32 * 108 * 1.15),
        ({"sophia_start_iter": 15}, 1, 20, 32 * 108 * (15 + 5 * 1.05)),
        ({"sophia_start_iter": 15}, 1, 10, 32 * 108 * 10),
        ({"block_size_schedule": "0:2,6:4,10:8"}, 0, 12, 32 * (6 * 102 + 4 * 104 + 2 * 108)),
        ({"block_size_schedule": "0:2,6:8", "sophia_start_iter": 8}, 1, 9, 32 * (6 * 102 + 2 * 108 + 108 * 1.05)),
    ],
)
def test_a_run_counts_every_pass_and_its_share_of_the_estimates(changed, estimate_cost, step, expected):
    assert run_flops(step, settings(**changed), cost, estimate_cost) == pytest.approx(expected, abs=0.5)
