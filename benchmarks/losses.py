"""Compare the training losses of two settings or two commits: the same seed, the same tokens.

    python bench.py losses HEAD~1 HEAD "HEAD~1 --batch_size=32"
    python bench.py losses . ". --fp8=True" --base "config/train_gpt2_30m_sophiag.py --max_iters=300 --warmup_iters=30"

Each argument is a run: a commit or a folder with a checkout (. is this one), then settings. The others are compared
with the first. A run that differs only in its micro-batch shows how large rounding differences are.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import Report
from sweep import visible_gpus
from training.errors import UserError
from training.metrics import METRICS, read_metrics

ROOT = Path(__file__).resolve().parent.parent
BASE = "config/train_gpt2_small_sophiag.py --max_iters=200 --warmup_iters=20 --total_bs=64 --batch_size=64"
EVERY_STEP = ["--log_interval=1", "--eval_interval=1000000"]


def add_arguments(parser):
    help = 'a commit or folder with settings, in quotes: "HEAD --batch_size=32"'
    parser.add_argument("runs", nargs="+", metavar="RUN", help=help)
    parser.add_argument("--base", default=BASE, help="the settings of all runs; default: %(default)s")
    parser.add_argument("--script", default="train_sophiag.py", choices=("train_sophiag.py", "train_adam.py"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))


def run(args):
    if len(args.runs) < 2:
        raise UserError("losses compares at least two runs; name another one.")
    free = visible_gpus() or [None]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            places = [place_of(run, folder / f"tree{i}") for i, run in enumerate(args.runs)]
            report = Report(args)
            runs = [(args, *place, folder / f"run{i}", free) for i, place in enumerate(places)]
            with ThreadPoolExecutor(len(free)) as pool:
                losses = list(pool.map(losses_of, *zip(*runs, strict=True)))
        finally:
            for tree in folder.glob("tree*"):
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)
    for name, compared in zip(args.runs[1:], losses[1:], strict=True):
        if not compared or list(compared) != list(losses[0]):
            problem = f"{name!r} and {args.runs[0]!r} do not log losses at the same steps"
            raise UserError(f"{problem}; give both as many steps, and learning rates at which losses stay finite.")
        difference = {step: abs(compared[step] - loss) for step, loss in losses[0].items()}
        for steps in (5, 20, 50):  # rounding grows from step to step; another cause differs at once
            early = max((value for step, value in difference.items() if step < steps), default=0.0)
            print(f"{name}: largest difference in the first {steps} steps {early:.6f}", flush=True)
        worst = max(difference, key=difference.get)
        print(f"{name}: largest difference at step {worst}, {losses[0][worst]:.5f} and {compared[worst]:.5f}")
        model, last = args.runs[0], list(difference)[-20:]
        report.add(name, model, "largest_loss_difference", difference[worst], "nats")
        signed = sum(compared[step] - losses[0][step] for step in last) / len(last)
        report.add(name, model, f"mean_difference_last_{len(last)}", signed, "nats")


def place_of(run, tree):
    """(checkout, settings) of a run. A commit is checked out into `tree`."""
    try:
        place, *settings = shlex.split(run) or ["."]
    except ValueError as error:
        raise UserError(f"{run!r} cannot be read as a run ({error}); quote it once more.") from None
    if Path(place).is_dir():
        return (ROOT if place == "." else Path(place).resolve()), settings
    if subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", tree, place], capture_output=True).returncode:
        raise UserError(f"{place!r} is neither a folder nor a commit of this repository.")
    return tree, settings


def losses_of(args, checkout, settings, out_dir, free):
    """{step: training loss} of a run, on a GPU that is taken from `free` and given back."""
    gpu = free.pop()
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    command = [sys.executable, args.script, *shlex.split(args.base), *EVERY_STEP, f"--device={args.device}", *settings]
    command.append(f"--out_dir={out_dir}")
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    free.append(gpu)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1].removeprefix("error: ")
        raise UserError(f"{shlex.join(settings) or checkout}: {reason}")
    lines = read_metrics(out_dir / METRICS)
    return {line["step"]: line["train/loss"] for line in lines if line.get("train/loss") is not None}
