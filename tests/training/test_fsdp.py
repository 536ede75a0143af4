"""fsdp=True against DistributedDataParallel: the same losses, the same checkpoints, a share of the memory."""

import json
import math
import os
import shutil
import socket
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import evaluate
import export_hf
import sample
import train_adam
import train_sophiag
from model import GPT, GPTConfig
from tests.conftest import ROOT, losses, read_lines, tiny_words, torchrun, write_corpus
from tests.training.test_run import refused
from training.checkpoint import all_checkpoints, load_checkpoint, read_checkpoint, save_checkpoint
from training.errors import UserError
from training.optimizers import FIRST_ORDER, OPTIMIZERS
from training.run import Run
from training.sharding import check_sharding, set_weights

# 3 passes a step on 2 ranks, 2 on 3; every step is clipped, a good part of the coordinates is not
RUN = ["--batch_size=4", "--grad_clip=0.2", "--lr_decay_iters=16", "--eval_interval=4", "--eval_tokens=560"]
SOPHIA = [*RUN, "--hess_interval=5", "--rho=1.0"]


def train(ranks, script, corpus, out_dir, *argv):
    done = torchrun(ranks, script, [*tiny_words(corpus, out_dir), *argv], timeout=300)
    assert done.returncode == 0, done.stderr
    return out_dir


def step_back(out_dir, step):
    """Make the kept checkpoint of `step` the newest one."""
    for form in ("", ".pt"):
        if (out_dir / f"ckpt_{step}{form}").exists():
            shutil.rmtree(out_dir / "ckpt", ignore_errors=True)
            os.replace(out_dir / f"ckpt_{step}{form}", out_dir / f"ckpt{form}")


def tensors(thing, path=""):
    """(path, tensor or number) of everything in nested dicts and lists."""
    if isinstance(thing, (dict, list, tuple)):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return [pair for key, value in items for pair in tensors(value, f"{path}/{key}")]
    return [(path, thing)]


