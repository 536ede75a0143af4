"""Train with the habits of the official Sophia-G: this repository's class, or the official one itself.

python experiments/30m_official/official.py config/train_gpt2_30m_sophiag.py --official=PATH/sophia.py

README.md says what the habits are. The loop is train_sophiag.py's in another order. One process only.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training.errors import UserError, command  # first: Ctrl-C during the other imports is then quiet

# isort: split
import runpy

from torch.nn.utils import clip_grad_norm_

from sophia import SophiaG
from train_sophiag import SophiaConfig
from training.config import load_config, run_file, setting
from training.run import Run


@dataclass
class Config(SophiaConfig):
    official: str = setting("", "the official sophia.py, from which the optimizer comes; default: this repository's")

    def check(self):
        super().check()
        if self.optimizer_name != "sophiag" or self.adamw_for != "none" or self.sophia_start_iter:
            raise UserError("the official code has Sophia-G only; set optimizer_name to 'sophiag', and no AdamW.")
        if self.bias_correction or self.nesterov:
            raise UserError("the official code knows neither bias_correction nor nesterov; leave both False.")
        self.hess_bs = self.total_bs


def make_optimizer(config, groups, device):
    """SophiaG that clips the gradient of an estimate, as the official loop does."""
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "rho": config.rho}
    options["weight_decay"] = config.weight_decay
    base, labels = SophiaG, config.total_bs * config.block_size
    if config.official:
        base = run_file(config.official, runpy.run_path, config.official)["SophiaG"]
    else:
        options["fused"] = device.type == "cuda"

    class Clipped(base):
        def update_hessian(self, **_):  # `scale` is 1: the estimate has as many labels as a step
            if config.grad_clip:
                clip_grad_norm_([p for group in self.param_groups for p in group["params"]], config.grad_clip)
            super().update_hessian()

        def step(self, closure=None, bs=labels):
            return super().step(closure, bs=bs)

    return Clipped(groups, **options)


def main(argv=None):
    config = load_config(Config, argv)
    with Run(config) as run:
        if run.world.size > 1 or config.fsdp:
            raise UserError("this experiment runs in one process; start the script without torchrun and fsdp.")
        run.set_optimizer(make_optimizer)
        for step in run.steps():
            run.backward(run.train_batch(step))
            run.optimizer_step()
            if step % config.hess_interval == config.hess_interval - 1:
                run.curvature_step(step + 1)


if __name__ == "__main__":
    command(main, goes_on=True)
