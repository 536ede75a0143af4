"""The optimizers of experiments/30m_muon_variants against float64 references, and their runs."""

import importlib
import json
import math

import pytest
import torch

import sweep
import train_adam
from tests.conftest import ROOT, interrupt, losses, read_lines
from tests.test_muon import SPLITS, newton_schulz, parameters, root_of, set_gradients
from training.errors import UserError
from training.run import Run

variants = importlib.import_module("experiments.30m_muon_variants.variants")
LR, MOMENTUM, DECAY, RIDGE, INTERVAL, EXPONENT = 0.01, 0.9, 0.8, 0.1, 3, 0.3
TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "total_bs": 8, "batch_size": 8, "max_iters": 6,
    "warmup_iters": 2, "eval_interval": 3, "log_interval": 1, "device": "cpu", "compile": False, "learning_rate": 1e-2,
}  # fmt: skip
WHITENED = ["--optimizer_name=whitened_muon", "--whiten_interval=2"]


# ----- the updates, in float64 from the papers' formulas, a matrix at a time


class KL:
    """KL-Shampoo's factors, S_a <- b S_a + (1 - b) G S_b^-1 G^T and S_b likewise, in whitened Muon's step."""

    def __init__(self, rows, columns):
        self.a, self.b = (torch.zeros(n, n).double() for n in (rows, columns))

    def update(self, m, g, x, step):
        a, b = (inverse(s) if step else torch.eye(len(s)).double() for s in (self.a, self.b))
        self.a = DECAY * self.a + (1 - DECAY) * g @ b @ g.T
        self.b = DECAY * self.b + (1 - DECAY) * g.T @ a @ g
        if step % INTERVAL == 0:
            self.roots = [root_of(s, EXPONENT, RIDGE) for s in (self.a, self.b)]
        return whitened_step(m, *self.roots)


class KFAC:
    """The input side is whitened by the average of x x^T over the layer's inputs x."""

    both = False

    def __init__(self, rows, columns):
        self.a, self.b = (torch.zeros(n, n).double() for n in (rows, columns))

    def update(self, m, g, x, step):
        self.a = DECAY * self.a + (1 - DECAY) * g @ g.T
        if step % INTERVAL == 0:
            self.b = DECAY * self.b + (1 - DECAY) * sum(torch.outer(row, row) for row in x)
            values, vectors = torch.linalg.eigh(damped(self.b))
            right = sum(value**-EXPONENT * torch.outer(v, v) for value, v in zip(values, vectors.T, strict=True))
            self.roots = root_of(self.a, EXPONENT if self.both else 0.0, RIDGE), right
        return whitened_step(m, *self.roots)


class KFACBoth(KFAC):
    both = True


class Newton(KFAC):
    """msgn(M (K + ridge tr(K) / n)^-1)."""

    def update(self, m, g, x, step):
        super().update(m, g, x, step)
        return newton_schulz(m @ inverse(self.b))


class SOAP:
    """U' = Ql^T U Qr;  V <- b V + (1 - b) U'^2;  Ql (U' / (sqrt(V) + eps)) Qr^T is orthogonalized."""

    def __init__(self, rows, columns):
        self.l, self.r, self.v = (torch.zeros(s).double() for s in ((rows, rows), (columns, columns), (rows, columns)))

    def update(self, m, g, x, step):
        if step:
            turned = self.ql.T @ m @ self.qr
            self.v = DECAY * self.v + (1 - DECAY) * turned**2
            m = self.ql @ (turned / (self.v.sqrt() + 1e-8)) @ self.qr.T
        self.l, self.r = DECAY * self.l + (1 - DECAY) * g @ g.T, DECAY * self.r + (1 - DECAY) * g.T @ g
        if step and step % INTERVAL == 0:
            rows, columns = (
                sorted(range(len(s)), key=lambda i, s=s, q=q: -(q[:, i] @ s @ q[:, i]))
                for s, q in ((self.l, self.ql), (self.r, self.qr))
            )
            self.v = self.v[rows][:, columns]
            self.ql = torch.linalg.qr(self.l @ self.ql[:, rows]).Q
            self.qr = torch.linalg.qr(self.r @ self.qr[:, columns]).Q
        return newton_schulz(m)

    def take_bases(self, left, right):
        """Any eigenvectors will do: those of an eigenvalue that comes twice are free."""
        for s, q in ((self.l, left), (self.r, right)):
            assert torch.allclose(q.T @ q, torch.eye(len(q)).double())
            turned = q.T @ s @ q
            assert torch.allclose(turned, torch.diag(turned.diagonal()), atol=1e-9)
        self.ql, self.qr = left.clone(), right.clone()