def numbered(optimizer):
    """An optimizer's state with the numbers of the parameters in place of their names, which copies have already."""
    if "param_groups" not in optimizer:
        return {name: numbered(part) for name, part in optimizer.items()}
    numbers = {name: number for number, name in enumerate(n for g in optimizer["param_groups"] for n in g["params"])}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {numbers[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}


def same_run(sharded, copied, loss=1e-5, weights=1e-4):
    ours, theirs = read_lines(sharded), read_lines(copied)
    of_the_ranks = {"tokens_per_second", "slowest_rank", "seconds_behind"}
    assert [line.keys() - of_the_ranks for line in ours] == [line.keys() - of_the_ranks for line in theirs]
    for key in ("train/loss", "val/loss", "grad_norm", "hessian_norm", "param_norm", "momentum_norm", "train/win_rate"):
        a, b = ([line[key] for line in lines if key in line] for lines in (ours, theirs))
        coordinate = 2e-4 if key == "train/win_rate" else None  # a few of 27,000 are that close to the threshold
        assert a == pytest.approx(b, rel=loss if "loss" in key else max(1e-4, 10 * loss), abs=coordinate), key
    a, b = (load_checkpoint(folder)[0] for folder in (sharded, copied))
    a["optimizer"], b["optimizer"] = numbered(a["optimizer"]), numbered(b["optimizer"])
    for part in ("model", "optimizer"):
        a_part, b_part = (dict(tensors(checkpoint[part])) for checkpoint in (a, b))
        assert a_part.keys() == b_part.keys()
        for name, value in a_part.items():
            if isinstance(value, torch.Tensor):
                assert type(value) is torch.Tensor and value.shape == b_part[name].shape, name
                torch.testing.assert_close(value, b_part[name], rtol=0, atol=weights, msg=name)
            elif not isinstance(value, float) and not name.endswith("/fused"):
                assert value == b_part[name], name
    assert a["model"]["lm_head.weight"].data_ptr() == a["model"]["transformer.wte.weight"].data_ptr()


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folders of 2-rank runs of Sophia-G over 16 steps, sharded ("True") and copied ("False")."""
    folder = tmp_path_factory.mktemp("runs")
    for fsdp in (True, False):
        argv = [*SOPHIA, "--max_iters=16", "--keep_checkpoints=4", f"--fsdp={fsdp}"]
        train(2, "train_sophiag.py", corpus, folder / str(fsdp), *argv)
    return folder


def test_sophia_takes_the_same_steps(runs):
    same_run(runs / "True", runs / "False")
    lines = read_lines(runs / "True")
    assert lines[-2]["train/clip_rate"] == 1 and 0.05 < lines[-2]["train/win_rate"] < 0.95


def test_each_rank_copies_and_writes_its_part_alone(runs):
    """torch.save writes all memory behind a tensor, so a file is as large as what its rank had copied."""
    manifest = json.loads((runs / "True" / "ckpt" / "manifest.json").read_text())
    model = GPT(GPTConfig(**load_checkpoint(runs / "True")[0]["model_args"]))
    parameters = sum(p.numel() for p in model.parameters())
    shapes = [about["shape"] for about in manifest["tensors"].values() if about["shape"]]  # not the numbers of steps
    assert sum(map(math.prod, shapes)) == 3 * parameters, "tied weights count once"
    for rank in range(2):
        size = (runs / "True" / "ckpt" / f"__{rank}_0.distcp").stat().st_size
        tensors = sum(
            chunk["file"] == f"__{rank}_0.distcp" for t in manifest["tensors"].values() for chunk in t["chunks"]
        )
        assert 0 <= size - 12 * parameters / 2 < 1700 * tensors  # of torch.save's form


SHARDS = [name for name, spec in OPTIMIZERS.items() if spec.shards is True]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [name for name in SHARDS if name != "sophiag"])
def test_all_that_are_allowed_take_the_same_steps(corpus, tmp_path, optimizer):
    script = "train_adam.py" if optimizer in FIRST_ORDER else "train_sophiag.py"
    for fsdp in (True, False):
        biases = optimizer != "lion"  # the keys' biases have no gradient, but for rounding, and Lion takes its sign
        argv = [*RUN, "--max_iters=8", f"--bias={biases}", f"--optimizer_name={optimizer}", f"--fsdp={fsdp}"]
        train(2, script, corpus, tmp_path / str(fsdp), *argv)
    same_run(tmp_path / "True", tmp_path / "False", weights=1e-3)  # the bias of the keys has no gradient but rounding


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", SHARDS)
def test_every_optimizer_goes_on_however_it_is_split(corpus, tmp_path, optimizer):
    """Two steps each on one to four ranks, with fsdp and without, against one process that is not interrupted.

    Four are two copies of two shards.
    """
    script = "train_adam.py" if optimizer in FIRST_ORDER else "train_sophiag.py"
    biases = optimizer not in (
        "lion",
        "sophiag",
    )  # those of the keys have no gradient but rounding, whose sign is taken
    argv = [*RUN, "--batch_size=2", "--eval_interval=2", f"--optimizer_name={optimizer}", f"--bias={biases}"]
    argv += ["--hess_interval=3", "--hess_bs=12"] if optimizer not in FIRST_ORDER else []
    argv += ["--whiten_interval=3"] if optimizer == "whitened_muon" else []
    train(1, script, corpus, tmp_path / "whole", *argv, "--max_iters=16")
    splits = (2, True), (3, True), (1, False), (2, False), (4, True), (2, False), (1, True), (3, False)
    for end, (ranks, fsdp) in zip(range(2, 17, 2), splits, strict=True):
        words = f"--fsdp={fsdp}", f"--max_iters={end}", "--init_from=auto", *["--fsdp_shard=2"] * (ranks == 4)
        train(ranks, script, corpus, tmp_path / "split", *argv, *words)
    same_run(tmp_path / "split", tmp_path / "whole", weights=1e-3)


def test_a_rank_that_misses_its_factor_says_so_for_all(corpus, tmp_path):
    """Those of whitened Muon live on one rank each; a checkpoint has all of them."""
    argv = [*RUN, "--optimizer_name=whitened_muon", "--whiten_interval=2", "--max_iters=4"]
    out_dir = train(2, "train_adam.py", corpus, tmp_path / "out", *argv, "--fsdp=True")
    checkpoint = load_checkpoint(out_dir)[0]
    state = checkpoint["optimizer"]["muon"]["state"]
    assert all("left_root" in entry for entry in state.values()) and len(state) == 8
    del state[next(iter(state))]["left_root"]
    save_checkpoint(out_dir, dict(checkpoint))
    done = torchrun(2, "train_adam.py", [*tiny_words(corpus, out_dir), *argv, "--max_iters=5", "--init_from=resume"])
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "left_root of a parameter of" in done.stderr


@pytest.mark.parametrize("before, ranks, fsdp", [(True, 3, True), (True, 1, False)])
def test_a_checkpoint_goes_on_however_it_is_split(corpus, runs, tmp_path, before, ranks, fsdp):
    out_dir = shutil.copytree(runs / str(before), tmp_path / "run")
    step_back(out_dir, 8)
    argv = [*SOPHIA, "--max_iters=16", "--init_from=resume", f"--fsdp={fsdp}"]
    done = torchrun(ranks, "train_sophiag.py", [*tiny_words(corpus, out_dir), *argv])
    assert done.returncode == 0, done.stderr
    assert "resumed at step 8" in done.stdout
    changed = done.stdout.partition("changed since the checkpoint: ")[2].splitlines()[0].split(", ")
    assert ("fsdp" in changed) == (before != fsdp)
    assert losses(out_dir) == pytest.approx(losses(runs / "False"), abs=1e-4)


@pytest.mark.parametrize("script", ["train_sophiag.py", pytest.param("train_adam.py", marks=pytest.mark.slow)])
def test_two_copies_of_two_shards_take_the_same_steps(corpus, tmp_path, script):
    """fsdp_shard=2 on 4 ranks; its checkpoint goes on with copies alone."""
    argv = [*RUN, "--max_iters=8", "--batch_size=3", "--keep_checkpoints=2"]
    argv += ["--hess_bs=12"] if "sophia" in script else ["--optimizer_name=whitened_muon"]
    for shard in (2, None):
        train(4, script, corpus, tmp_path / str(shard), *argv, "--fsdp=True", f"--fsdp_shard={shard}")
    same_run(tmp_path / "2", tmp_path / "None")
    step_back(tmp_path / "2", 4)
    train(2, script, corpus, tmp_path / "2", *argv, "--init_from=resume")
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "None"), abs=1e-4)


@pytest.mark.slow
def test_adamw_becomes_sophia(corpus, tmp_path):
    for fsdp in (True, False):
        argv = [*SOPHIA, "--max_iters=8", "--sophia_start_iter=4", "--hess_warmup=2", f"--fsdp={fsdp}"]
        train(2, "train_sophiag.py", corpus, tmp_path / str(fsdp), *argv)
    same_run(tmp_path / "True", tmp_path / "False")


@pytest.mark.slow
def test_bfloat16_with_activation_checkpointing_and_dropout(corpus, tmp_path):
    """Copies that keep their activations against shards that compute them again."""
    for fsdp in (True, False):
        argv = [*SOPHIA, "--max_iters=8", "--dtype=bfloat16", "--dropout=0.1"]
        argv += [f"--fsdp={fsdp}", f"--activation_checkpointing={fsdp}"]
        train(2, "train_sophiag.py", corpus, tmp_path / str(fsdp), *argv)
    same_run(tmp_path / "True", tmp_path / "False", loss=1e-3, weights=1e-2)
    assert losses(tmp_path / "True")[0] == losses(tmp_path / "False")[0]


@pytest.mark.slow  # the compiler takes a minute; on GPUs test_two_gpus_train_like_copies shows it
def test_compiled_blocks(corpus, tmp_path):
    for fsdp in (True, False):
        argv = [*SOPHIA, "--max_iters=4", f"--fsdp={fsdp}", f"--compile={fsdp}"]
        train(2, "train_sophiag.py", corpus, tmp_path / str(fsdp), *argv)
    same_run(tmp_path / "True", tmp_path / "False")


PROBE = f"""
import json, math, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist, train_sophiag
from training.run import Run
from training.step import TrainStep

out, exchanges, gathers, calls = sys.argv[1], [], [], []
def watch(names, calls):
    name = next(name for name in names if hasattr(dist, name))  # the second before torch 2.13
    def counted(*arguments, exchange=getattr(dist, name), **more):
        calls.append(1)
        return exchange(*arguments, **more)
    setattr(dist, name, counted)
watch(("reduce_scatter_single", "reduce_scatter_tensor"), exchanges)
watch(("all_gather_single", "all_gather_into_tensor"), gathers)

def poisoned(step, *arguments, loss=TrainStep._loss):
    calls.append(1)
    bad = os.environ["RANK"] == "1" and len(calls) == {{}}
    return loss(step, *arguments) * (math.inf if bad else 1.0)
TrainStep._loss = poisoned

def watched(run, steps=Run.steps):
    yield from steps(run)
    local = lambda ts: [getattr(t, "_local_tensor", t).numel() for t in ts]
    parameters = list(run.parameter_groups()[0]["params"]) + list(run.parameter_groups()[1]["params"])
    states = [run.optimizer.state[p] for p in parameters]
    found = {{{{
        "whole": [p.numel() for p in parameters], "parameters": local(parameters),
        "exp_avg": local(s["exp_avg"] for s in states), "hessian": local(s["hessian"] for s in states),
        "exchanges": len(exchanges), "gathers": len(gathers), "passes": len(calls),
    }}}}
    open(out + os.environ["RANK"], "w").write(json.dumps(found))
Run.steps = watched
train_sophiag.main(sys.argv[2:])
"""


def probe(corpus, tmp_path, name, fsdp, poison=None, keep="gradients"):
    """A 2-rank run of 6 steps; what each rank held at its end. poison: the pass in which rank 1's loss is infinite."""
    (tmp_path / "probe.py").write_text(PROBE.format(poison))
    argv = [*tiny_words(corpus, tmp_path / name), *SOPHIA, "--max_iters=6", f"--fsdp={fsdp}", f"--fsdp_keep={keep}"]
    done = torchrun(2, tmp_path / "probe.py", [str(tmp_path / f"{name}."), *argv])
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / f"{name}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow  # runs of two ranks
def test_each_rank_holds_its_half_and_fsdp_keep_says_what_is_exchanged(corpus, tmp_path):
    """6 steps of 3 passes, and 2 curvature estimates of 1. Each time two blocks and the rest are exchanged.

    A pass gathers the blocks before forward and before backward, the rest once; with "all" a batch gathers each once.
    """
    passes, batches, gathers = 6 * 3 + 2, 6 + 2, {}
    for keep, exchanges in (("nothing", passes * 3), ("gradients", batches * 3), ("all", batches * 3)):
        for found in probe(corpus, tmp_path, keep, fsdp=True, keep=keep):
            half = [n // 2 for n in found["whole"]]
            assert found["parameters"] == found["exp_avg"] == found["hessian"] == half
            assert found["passes"] == passes and found["exchanges"] == exchanges
            gathers[keep] = found["gathers"]
        same_run(tmp_path / keep, tmp_path / "nothing")
    assert gathers["nothing"] == gathers["gradients"] == gathers["all"] + passes * (2 * 2 + 1) - batches * (2 + 1)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_alike(corpus, tmp_path):
    for fsdp in (True, False):
        probe(corpus, tmp_path, str(fsdp), fsdp, poison=9)  # in step 2
    assert [line["train/skipped"] for line in read_lines(tmp_path / "True")[:-1]] == [0, 0, 1, 1, 1, 1]
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-5, nan_ok=True)
    a, b = (load_checkpoint(tmp_path / name)[0]["model"] for name in ("True", "False"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


# ----- one sharded process: which checkpoint


@pytest.fixture
def alone(tiny, tmp_path, monkeypatch):
    """Command-line words of a run with fsdp in this process; evaluations give 4, 3, 2, 5, 2.5, 2.5, ..."""
    values = iter([4.0, 3.0, 2.0, 5.0])
    monkeypatch.setattr(Run, "evaluate", lambda run: {"val/loss": next(values, 2.5)})
    folder = write_corpus(tmp_path / "characters")
    meta = {"vocab_size": 64, "tokenizer": {"characters": "\n" + "".join(map(chr, range(65, 128)))}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return [*tiny, f"--dataset={folder}", "--fsdp=True", "--lr_decay_iters=100", "--keep_checkpoints=2"]


def train_alone(words, steps, *more):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, one, MASTER_ADDR="localhost", MASTER_PORT=port):
        train_adam.main([*words, f"--max_iters={steps}", *more])


def test_any_of_its_checkpoints_is_resumed_started_from_and_read(alone, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    train_alone(alone, 40)
    assert {path.name for path in all_checkpoints(out)} == {"ckpt", "ckpt_prev", "ckpt_best", "ckpt_30", "ckpt_40"}
    whole, found = losses(out), {}
    for which in ("newest", "best", "30", str(out / "ckpt_prev")):
        words = [f"--out_dir={out}", f"--checkpoint={which}"]
        found[which] = evaluate.main([*words, "--device=cpu"])["loss"]
        sample.main([*words, "--device=cpu", "--start=ABBA", "--max_new_tokens=2"])
        export_hf.main([*words, f"--to={tmp_path / f'exported{len(found)}'}"])
    assert "ABBA" in capsys.readouterr().out
    assert found["30"] == found[str(out / "ckpt_prev")] and len(set(found.values())) == 3

    new = [*alone, f"--out_dir={tmp_path / 'new'}"]

    def set_unread_weights(model, checkpoint, device):
        assert all(tensor.is_meta for tensor in checkpoint["model"].values()), "no rank holds all of it"
        set_weights(model, checkpoint, device)

    still = ["--learning_rate=1e-9", "--min_lr=0", "--block_size=8"]
    with monkeypatch.context() as patch:
        patch.setattr("training.run.set_weights", set_unread_weights)
        train_alone(new, 1, f"--init_from=ckpt:{out / 'ckpt_best'}", *still)
    weights, copied = read_checkpoint(out / "ckpt_best")["model"], load_checkpoint(tmp_path / "new")[0]["model"]
    assert all(torch.allclose(weights[name][: len(copied[name])], copied[name], atol=1e-6) for name in weights)
    assert len(copied["transformer.wpe.weight"]) == 8

    moved = [*alone, f"--out_dir={tmp_path / 'moved'}", "--init_from=resume", f"--checkpoint={out / 'ckpt_best'}"]
    train_alone(moved, 24)
    assert losses(tmp_path / "moved") == whole[:24]
    train_alone([*alone, "--init_from=resume", "--checkpoint=20"], 31)
    assert losses(out) == whole[:31] and load_checkpoint(out)[0]["step"] == 31
    train_alone([*alone, "--overwrite=True"], 3)
    assert {path.name for path in all_checkpoints(out)} == {"ckpt", "ckpt_best", "ckpt_3"}


def test_a_single_file_goes_on_as_a_folder_and_back(alone, tmp_path):
    out = tmp_path / "out"
    train_alone(alone, 30, f"--out_dir={tmp_path / 'whole'}")
    for steps, fsdp in (5, False), (10, True), (15, True), (20, False), (25, False), (30, True):
        train_alone(alone, steps, f"--fsdp={fsdp}", "--init_from=auto", "--keep_checkpoints=0", "--eval_interval=5")
        assert load_checkpoint(out)[1].name == ("ckpt" if fsdp else "ckpt.pt")
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    a, b = load_checkpoint(out)[0], load_checkpoint(tmp_path / "whole")[0]
    for part in ("model", "optimizer"):
        ours, theirs = dict(tensors(a[part])), dict(tensors(b[part]))
        assert ours.keys() == theirs.keys()
        keys = [key for key, value in ours.items() if isinstance(value, torch.Tensor)]
        assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-5) for key in keys)


# ----- bad input


def test_one_process_is_told_of_torchrun(tiny, tmp_path, capsys):
    assert "start it with torchrun" in refused(capsys, train_sophiag.main, [*tiny, "--fsdp=True"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, argv, message",
    [
        (
            train_sophiag,
            ["--optimizer_name=sophiah"],
            "'sophiah' does not work with fsdp = True: torch cannot take Hessian-vector products .* use one of adamw",
        ),
        (train_adam, ["--optimizer_name=soap"], "'soap' does not work .*: its package steps complete matrices; use"),
        (train_sophiag, ["--hess_bs=7"], "hess_bs = 7 is not divisible by the 4 ranks, .* use --hess_bs=4"),
        (train_sophiag, ["--hess_bs=3"], "use --hess_bs=4"),
        (train_adam, ["--fsdp_shard=3"], "fsdp_shard = 3 does not divide the 4 ranks; it can be one of 1, 2, 4"),
    ],
)
def test_what_does_not_work_is_refused(tiny, script, argv, message):
    cls = train_adam.AdamConfig if script is train_adam else train_sophiag.SophiaConfig
    config = script.load_config(cls, [*tiny, *argv, "--fsdp=True"])
    with pytest.raises(UserError, match=message):
        check_sharding(config, SimpleNamespace(distributed=True, size=4))


def test_two_ranks_refuse_once(tiny, tmp_path):
    done = torchrun(2, "train_sophiag.py", [*tiny, "--optimizer_name=sophiah", "--fsdp=True"])
    assert done.returncode == 2
    assert done.stderr.count("error: optimizer_name = 'sophiah'") == 1 and not (tmp_path / "out").exists()


# ----- on GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "script, argv", [("train_sophiag.py", SOPHIA), ("train_adam.py", [*RUN, "--optimizer_name=whitened_muon"])]
)
def test_two_gpus_train_like_copies(corpus, tmp_path, script, argv):
    """NCCL, bfloat16, compiled; then the sharded checkpoint goes on in one process."""
    for fsdp in (True, False):
        argv = [*argv, "--device=cuda", "--dtype=bfloat16", "--n_embd=256", "--n_layer=4", "--n_head=4"]
        argv += ["--max_iters=16", "--compile=True", f"--fsdp={fsdp}"]
        train(2, script, corpus, tmp_path / str(fsdp), *argv)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=0.03)
    argv = [*argv, "--init_from=resume", "--max_iters=20", "--fsdp=False"]
    shutil.copytree(tmp_path / "True", tmp_path / "alone")
    shutil.copytree(tmp_path / "True", tmp_path / "together")
    train(1, script, corpus, tmp_path / "alone", *argv)
    train(2, script, corpus, tmp_path / "together", *argv, "--fsdp=True")
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "together"), abs=0.03)
