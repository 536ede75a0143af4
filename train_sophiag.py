"""Pre-train GPT-2 with Sophia (arXiv:2305.14342): an estimate of the Hessian's diagonal every `hess_interval` steps.

python train_sophiag.py config/train_shakespeare_char_sophiag.py
torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_small_sophiag.py --batch_size=12
"""

import sys
from dataclasses import dataclass
from functools import partial

from sophia import SophiaG, sampled_label_loss
from training.config import TrainConfig, load_config, setting
from training.errors import UserError, command
from training.run import Run


@dataclass
class SophiaConfig(TrainConfig):
    """The settings of a run with Sophia."""

    optimizer_name: str = setting("sophiag", "curvature estimator: Gauss-Newton-Bartlett", choices=("sophiag",))
    weight_decay: float = setting(0.2, "decoupled weight decay of the Linear weights", at_least=0.0)
    beta1: float = setting(0.965, "decay of the gradient average", at_least=0.0, below=1.0)
    beta2: float = setting(0.99, "decay of the curvature average", at_least=0.0, below=1.0)
    rho: float = setting(0.05, "clipping threshold (the paper's gamma): larger clips less", above=0.0)
    hess_interval: int = setting(10, "steps between curvature estimates (the paper's k)", at_least=1)
    hess_bs: int | None = setting(None, "sequences in a curvature estimate; default a quarter of total_bs", at_least=1)
    bias_correction: bool = setting(False, "divide the curvature average by 1 - beta2^n after n estimates")

    def check(self):
        super().check()
        if self.hess_bs is None:
            self.hess_bs = max(1, self.total_bs // 4)
        if self.hess_bs > self.total_bs:
            raise UserError(f"hess_bs = {self.hess_bs} is more than total_bs = {self.total_bs}; lower it.")


def label_loss(logits, uniforms):
    """The loss of the curvature pass: cross-entropy against labels that `uniforms` draw from the model's softmax."""
    return sampled_label_loss(logits, uniform=uniforms)


def main(words=None):
    config = load_config(SophiaConfig, sys.argv[1:] if words is None else words)
    with Run(config) as run:
        optimizer = SophiaG(
            run.parameter_groups(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            rho=config.rho,
            weight_decay=config.weight_decay,
            bias_correction=config.bias_correction,
        )
        run.attach(optimizer, statistics=partial(sophia_statistics, optimizer, run.tokens_per_step))
        for step in run.steps():
            if step % config.hess_interval == 0:
                run.backward(run.curvature_batch(step, config.hess_bs), loss=label_loss)
                run.apply(optimizer.update_hessian, scale=config.hess_bs / config.total_bs)
            run.backward(run.train_batch(step))
            run.clip_gradients()
            run.apply(optimizer.step, bs=run.tokens_per_step)


def sophia_statistics(optimizer, tokens_per_step):
    """The optimizer's statistics under their metric names: win_rate is of training, the norms stand alone."""
    numbers = optimizer.statistics(bs=tokens_per_step)
    return {f"train/{name}" if name.startswith("win_rate") else name: value for name, value in numbers.items()}


if __name__ == "__main__":
    command(main)