class SOAPForMLP(SOAP):
    def update(self, m, g, x, step):
        update = super().update(m, g, x, step)
        return newton_schulz(m) if len(self.l) == len(self.r) else update


def inverse(s):
    return torch.linalg.inv(damped(s))


def damped(s):
    return s / s.diagonal().mean() + RIDGE * torch.eye(len(s)).double()


def whitened_step(m, left, right):
    orthogonal = newton_schulz(left @ m @ right)
    update = left @ orthogonal @ right
    return update * orthogonal.norm() / update.norm()


@pytest.mark.parametrize(
    "cls, reference, settings",
    [
        (variants.KLMuon, KL, {}),
        (variants.InputMuon, KFAC, {"sides": "input"}),
        (variants.InputMuon, KFACBoth, {}),
        (variants.NewtonMuon, Newton, {}),
        (variants.SOAPMuon, SOAP, {}),
        (variants.SOAPMuonMLP, SOAPForMLP, {}),
    ],
)
def test_a_variants_steps_are_the_papers_formula(cls, reference, settings):
    params = parameters()
    settings |= {"decay": DECAY, "ridge": RIDGE, "interval": INTERVAL, "exponent": EXPONENT}
    optimizer = cls(params, lr=LR, momentum=MOMENTUM, split=SPLITS, **settings)
    matrices = [(p, i, n) for p, n in zip(params, SPLITS, strict=True) for i in range(n)]
    weights = [p.detach().chunk(n)[i].clone() for p, i, n in matrices]
    momenta, references = [0 * w for w in weights], [reference(*w.shape) for w in weights]
    for step in range(8):
        set_gradients(params, step)
        generator = torch.Generator().manual_seed(step)
        inputs = {p: torch.randn(20, p.shape[1], generator=generator, dtype=torch.float64) for p in params}
        optimizer.inputs = inputs
        optimizer.step()
        for k, (p, i, n) in enumerate(matrices):
            g = p.grad.chunk(n)[i]
            momenta[k] = MOMENTUM * momenta[k] + (1 - MOMENTUM) * g
            update = references[k].update(MOMENTUM * momenta[k] + (1 - MOMENTUM) * g, g, inputs[p], step)
            weights[k] = weights[k] - LR * 0.1 * weights[k] - LR * 0.2 * math.sqrt(max(g.shape)) * update
            if step == 0 and "left_basis" in optimizer.state[p]:
                references[k].take_bases(*(optimizer.state[p][f"{side}_basis"][i] for side in ("left", "right")))
            torch.testing.assert_close(p.detach().chunk(n)[i], weights[k], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cls", variants.VARIANTS.values())
def test_a_skipped_step_changes_no_weight_and_no_factor(cls):
    params = parameters()
    optimizer = cls(params, lr=LR, split=SPLITS, interval=1)
    optimizer.inputs = {p: torch.randn(20, p.shape[1], dtype=torch.float64) for p in params}
    set_gradients(params, 0)
    optimizer.step()
    before = [{"p": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}} for p in params]
    for p in params:
        p.grad.fill_(math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for p, saved in zip(params, before, strict=True):
        for key, value in {"p": p.detach(), **optimizer.state[p]}.items():
            assert torch.equal(value, saved[key]), key


# ----- runs


def words(corpus, out_dir, **more):
    return [f"--{key}={value}" for key, value in {**TINY, "dataset": corpus, "out_dir": out_dir, **more}.items()]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(variant, corpus, tmp_path, monkeypatch):
    argv = [*WHITENED, f"--variant={variant}", "--momentum_start=0.5", "--momentum_warmup=4", "--weight_ema=0.5"]
    variants.main([*words(corpus, tmp_path / "whole"), *argv])
    interrupt(monkeypatch, variants.main, [*words(corpus, tmp_path / "cut"), *argv], steps=5)
    variants.main([*words(corpus, tmp_path / "cut"), *argv, "--init_from=resume"])
    whole, cut = (read_lines(tmp_path / name) for name in ("whole", "cut"))
    keys = ("step", "train/loss", "val/loss", "val/loss/ema_0.5")
    assert [[line.get(key) for key in keys] for line in whole] == [[line.get(key) for key in keys] for line in cut]


def test_averaged_weights_are_evaluated_and_change_nothing_else(corpus, tmp_path, monkeypatch):
    averages = {"0.5": (0.5, 1.0), "0.8*0.25": (0.8, 0.25)}
    optimizer_step, evaluate, expected = variants.VariantRun.optimizer_step, variants.VariantRun.evaluate, []
    history = []  # the weights after each step

    def step_and_keep(run):
        optimizer_step(run)
        history.append([p.detach().double() for p in run.model.parameters()])

    def evaluate_twice(run):
        metrics = evaluate(run)
        for name, (decay, share) in averages.items() if history else ():
            mean = history[0]
            for weights in history[1:]:
                mean = [decay * m + (1 - decay) * w for m, w in zip(mean, weights, strict=True)]
            with torch.no_grad():
                for p, m, w in zip(run.model.parameters(), mean, history[-1], strict=True):
                    p.copy_(share * m + (1 - share) * w)
                values = Run.evaluate(run)
                for p, w in zip(run.model.parameters(), history[-1], strict=True):
                    p.copy_(w)
            expected.append({f"{key}/ema_{name}": value for key, value in values.items()})
        return metrics

    variants.main([*words(corpus, tmp_path / "plain"), *WHITENED])
    with monkeypatch.context() as patch:
        patch.setattr(variants.VariantRun, "optimizer_step", step_and_keep)
        patch.setattr(variants.VariantRun, "evaluate", evaluate_twice)
        variants.main([*words(corpus, tmp_path / "ema"), *WHITENED, f"--weight_ema={','.join(averages)}"])
    plain, ema = read_lines(tmp_path / "plain"), read_lines(tmp_path / "ema")
    assert losses(tmp_path / "plain") == losses(tmp_path / "ema")
    assert [line.get("val/loss") for line in plain] == [line.get("val/loss") for line in ema]
    evaluated = [line for line in ema if "val/loss" in line and line["step"]]
    found = [{k: v for k, v in line.items() if f"/ema_{name}" in k} for line in evaluated for name in averages]
    assert len(expected) == 4 and found == [pytest.approx(values, rel=1e-6) for values in expected]
    assert abs(ema[-1]["val/loss/ema_0.5"] - ema[-1]["val/loss"]) > 1e-4


def test_the_momentum_rises_linearly(corpus, tmp_path, monkeypatch):
    momenta, optimizer_step = [], Run.optimizer_step

    def step_and_keep(run):
        momenta.append(run.optimizer.optimizers["muon"].param_groups[0]["momentum"])
        optimizer_step(run)

    monkeypatch.setattr(Run, "optimizer_step", step_and_keep)
    argv = ["--optimizer_name=muon", "--momentum=0.95", "--momentum_start=0.85", "--momentum_warmup=4"]
    variants.main([*words(corpus, tmp_path), *argv])
    assert momenta == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])


