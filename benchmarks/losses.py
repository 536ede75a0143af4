"""How far the losses of training are apart under two settings, or at two commits: the same seed, the same tokens.

    python bench.py losses HEAD~1 HEAD "HEAD~1 --batch_size=32"
    python bench.py losses . ". --fp8=True" --base "config/train_gpt2_medium_sophiag.py --max_iters=300"

Each word is a run: a commit, or a folder with a checkout (. is this one), and settings after it. The first is what the
others are compared with. A yardstick is a run that differs in nothing but its micro-batch.
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
    parser.add_argument("runs", nargs="+", metavar="RUN", help="COMMIT or FOLDER [--key=value ...], in quotes")
    parser.add_argument("--base", default=BASE, help="what all runs share; default: %(default)s")
    parser.add_argument("--script", default="train_sophiag.py", choices=("train_sophiag.py", "train_adam.py"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))


def run(args):
    if len(args.runs) < 2:
        raise UserError("losses compares at least two runs; name another one.")
    gpus = visible_gpus()
    if args.device == "cuda" and not gpus:
        raise UserError("this machine has no CUDA device: use --device cpu and a small --base.")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        free = list(gpus) or [None]
        try:
            places = [place_of(run, folder / f"tree{i}") for i, run in enumerate(args.runs)]
            report = Report(args)
            with ThreadPoolExecutor(len(free)) as pool:
                jobs = [
                    pool.submit(losses_of, args, *place, folder / f"run{i}", free) for i, place in enumerate(places)
                ]
                losses = [job.result() for job in jobs]
        finally:
            for tree in folder.glob("tree*"):
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)
    for name, theirs in zip(args.runs[1:], losses[1:], strict=True):
        if not theirs or list(theirs) != list(losses[0]):
            raise UserError(
                f"{name!r} and {args.runs[0]!r} do not log losses at the same steps; give both as many, and rates at "
                "which they stay finite."
            )
        difference = {step: abs(theirs[step] - loss) for step, loss in losses[0].items()}
        for steps in (5, 20, 50):  # rounding grows from step to step: what is more than that differs at once
            early = max((value for step, value in difference.items() if step < steps), default=0.0)
            print(f"{name}: largest difference in the first {steps} steps {early:.6f}", flush=True)
        worst = max(difference, key=difference.get)
        print(f"{name}: largest difference at step {worst}, {losses[0][worst]:.5f} and {theirs[worst]:.5f}")
        model, last = args.runs[0], list(difference)[-20:]
        report.add(name, model, "largest_loss_difference", difference[worst], "nats")
        signed = sum(theirs[step] - losses[0][step] for step in last) / len(last)
        report.add(name, model, f"mean_difference_last_{len(last)}", signed, "nats")


def place_of(words, tree):
    """(checkout, settings) of a run; a commit is checked out into `tree`."""
    try:
        words = shlex.split(words) or ["."]
    except ValueError as error:
        raise UserError(f"{words!r} cannot be read as a run ({error}); quote it once more.") from None
    if Path(words[0]).is_dir():
        return (ROOT if words[0] == "." else Path(words[0]).resolve()), words[1:]
    done = subprocess.run(
        ["git", "-C", ROOT, "worktree", "add", "--detach", tree, words[0]], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{words[0]!r} is neither a folder nor a commit of this repository.")
    return tree, words[1:]


def losses_of(args, checkout, words, out_dir, free):
    """{step: training loss} of a run, on a GPU that is taken from `free` and put back."""
    gpu = free.pop()
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    command = [sys.executable, args.script, *shlex.split(args.base), *EVERY_STEP, f"--device={args.device}", *words]
    done = subprocess.run(
        [*command, f"--out_dir={out_dir}"], cwd=checkout, env=environment, capture_output=True, text=True
    )
    free.append(gpu)
    if done.returncode:
        raise UserError(f"{shlex.join(words) or checkout}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    lines = read_metrics(out_dir / METRICS)
    return {line["step"]: line["train/loss"] for line in lines if line.get("train/loss") is not None}
