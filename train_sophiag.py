"""Pre-train GPT-2 with Sophia (arXiv:2305.14342): an estimate of the Hessian's diagonal every `hess_interval` steps.

python train_sophiag.py config/train_shakespeare_char_sophiag.py
torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_small_sophiag.py --batch_size=12
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch

from sophia import SophiaG, SophiaH
from sophia_eigenbasis import EigenbasisSophiaG, SpectralSophiaG
from training.combined import Combined
from training.config import TrainConfig, load_config, setting
from training.errors import UserError, command
from training.loss import label_loss
from training.run import Run


@dataclass
class SophiaConfig(TrainConfig):
    """The settings of a run with Sophia."""

    optimizer_name: str = setting(
        "sophiag",
        "curvature by Gauss-Newton-Bartlett (sophiag) or Hutchinson (sophiah)",
        choices=("sophiag", "sophiah"),
    )
    weight_decay: float = setting(0.2, "decoupled weight decay of the Linear weights", at_least=0.0)
    beta1: float = setting(0.965, "decay of the gradient average", at_least=0.0, below=1.0)
    beta2: float = setting(0.99, "decay of the curvature average", at_least=0.0, below=1.0)
    rho: float | None = setting(
        None, "clipping threshold (the paper's gamma), larger clips less; default 0.05, sophiah 0.01", above=0.0
    )
    hess_interval: int = setting(10, "steps between curvature estimates (the paper's k)", at_least=1)
    hess_bs: int | None = setting(
        None, "sequences in a curvature estimate; default a quarter of total_bs, sophiah 32", at_least=1
    )
    bias_correction: bool = setting(False, "divide the curvature average by 1 - beta2^n after n estimates")
    nesterov: bool = setting(False, "move by beta1 m + (1 - beta1) gradient, m the renewed average, instead of by m")
    eigenbasis: bool = setting(False, "with sophiag, step the hidden matrices in the eigenbasis of their curvature")
    spectral: bool = setting(
        False, "with eigenbasis, orthogonalize the step in coordinates that the curvature whitens; rate as Muon's"
    )
    adamw_for: str = setting(
        "none",
        "groups that AdamW (betas 0.9, 0.95) updates instead",
        choices=("none", "embeddings", "vectors", "embeddings+vectors"),
    )
    adamw_lr: float | None = setting(None, "AdamW's peak rate for these groups; default learning_rate", above=0.0)
    sophia_start_iter: int = setting(
        0, "AdamW (betas 0.9, 0.95, the same rate) before this step, then Sophia", at_least=0
    )
    hess_warmup: int = setting(10, "curvature estimates before the first step of a late Sophia", at_least=0)

    def check(self):
        super().check()
        hutchinsons = self.optimizer_name == "sophiah"
        if self.rho is None:
            self.rho = 0.01 if hutchinsons else 0.05
        if self.hess_bs is None:
            self.hess_bs = min(32, self.total_bs) if hutchinsons else max(1, self.total_bs // 4)
        if self.sophia_start_iter and self.init_from.startswith("import:"):
            raise UserError("an import goes on with its own optimizer; leave sophia_start_iter at 0.")
        if self.adamw_for != "none" and (self.sophia_start_iter or self.init_from.startswith("import:")):
            raise UserError("adamw_for goes with neither sophia_start_iter nor an import; leave it at none.")
        if self.adamw_lr and not self.learning_rate:
            raise UserError("adamw_lr is held as a multiple of learning_rate, which is 0; raise learning_rate.")
        if "embeddings" in self.adamw_for and self.adamw_lr and self.embedding_lr:
            raise UserError("adamw_lr and embedding_lr are both a rate of the embeddings here; give one of them.")
        if self.eigenbasis and hutchinsons:
            raise UserError("eigenbasis needs the gradients of sophiag's estimate; use sophiag, or leave it at False.")
        if self.spectral and not self.eigenbasis:
            raise UserError("spectral needs the eigenvectors of the curvature; set eigenbasis = True as well.")
        if self.spectral and self.adamw_for != "embeddings+vectors":
            raise UserError("spectral goes at Muon's rates, too high for Sophia; set adamw_for = embeddings+vectors.")
        if self.eigenbasis and self.fsdp:
            raise UserError("eigenbasis needs its matrices whole, which fsdp = True splits; leave one at False.")
        if hutchinsons and self.fp8:
            raise UserError("fp8 cannot be differentiated twice, as sophiah has to; use sophiag, or leave fp8 off.")
        if self.hess_bs > self.total_bs:
            raise UserError(f"hess_bs = {self.hess_bs} is more than total_bs = {self.total_bs}; lower it.")


def main(words=None):
    config = load_config(SophiaConfig, sys.argv[1:] if words is None else words)
    with Run(config) as run:
        optimizer, bs = make_optimizer(config, run)
        statistics = partial(sophia_statistics, optimizer, bs)
        if 0 < config.sophia_start_iter >= run.step:  # a checkpoint of that very step is still AdamW's
            adam = torch.optim.AdamW(run.parameter_groups(), betas=(0.9, 0.95), fused=can_fuse(run))
            run.attach(adam)
        else:
            run.attach(with_adamw(config, run, optimizer), statistics)
        for step in run.steps():
            if step == config.sophia_start_iter > 0:
                run.attach(optimizer, statistics)
                hand_over(config, run, adam, optimizer)
            if step >= config.sophia_start_iter and step % config.hess_interval == 0:
                update_hessian(config, run, optimizer, step)
            run.backward(run.train_batch(step))
            run.clip_gradients()
            run.apply(run.optimizer.step, **(bs if step >= config.sophia_start_iter else {}))


def update_hessian(config, run, optimizer, step):
    """Renew the curvature by an estimate on the first hess_bs sequences of the step's batch."""
    if config.optimizer_name == "sophiag":
        run.backward(run.curvature_batch(step, config.hess_bs), loss=label_loss)
        run.apply(optimizer.update_hessian, scale=config.hess_bs / config.total_bs)
    else:
        batch = run.train_batch(step, config.hess_bs)
        parameters, vectors = random_vectors(run, optimizer, step)
        products = run.hessian_vector_product(batch, parameters, vectors)
        run.apply(optimizer.update_hessian, estimates=torch._foreach_mul(vectors, products))


