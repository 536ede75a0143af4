"""Train with a variant of Muon or whitened Muon: the loop and the settings of train_adam.py, and four settings more.

python experiments/30m_muon_variants/variants.py config/train_gpt2_30m_whitened_muon.py --variant=kl
python sweep.py experiments/30m_muon_variants/sweep.py --out_dir=out/30m_muon_variants

README.md has the formulas, their sources and what each variant reads. One process only.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training.errors import UserError, command  # first: Ctrl-C during the other imports is then quiet

# isort: split
import torch

import train_adam
from muon import Muon, WhitenedMuon
from training.config import MUON, setting
from training.optimizers import whitened_muon
from training.run import Run

TINY = 1e-30  # keeps quotients finite


@contextmanager
def float32_products():
    """No TF32 within: its rounding would hide the small eigenvalues of a factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ----- the optimizers: they override how a batch of matrices, (matrices, rows, columns), becomes an update


class KLMuon(WhitenedMuon):
    """WhitenedMuon with KL-Shampoo's factors (arXiv:2509.03378): each from gradients that the other one whitens.

    L <- decay L + (1 - decay) G (R / mean eigenvalue + ridge)^-1 G^T,  R likewise, with the L before this step
    """

    @float32_products()
    def _update_factors(self, grads, batch, group, roots, scale=1.0):
        grads = grads.to(batch.dtype)
        for_left = _triangular_solve(batch, "right_factor", grads.mT, group["ridge"]).mT
        for_right = _triangular_solve(batch, "left_factor", grads, group["ridge"])
        super()._update_factors(for_left, batch, group | {"sides": "output"}, roots, scale)
        super()._update_factors(for_right, batch, group | {"sides": "input"}, roots, scale)


class InputMuon(WhitenedMuon):
    """WhitenedMuon with K-FAC's factor of the input side (arXiv:1503.05671): R is the average of x x^T.

    The root is (R / mean eigenvalue + ridge)^-exponent by eigenvectors. `inverse_root` of muon.py adds 1/1024 of the
    largest eigenvalue, which can be more than the mean one here.

    inputs: {parameter: x of its layer, (tokens, columns)}, for the next step if needs_inputs().
    """

    inputs: dict

    def needs_inputs(self):
        (group,) = self.param_groups
        return group["step"] % group["interval"] == 0

    @float32_products()
    def _update_factors(self, grads, batch, group, roots, scale=1.0):
        if group["sides"] == "both":
            super()._update_factors(grads, batch, group | {"sides": "output"}, roots, scale)
        if roots:
            values, vectors = torch.linalg.eigh(self._average(batch, group))
            values = values.clamp(min=0) / (values.mean(-1, keepdim=True) + TINY) + group["ridge"]
            root = (vectors * values[:, None, :] ** -group["exponent"]) @ vectors.mT
            _store(batch, "right_root", root[:, None], identity=True)  # one block

    def _average(self, batch, group):
        x = [self.inputs[param] for param, rows, height in batch.members for _ in range(rows.count(height))]
        return _factor(batch, "right_factor", torch.stack(x).to(batch.dtype).mT, group["decay"])


class NewtonMuon(InputMuon):
    """Newton-Muon (arXiv:2604.01472): orthogonalize M (R / mean eigenvalue + ridge)^-1, and whiten nothing after it."""

    @float32_products()
    def _direction(self, moved, grads, batch, group):
        factor = self._average(batch, group) if self.needs_inputs() else _load(batch, "right_factor")
        moved = torch.cholesky_solve(moved.to(batch.dtype).mT, _cholesky(factor, group["ridge"])).mT
        return Muon._direction(self, moved, grads, batch, group)


