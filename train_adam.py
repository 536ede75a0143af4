"""Pre-train GPT-2 with a first-order optimizer: the baselines that Sophia has to beat.

python train_adam.py config/train_shakespeare_char_adam.py
python train_adam.py config/train_shakespeare_char_adam.py --optimizer_name=muon --out_dir=out/muon
torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_adam.py --batch_size=12
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch

from training.combined import Combined
from training.config import TrainConfig, load_config, setting
from training.errors import UserError, command
from training.run import Run


@dataclass
class AdamConfig(TrainConfig):
    """The settings of a run with a first-order optimizer."""

    optimizer_name: str = setting(
        "adamw", "which optimizer", choices=("adamw", "nadamw", "sgd", "lion", "muon", "soap")
    )
    momentum: float = setting(0.95, "sgd, muon: decay of the gradient average (Nesterov's)", at_least=0.0, below=1.0)


def main(words=None):
    config = load_config(AdamConfig, sys.argv[1:] if words is None else words)
    with Run(config) as run:
        optimizer = make_optimizer(config, run.parameter_groups(), fused=run.world.device.type in ("cuda", "cpu"))
        run.attach(optimizer)
        for step in run.steps():
            run.backward(run.train_batch(step))
            run.clip_gradients()
            run.apply(optimizer.step)


def make_optimizer(config, groups, fused):
    """The optimizer that `optimizer_name` names, each from the library that keeps it; the run sets its rate."""
    betas = config.beta1, config.beta2
    if config.optimizer_name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    if config.optimizer_name == "nadamw":
        return torch.optim.NAdam(groups, betas=betas, decoupled_weight_decay=True)
    if config.optimizer_name == "sgd":  # its weight decay is in the gradient, not decoupled
        sgd = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
        for p in (p for group in groups for p in group["params"] if config.momentum):
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)  # what torch makes holds garbage after a skipped step
        return sgd
    if config.optimizer_name == "lion":
        try:
            from lion_pytorch.foreach import Lion
        except ImportError:
            raise UserError("optimizer_name = 'lion' needs a package: pip install lion-pytorch.") from None
        return Lion(groups, betas=betas)
    if config.optimizer_name == "soap":
        try:
            from pytorch_optimizer import SOAP
        except ImportError:
            raise UserError("optimizer_name = 'soap' needs a package: pip install pytorch_optimizer.") from None
        return MatricesAndAdamW(groups, betas, fused, soap=partial(SOAP, betas=betas))
    # Muon's update is scaled to the root mean square of AdamW's (arXiv:2502.16982, section 2.2), so that a rate and a
    # weight decay mean the same for the matrices and for what AdamW moves.
    settings = {"momentum": config.momentum, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    return MatricesAndAdamW(groups, betas, fused, muon=partial(torch.optim.Muon, **settings))


class MatricesAndAdamW(Combined):
    """An optimizer made for matrices for the group "matrices", AdamW for the other groups, as one optimizer.

    Both follow one rate. The query, key and value matrices, which the model keeps in one, are three to it, as Muon's
    author advises.
    """

    def __init__(self, groups, betas, fused, **named):
        """named: the optimizer's name = what makes it of parameters and a weight_decay."""
        ((self.name, make),) = named.items()
        self.matrices = next(group for group in groups if group["name"] == "matrices")
        rest = [group for group in groups if group is not self.matrices]
        self.pieces = [torch.nn.Parameter(piece) for p in self.matrices["params"] for piece in thirds(p.detach())]
        optimizer = make(self.pieces, weight_decay=self.matrices["weight_decay"])
        super().__init__(**{self.name: optimizer}, adamw=torch.optim.AdamW(rest, betas=betas, fused=fused))

    @property
    def param_groups(self):
        return [self.matrices, *self.parts["adamw"].param_groups]

    def step(self):
        self.parts[self.name].param_groups[0]["lr"] = self.matrices["lr"]
        gradients = [piece for p in self.matrices["params"] for piece in thirds(p.grad)]
        for piece, gradient in zip(self.pieces, gradients, strict=True):
            piece.grad = gradient  # pieces and their gradients are views, nothing is copied
        super().step()
        self.parts[self.name].zero_grad()

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for p in self.matrices["params"]:
            p.grad = None


def thirds(matrix):
    """The three square matrices that (3C, C) holds, query, key and value; another matrix whole."""
    rows, columns = matrix.shape
    return matrix.split(columns) if rows == 3 * columns else [matrix]


if __name__ == "__main__":
    command(main)