def hand_over(config, run, adam, optimizer):
    """AdamW's momentum becomes Sophia's; the curvature is warmed up on the batches of the last hess_warmup steps."""
    momenta = {n: {"step": s["step"], "exp_avg": s["exp_avg"]} for n, s in adam.state_dict()["state"].items()}
    optimizer.load_state_dict({"state": momenta, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, before in zip(optimizer.param_groups, adam.param_groups, strict=True):
        group["lr"] = before["lr"]
    adam.state.clear()
    for step in range(max(0, config.sophia_start_iter - config.hess_warmup), config.sophia_start_iter):
        update_hessian(config, run, optimizer, step)


def make_optimizer(config, run):
    """The optimizer, and what its step() and statistics() take: for SophiaG the labels in a step, else nothing."""
    kind, bs = (SophiaG, {"bs": run.tokens_per_step}) if config.optimizer_name == "sophiag" else (SophiaH, {})
    groups = [group for group in run.parameter_groups() if group["name"] not in config.adamw_for]
    if config.eigenbasis:
        kind = SpectralSophiaG if config.spectral else EigenbasisSophiaG
        fused_qkv = {p for name, p in run.model.named_parameters() if name.endswith("attn.c_attn.weight")}
        for group in groups:
            group["eigenbasis"] = group["name"] == "matrices"
            group.setdefault("split", [3 if p in fused_qkv else 1 for p in group["params"]])
    optimizer = kind(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        rho=config.rho,
        weight_decay=config.weight_decay,
        bias_correction=config.bias_correction,
        nesterov=config.nesterov,
        fused=run.world.device.type == "cuda",
    )
    return optimizer, bs


def with_adamw(config, run, sophia):
    """`sophia`, and AdamW for the groups of `adamw_for`, as one optimizer."""
    groups = [group for group in run.parameter_groups() if group["name"] in config.adamw_for]
    if not groups:
        return sophia
    for group in groups if config.adamw_lr else ():
        group["lr_scale"] = config.adamw_lr / config.learning_rate
    return Combined(sophia=sophia, adamw=torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=can_fuse(run)))


def can_fuse(run):
    return run.world.device.type != "mps"


def random_vectors(run, optimizer, step):
    """The optimizer's parameters and, for Hutchinson's estimate, u ~ N(0, I): a step's own, on all ranks the same."""
    generator = torch.Generator(run.world.device).manual_seed((run.config.seed << 32) + step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return parameters, [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in parameters]


def sophia_statistics(optimizer, bs):
    """The optimizer's statistics under their metric names: win_rate is of training, the norms stand alone."""
    numbers = optimizer.statistics(**bs)
    return {f"train/{name}" if name.startswith("win_rate") else name: value for name, value in numbers.items()}


if __name__ == "__main__":
    command(main)