class SOAPMuon(WhitenedMuon):
    """SOAP-Muon (modded-nanogpt, pull requests 278 and 321): SOAP's step on Muon's momentum, then orthogonalized.

    Of WhitenedMuon's settings it reads decay and interval. The eigenvectors of a side's factor are its basis. Every
    `interval` steps they follow the factor by one step of orthogonal iteration, as in SOAP (arXiv:2409.11321). A step's
    update is computed before its gradient joins the factors. The first step is Muon's.

    State of a parameter, besides the factors: "left_basis", "right_basis", "second_moment", (matrices, ., .) each.
    """

    @float32_products()
    def _direction(self, moved, grads, batch, group):
        step, decay, grads = group["step"], group["decay"], grads.to(batch.dtype)
        second = _load(batch, "second_moment") if step else torch.zeros_like(grads)
        if step:
            left, right = _load(batch, "left_basis"), _load(batch, "right_basis")
            rotated = left.mT @ moved.to(batch.dtype) @ right
            second.lerp_(rotated.square(), 1 - decay)
            moved = left @ (rotated / (second.sqrt() + 1e-8)) @ right.mT
        for side, x, dim in (("left", grads, 1), ("right", grads.mT, 2)):
            factor = _factor(batch, f"{side}_factor", x, decay)
            if step == 0:
                _store(batch, f"{side}_basis", torch.linalg.eigh(factor).eigenvectors, identity=True)
            elif step % group["interval"] == 0:
                basis, order = _iterated(factor, _load(batch, f"{side}_basis"))
                second = second.gather(dim, order.unsqueeze(3 - dim).expand_as(second))
                _store(batch, f"{side}_basis", basis)
        _store(batch, "second_moment", second)
        return Muon._direction(self, moved, grads, batch, group)


class SOAPMuonMLP(SOAPMuon):
    """The same for matrices that are not square, which are the MLP's; Muon for the others (pull request 278).

    All keep the states of SOAPMuon, since a resume asks for the same states of all matrices.
    """

    def _direction(self, moved, grads, batch, group):
        update = super()._direction(moved, grads, batch, group)
        return Muon._direction(self, moved, grads, batch, group) if moved.shape[1] == moved.shape[2] else update


VARIANTS = {"kl": KLMuon, "kfac": InputMuon, "newton": NewtonMuon, "soap": SOAPMuon, "soap_mlp": SOAPMuonMLP}


def _iterated(factor, basis):
    """One step of orthogonal iteration: the basis, and the order of its columns, by falling eigenvalue, in the old."""
    order = (basis * (factor @ basis)).sum(-2).argsort(-1, descending=True)
    basis = basis.gather(-1, order[:, None, :].expand_as(basis))
    return torch.linalg.qr(factor @ basis).Q, order


def _cholesky(factor, ridge):
    """C with C C^T = factor / its mean eigenvalue + ridge, (matrices, width, width)."""
    factor = factor / (factor.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] + TINY)
    factor.diagonal(dim1=1, dim2=2).add_(ridge)
    return torch.linalg.cholesky_ex(factor).L


def _triangular_solve(batch, key, x, ridge):
    """C^-1 x, so that its Gram matrix is x^T (factor / mean eigenvalue + ridge)^-1 x. Before the first step x."""
    if not _has(batch, key):
        return x
    return torch.linalg.solve_triangular(_cholesky(_load(batch, key)[:, 0], ridge), x, upper=False)


def _factor(batch, key, x, decay):
    """Add x x^T to the average under `key`, and return the average, (matrices, width, width)."""
    factor = (1 - decay) * (x @ x.mT)
    if _has(batch, key):
        factor += decay * _load(batch, key)
    _store(batch, key, factor)
    return factor


def _has(batch, key):
    return all(key in state for state in batch.states)


def _load(batch, key):
    return torch.cat([state[key] for state in batch.states])


def _store(batch, key, new, identity=False):
    """Keep `new`, (matrices, ., .), as the states under `key`; what was there stays where the step is to be skipped."""
    old = batch.collect(key, new.shape[1:], new.dtype, identity)
    torch._foreach_copy_(old, batch.for_states(new, old))


# ----- the run


