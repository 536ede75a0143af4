"""Other ways to compile a run, for `bench.py train --parts start`. A run of train_adam.py with one of them:

python -m benchmarks.compilation ours_cuda_graphs --dataset=python --compile=True
"""

import functools
import sys
from unittest import mock

import torch

import train_adam
from training import step
from training.errors import command


def cuda_graphs(on):
    """For one micro-batch a step: with more, a gradient would lie in memory that the next replay overwrites."""
    return functools.partial(torch.compile, dynamic=False, mode="reduce-overhead") if on else lambda function: function


CANDIDATES = {"ours": step.compiler, "ours_cuda_graphs": cuda_graphs}


def candidate(name):
    """A context: a run that is made in it compiles in this way."""
    return mock.patch.object(step, "compiler", CANDIDATES[name])


def main():
    with candidate(sys.argv[1]):
        train_adam.main(sys.argv[2:])


if __name__ == "__main__":
    command(main)