def test_the_factors_inputs_are_what_the_layers_get(corpus, tmp_path, monkeypatch):
    found, optimizer_step = [], Run.optimizer_step

    def step_and_compare(run):
        tokens, block = run.batch[0][0], run.model.transformer.h[0]
        x = run.model.transformer.wte(tokens) + run.model.transformer.wpe.weight
        normed, inputs = block.ln_1(x), run.optimizer.optimizers["muon"].inputs
        hidden = block.mlp.gelu(block.mlp.c_fc(block.ln_2(x + block.attn(normed))))
        for layer, value in ((block.attn.c_attn, normed), (block.mlp.c_proj, hidden)):
            found.append(torch.equal(inputs[layer.weight], value.flatten(0, 1)))
        optimizer_step(run)

    def backward(run, batch):
        run.batch = batch
        run._train_step.backward(batch)

    monkeypatch.setattr(Run, "backward", backward)
    monkeypatch.setattr(Run, "optimizer_step", step_and_compare)
    variants.main([*words(corpus, tmp_path), *WHITENED, "--variant=kfac", "--max_iters=3", "--whiten_interval=1"])
    assert found == [True] * 6


@pytest.mark.slow  # a run of every variant; their updates have references above
def test_every_run_of_the_experiment_trains_and_evaluates(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = "experiments/30m_muon_variants/sweep.py"
    definition = sweep.read_command_line([file, "--out_dir=out", "--held_out=3"])[1]
    for trial in sweep.grid(definition, tmp_path):
        variants.main([*trial.argv[1:], *words(corpus, trial.folder, max_iters=3)])
        *_, last = read_lines(trial.folder)
        asked = sweep.settings_of(definition, trial.optimizer)
        ran = json.loads((trial.folder / "config.json").read_text())["config"]
        assert last["step"] == 3 and 2 < last["val/loss"] < 5, trial.optimizer
        assert ran["variant"] == asked.get("variant", "none")
        assert ("val/loss/ema_0.98*0.6" in last) == (trial.optimizer in ("muon", "whitened"))


def test_without_a_variant_the_run_is_train_adams(corpus, tmp_path):
    train_adam.main([*words(corpus, tmp_path / "adam"), *WHITENED])
    variants.main([*words(corpus, tmp_path / "variants"), *WHITENED])
    assert losses(tmp_path / "adam") == losses(tmp_path / "variants")


def test_a_sweep_runs_a_script_of_its_own(corpus, tmp_path):
    common = TINY | {"dataset": str(corpus), "script": "experiments/30m_muon_variants/variants.py"}
    optimizers = {"soap_muon": {"optimizer_name": "whitened_muon", "variant": "soap", "whiten_interval": 2}}
    (tmp_path / "s.py").write_text(f"common, optimizers = {common!r}, {optimizers!r}")
    sweep.main([str(tmp_path / "s.py"), f"--out_dir={tmp_path / 'out'}", "--dirty=True"])
    (run,) = json.loads((tmp_path / "out/sweep.json").read_text())["runs"]
    assert run["error"] == "" and read_lines(tmp_path / "out" / run["run"])[-1]["val/loss"] == run["loss"]
    variants.main([*words(corpus, tmp_path / "alone"), *WHITENED, "--variant=soap"])
    assert read_lines(tmp_path / "alone")[-1]["val/loss"] == run["loss"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--optimizer_name=muon", "--variant=soap"], "needs optimizer_name = 'whitened_muon'"),
        ([*WHITENED, "--variant=kl", "--whiten_max_width=8"], "without whiten_max_width"),
        ([*WHITENED, "--weight_ema=0.9;0.8"], "write it as 0.98"),
        ([*WHITENED, "--weight_ema=1.5"], "write it as 0.98"),
        (["--optimizer_name=adamw", "--momentum_start=0.5"], "momentum_start = 0.5 has no effect"),
    ],
)
def test_settings_that_a_variant_cannot_have_are_refused(argv, message, corpus, tmp_path):
    with pytest.raises(UserError, match=message):
        variants.main([*words(corpus, tmp_path / "out"), *argv])


def test_a_script_without_settings_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="dataclass Config"):
        sweep.script_of({"script": str(tmp_path / "empty.py")})