@dataclass
class Config(train_adam.AdamConfig):
    variant: str = setting("none", "which variant; all but none need whitened_muon", choices=("none", *VARIANTS))
    momentum_start: float | None = setting(
        None, "momentum of the first step; it rises linearly to `momentum`", at_least=0.0, below=1.0, needs=MUON
    )
    momentum_warmup: int = setting(300, "steps of this rise", at_least=1)
    weight_ema: str = setting("", "averages of the weights to evaluate too: DECAY or DECAY*SHARE, with commas between")

    def check(self):
        super().check()
        if self.variant != "none" and (self.optimizer_name != "whitened_muon" or self.whiten_max_width):
            needed = "optimizer_name = 'whitened_muon' without whiten_max_width"
            raise UserError(f"variant = {self.variant!r} needs {needed}; set these, or leave variant out.")
        try:
            valid = all(0 < decay < 1 and 0 < share <= 1 for decay, share in self.averages().values())
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"weight_ema = {self.weight_ema!r}: write it as 0.98 or 0.98*0.6,0.9; all from 0 to 1.")

    def averages(self):
        """{name: (decay, share)}."""
        pairs = {text: text.partition("*") for text in self.weight_ema.split(",") if text}
        return {text: (float(decay), float(share or 1)) for text, (decay, _, share) in pairs.items()}


class VariantRun(Run):
    """A run with a variant's optimizer, a warm-up of the momentum, and evaluations of averaged weights.

    With a share, (1 - share) weights + share average are evaluated. Checkpoints hold the averages in the optimizer's
    state. They begin as the weights after the first step.
    """

    TOKENS = 4096  # at least, of the layers' inputs

    def set_optimizer(self, make):
        if self.world.size > 1 or self.config.fsdp:
            raise UserError("the variants run in one process; start this script without torchrun and fsdp.")
        cls = VARIANTS.get(self.config.variant)
        return super().set_optimizer(partial(whitened_muon, cls=cls) if cls else make)

    def train_batch(self, step):
        config = self.config
        if config.momentum_start is not None:
            share = min(step / config.momentum_warmup, 1)
            for group in self.optimizer.param_groups:
                if "momentum" in group:
                    group["momentum"] = (1 - share) * config.momentum_start + share * config.momentum
        batch = super().train_batch(step)
        if config.variant in ("kfac", "newton") and (muon := self.optimizer.optimizers["muon"]).needs_inputs():
            muon.inputs = self._layer_inputs(batch[0][0][: -(-self.TOKENS // config.block_size)])
        return batch

    @torch.no_grad()
    def _layer_inputs(self, tokens):
        """{weight: what its Linear layer in the blocks gets for `tokens`, (B * T, columns)}."""
        inputs = {}

        def keep(layer, arguments):
            inputs[layer.weight] = arguments[0].flatten(0, 1)

        layers = [layer for layer in self.model.transformer.h.modules() if isinstance(layer, torch.nn.Linear)]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        self.model.hidden(tokens)
        for hook in hooks:
            hook.remove()
        return inputs

    def optimizer_step(self):
        super().optimizer_step()
        with torch.no_grad():
            for decay in {decay for decay, _ in self.config.averages().values()}:
                parameters, averages = self._average(decay)
                torch._foreach_lerp_(averages, parameters, 1 - decay)

    def _average(self, decay):
        """All parameters, and their averages."""
        parameters, states, key = list(self.model.parameters()), self.optimizer.state, f"ema_{decay}"
        for p in parameters:
            if key not in states[p]:
                states[p][key] = p.detach().clone()
        return parameters, [states[p][key] for p in parameters]

    def evaluate(self):
        metrics = super().evaluate()
        for name, (decay, share) in self.config.averages().items() if self.optimizer.state else ():
            with self._averaged(decay, share):
                metrics |= {f"{key}/ema_{name}": value for key, value in super().evaluate().items()}
        return metrics

    @contextmanager
    @torch.no_grad()
    def _averaged(self, decay, share):
        parameters, averages = self._average(decay)
        weights = [p.detach().clone() for p in parameters]
        torch._foreach_lerp_(parameters, averages, share)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, weights)


def main(argv=None):
    train_adam.main(argv, Config, VariantRun)


if __name__ == "__main__":
    command(main, goes_on=True)
