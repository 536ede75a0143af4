"""Pre-train GPT-2 with Sophia (arXiv:2305.14342), which estimates the Hessian's diagonal every `hess_interval` steps.

python train_sophiag.py config/train_shakespeare_char_sophiag.py
torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_small_sophiag.py --batch_size=12
"""

from dataclasses import dataclass

from training.config import TrainConfig, load_config, setting
from training.errors import UserError, command
from training.optimizers import FIRST_ORDER, SECOND_ORDER, adamw_before_sophia, make_optimizer, take_momentum
from training.run import Run
from training.schedule import check_whole, stages

SOPHIA = ("optimizer_name", ("sophiag", "sophiah"))
ADAMW_FOR = ("none", "embeddings", "scalars", "embeddings+scalars")


@dataclass
class SophiaConfig(TrainConfig):
    optimizer_name: str = setting(
        "sophiag",
        "Sophia-G, Sophia-H, or Muon whitened by Sophia-G's sampled gradients (sophia_muon)",
        choices=SECOND_ORDER,
        elsewhere=("train_adam.py", FIRST_ORDER),
    )
    weight_decay: float = setting(0.2, "decoupled weight decay of the Linear weights", at_least=0.0)
    beta1: float = setting(0.965, "decay of the gradient average", at_least=0.0, below=1.0)
    beta2: float = setting(0.99, "decay of the curvature average", at_least=0.0, below=1.0)
    rho: float | None = setting(None, "clipping threshold (gamma); default 0.05, sophiah 0.01", above=0.0, needs=SOPHIA)
    hess_interval: int = setting(10, "steps between curvature estimates (the paper's k)", at_least=1)
    hess_bs: int | None = setting(None, "sequences in an estimate; default total_bs / 4, sophiah 32", at_least=1)
    bias_correction: bool = setting(False, "divide the curvature by 1 - beta2^n after n estimates", needs=SOPHIA)
    nesterov: bool = setting(False, "step by beta1 m + (1 - beta1) gradient instead of the average m", needs=SOPHIA)
    adamw_for: str = setting(
        "none",
        "parameter groups that AdamW (betas 0.9, 0.95) updates instead of Sophia",
        choices=ADAMW_FOR,
        former={"vectors": "scalars", "embeddings+vectors": "embeddings+scalars"},
    )
    adamw_lr: float | None = setting(
        None, "peak learning rate in adamw_for; default learning_rate", above=0.0, needs=("adamw_for", ADAMW_FOR[1:])
    )
    sophia_start_iter: int = setting(0, "AdamW (betas 0.9, 0.95) trains before this step, then Sophia", at_least=0)
    hess_warmup: int = setting(10, "curvature estimates at sophia_start_iter, before Sophia's first step", at_least=0)

    def check(self):
        super().check()
        hutchinson = self.optimizer_name == "sophiah"
        if self.rho is None:
            self.rho = 0.01 if hutchinson else 0.05
        if self.optimizer_name == "sophia_muon":
            if self.adamw_for not in ("none", "embeddings+scalars") or self.sophia_start_iter:
                raise UserError("sophia_muon has AdamW for all but the matrices: no adamw_for, no sophia_start_iter.")
            self.adamw_for = "embeddings+scalars"
        if self.hess_bs is None:
            self.hess_bs = min(32, self.total_bs) if hutchinson else max(1, self.total_bs // 4)
        imports = self.new_from.startswith("import:")
        if self.sophia_start_iter and imports:
            raise UserError("an import continues with its own optimizer; leave sophia_start_iter at 0.")
        if self.adamw_for != "none" and (self.sophia_start_iter or imports):
            raise UserError("adamw_for works with neither sophia_start_iter nor an import; leave it at none.")
        if self.adamw_lr and not self.learning_rate:
            raise UserError("adamw_lr is kept as a multiple of learning_rate, which is 0; raise learning_rate.")
        if "embeddings" in self.adamw_for and self.adamw_lr and self.embedding_lr:
            raise UserError("adamw_lr and embedding_lr both set the embeddings' learning rate here; give one of them.")
        if hutchinson and self.fp8:
            raise UserError("sophiah differentiates twice, and fp8 cannot be; use sophiag, or leave fp8 off.")
        given = getattr(self, "given", ())
        if "hess_warmup" in given and not self.sophia_start_iter:
            raise UserError("hess_warmup has no effect with sophia_start_iter = 0; leave it out, or set that.")
        if "beta2" in given and self.optimizer_name == "sophia_muon":
            raise UserError("beta2 has no effect with optimizer_name = 'sophia_muon'; leave it out (see whiten_decay).")
        if self.hess_bs > self.total_bs:
            raise UserError(f"hess_bs = {self.hess_bs} is more than total_bs = {self.total_bs}; lower it.")
        for _, length in stages(self):
            check_whole("hess_bs", self.hess_bs, self.block_size, length)


def main(argv=None):
    config = load_config(SophiaConfig, argv)
    with Run(config) as run:
        adamw_first = 0 < config.sophia_start_iter >= run.step  # a checkpoint of that very step is still AdamW's
        run.set_optimizer(adamw_before_sophia if adamw_first else make_optimizer)
        for step in run.steps():
            if step == config.sophia_start_iter > 0:
                switch_to_sophia(config, run)
            if step >= config.sophia_start_iter and step % config.hess_interval == 0:
                run.curvature_step(step)
            run.backward(run.train_batch(step))
            run.optimizer_step()


def switch_to_sophia(config, run):
    """Go on with Sophia: AdamW's momentum stays, the batches of the last hess_warmup steps give the first curvature."""
    adamw = run.optimizer
    take_momentum(run.set_optimizer(make_optimizer), adamw)
    for step in range(max(0, config.sophia_start_iter - config.hess_warmup), config.sophia_start_iter):
        run.curvature_step(step)


if __name__ == "__main__":
    command(main, goes_on=True)
