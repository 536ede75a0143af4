"""Torchrun starts this for `bench.py train --parts scaling,fsdp`: one optimizer, all ranks together, then each alone.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.ranks JOB

JOB is JSON: {"optimizer", "argv", "folder", "passes": {name: [total_bs of one rank alone, of all ranks]}, "steps"}. A
rank alone has its GPU to itself while the others do the same. With "alone": false there are only all ranks together.
"""

import gc
import json
import os
import sys

import torch

from benchmarks.train import Ours


def tokens_per_second(contender, total_bs, steps):
    """The speed of `steps` steps in a row of total_bs sequences, after two others. Compilation does not count."""
    config, run = contender.config, contender.run
    config.total_bs = total_bs
    if contender.sophia:
        config.hess_bs = max(run.world.size, total_bs // 4)
    for count in (2, steps):
        run.world.synchronize()
        before = run._clock.seconds
        for _ in range(count):
            contender()
    run.world.synchronize()
    return steps * total_bs * config.block_size / (run._clock.seconds - before)


def measure(job, which, out_dir):
    """{name of passes: tokens/s}, and the peak memory in GiB. which: 0 for a rank alone, 1 for all ranks."""
    batches = {name: totals[which] for name, totals in job["passes"].items()}
    contender = Ours([*job["argv"], f"--total_bs={max(batches.values())}"], out_dir, job["optimizer"])
    found = {name: tokens_per_second(contender, total_bs, job["steps"]) for name, total_bs in batches.items()}
    if torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    contender.close()
    return found


def main():
    job, rank = json.loads(sys.argv[1]), os.environ["RANK"]
    together = measure(job, 1, f"{job['folder']}/together")
    if rank == "0":
        print(json.dumps({"together": together}), flush=True)
    if job["alone"]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        torch._dynamo.reset()
        gc.collect()
        print(json.dumps({"alone": measure(job, 0, f"{job['folder']}/alone{rank}")}), flush=True)


if __name__ == "__main__":
    main()
