"""Other ways to compile a run, for `bench.py train --parts start`. A run of train_adam.py with one of them:

python -m benchmarks.compilation ours_blocks --dataset=python --compile=True
"""

import functools
import sys
from unittest import mock

import torch

import train_adam
from model import cross_entropy
from training import step
from training.errors import command


class Blocks(step.ModelLoss):
    """One graph of a block for all layers (regional compilation): the time to compile does not grow with their number.

    What crosses a block's border is not fused: the residual addition with the next norm.
    """

    def __init__(self, model, compiled, sharded, fp8=False):
        super().__init__(model, False, sharded, fp8)
        self._compiled_loss = functools.cache(step.compiler(compiled))
        self._model_loss = lambda inputs, targets, loss: model(inputs, targets, self._compiled_loss(loss))[1]
        for block in model.transformer.h if compiled else ():
            block.compile(**step.compiler(compiled).keywords)


class OneGraph(step.ModelLoss):
    """Evaluation runs the training graph. Only its loss is a graph of its own. Not for dropout."""

    def forward(self, inputs, targets, loss=cross_entropy):
        if torch.is_grad_enabled():
            return super().forward(inputs, targets, loss)
        self.model.train()
        with torch.enable_grad():
            hidden = self._hidden(inputs).detach()
        self.model.eval()
        return self._compiled_loss(loss)(self.model.lm_head(hidden), targets)


def cuda_graphs(on):
    """For one micro-batch a step: with more, a gradient would lie in memory that the next replay overwrites."""
    return functools.partial(torch.compile, dynamic=False, mode="reduce-overhead") if on else lambda function: function


CANDIDATES = {  # what takes the place of what in training/step.py
    "ours": {"ModelLoss": step.ModelLoss},
    "ours_blocks": {"ModelLoss": Blocks},
    "ours_one_graph": {"ModelLoss": OneGraph},
    "ours_cuda_graphs": {"compiler": cuda_graphs},
}


def candidate(name):
    """A context: a run that is made in it compiles in this way."""
    return mock.patch.multiple(step, **CANDIDATES[name])


def main():
    with candidate(sys.argv[1]):
        train_adam.main(sys.argv[2:])


if __name__ == "__main__":
    command(main)
