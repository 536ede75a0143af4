"""The host memory of four ranks while they save and resume, against the bytes of a checkpoint.

The table of docs/scaling.md: python -m pytest -m slow -s tests/training/test_host_memory.py
"""

import json

import pytest

from tests.conftest import ROOT, tiny_words, torchrun, write_corpus

RANKS = 4
PROBE = f"""
import ctypes, json, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import train_adam
from training.checkpoint import CheckpointWriter
from training.run import Run
from training.shards import PartWriter

for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: the C library gives freed memory back at once
    ctypes.CDLL(None).mallopt(option, 1 << 16)
out, series, marks = sys.argv[1] + os.environ["RANK"], [], {{}}

def memory():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def sample():
    while True:
        series.append((time.monotonic(), memory()))
        time.sleep(0.005)

def mark(name):
    marks[name] = (time.monotonic(), memory())

def marked(cls, name, before, after):
    def call(*arguments, function=getattr(cls, name)):
        mark(before)
        result = function(*arguments)
        mark(after)
        return result
    setattr(cls, name, call)

for cls in (CheckpointWriter, PartWriter):
    marked(cls, "save", "save", "saved")
marked(Run, "_finish_writing", "writing", "written")  # the last checkpoint: nothing else is done meanwhile
marked(Run, "_set_up", "start", "model")
marked(Run, "set_optimizer", "optimizer", "ready")
threading.Thread(target=sample, daemon=True).start()
train_adam.main(sys.argv[2:])
for name in ("save", "saved"):
    marks.setdefault(name, marks["writing"])  # a rank that has nothing to write

def peak(first, last):
    (begin, here), (end, there) = marks[first], marks[last]
    return max([here, there, *(bytes for t, bytes in series if begin <= t <= end)])

found = {{
    "copy": marks["saved"][1] - marks["save"][1],
    "save": peak("save", "written") - marks["save"][1],
    "after": marks["written"][1] - marks["save"][1],
    "resume": peak("start", "ready") - marks["start"][1],
    "seconds": marks["saved"][0] - marks["save"][0],
    "write": marks["written"][0] - marks["save"][0],
}}
with open(out, "w") as file:
    json.dump(found, file)
"""


def measure(tmp_path, fsdp, layers, width):
    """(parameters, what each rank found) of a run that resumes a checkpoint and writes another."""
    corpus, out_dir = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    (corpus / "meta.json").write_text(json.dumps({"vocab_size": 50304, "tokenizer": "gpt2"}))
    (tmp_path / "probe.py").write_text(PROBE)
    words = [*tiny_words(corpus, out_dir), f"--n_layer={layers}", f"--n_embd={width}", "--total_bs=4", "--batch_size=1"]
    words += [f"--fsdp={fsdp}", "--eval_tokens=64", "--init_from=auto", "--lr_decay_iters=8"]
    words.insert(0, tmp_path / "found.")
    for steps in (1, 2):
        done = torchrun(RANKS, tmp_path / "probe.py", [*words, f"--max_iters={steps}"], timeout=300)
        assert done.returncode == 0, done.stderr
    parameters = json.loads((out_dir / "config.json").read_text())["model"]["num_params"]
    return parameters, [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("layers, width", [(1, 128), pytest.param(8, 768, marks=pytest.mark.slow)])
def test_a_rank_needs_memory_for_its_shard_to_save_and_to_resume(tmp_path, layers, width):
    """12 bytes a parameter, divided by the ranks; to resume also the largest part of one tensor. A copy is 4 shards."""
    parameters, found = measure(tmp_path, True, layers, width)
    shard, largest = 12 * parameters / RANKS, 4 * 50304 * width / RANKS
    for rank, bytes in enumerate(found):
        print(f"fsdp, rank {rank}, {parameters / 1e6:.1f}M: {bytes}")
        assert 0.97 * shard < bytes["copy"] < 1.05 * shard + 2e6
        assert bytes["save"] < 1.1 * shard + 4e6, "no more while the files are written"
        assert bytes["after"] < 0.05 * shard + 4e6, "and all is free again"
        assert shard < bytes["resume"] < 1.25 * shard + largest + 20e6


@pytest.mark.slow
def test_without_fsdp_rank_0_copies_the_complete_checkpoint(tmp_path):
    parameters, found = measure(tmp_path, False, 8, 768)
    for rank, bytes in enumerate(found):
        print(f"copies, rank {rank}, {parameters / 1e6:.1f}M: {bytes}")
        assert bytes["save"] == pytest.approx(12 * parameters if rank == 0 else 0, rel=0.05, abs=4e6)
