"""Stages of block_size_schedule, lengths that do not divide block_size among them."""

import functools

import pytest
import torch

import train_adam
import train_sophiag
from tests.conftest import interrupt, losses, read_lines, tiny_words, torchrun
from tests.training.test_resume import refused
from training.checkpoint import read_checkpoint
from training.run import Run
from training.schedule import check_whole
from training.step import TrainStep

STAGES = "--block_size_schedule=0:2,7:12,14:16"  # 24 sequences of 16 tokens a step: 192 of 2, 32 of 12
SOPHIA = ["--sophia_start_iter=7", "--hess_warmup=2", "--hess_interval=3", "--hess_bs=6", "--grad_clip=0.46"]
SHORT = [STAGES, *SOPHIA, "--dropout=0.1", "--max_iters=20", "--warmup_iters=2"]


def batches(tiny, steps, *argv, rank=0, ranks=1):
    """{(step, whether of the curvature): the rows of the step's batch on one of `ranks`} as they are, and in a row."""
    config = train_sophiag.load_config(train_sophiag.SophiaConfig, [*tiny, *argv, "--overwrite=True"])
    with Run(config) as run:
        run.world.rank, run.world.size = rank, ranks
        run._batches._prefetcher.get = lambda prepare, *request: prepare(*request)
        found = {(step, False): run._batches.train(step) for step in steps}
        found |= {(step, True): run._batches.curvature(step, config.hess_bs) for step in steps}
        run.world.rank, run.world.size = 0, 1
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_length_reads_the_tokens_and_labels_of_full_sequences_in_a_row(tiny, ranks):
    steps = (0, 6, 7, 13, 14, 15, 25)  # an epoch ends in step 15
    full = batches(tiny, steps, "--hess_bs=6")
    parts = [batches(tiny, steps, STAGES, "--hess_bs=6", "--batch_size=4", rank=r, ranks=ranks) for r in range(ranks)]
    for request, (whole,) in ((key, batch[:1]) for key, batch in full.items()):
        inputs, targets = (torch.cat([micro_batch[i] for micro_batch in full[request]]).flatten() for i in (0, 1))
        rows = [micro_batch for part in parts for micro_batch in part[request]]
        length = 2 if request[0] < 7 else 12 if request[0] < 14 else 16
        assert all(a.shape[1] == b.shape[1] == length and a.numel() <= 4 * 16 for a, b, _ in rows), whole[2]
        assert torch.equal(torch.cat([a.flatten() for a, _, _ in rows]), inputs)
        assert torch.equal(torch.cat([b.flatten() for _, b, _ in rows]), targets)
        assert [weight * inputs.numel() for *_, weight in rows] == pytest.approx([a.numel() * ranks for a, *_ in rows])


def test_a_micro_batch_holds_as_many_tokens_in_every_stage(tiny):
    found = batches(tiny, (0, 7, 14), STAGES, "--hess_bs=6", "--batch_size=12")
    assert [found[step, False][0][0].shape for step in (0, 7, 14)] == [(96, 2), (16, 12), (12, 16)]


def test_all_stages_of_a_compiled_run_are_compiled(tiny, monkeypatch):
    """Also those beyond the number of graphs at which torch stops, of which the last is the longest."""
    graphs = []

    def compiler(on):
        return functools.partial(torch.compile, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph)

    monkeypatch.setattr("training.step.GRAPHS", 2)
    monkeypatch.setattr("training.step.compiler", compiler)
    words = ["--block_size_schedule=0:1,1:2,2:4,3:8,4:16", "--max_iters=5", "--warmup_iters=0", "--eval_interval=5"]
    train_adam.main([*tiny, *words, "--n_layer=1", "--compile=True"])
    assert len(graphs) == 5 + 1, "one for each length, and the evaluation's"


def test_hessian_vector_products_of_short_sequences_are_taken_on_as_many_tokens(tiny, monkeypatch):
    shapes, part_products = [], TrainStep._part_products
    monkeypatch.setattr(
        TrainStep, "_part_products", lambda s, *a: shapes.append(tuple(a[0].shape)) or part_products(s, *a)
    )
    words = ["--block_size_schedule=0:2,1:16", "--optimizer_name=sophiah", "--hess_interval=1", "--hess_bs=3"]
    train_sophiag.main([*tiny, *words, "--batch_size=8", "--max_iters=2", "--warmup_iters=0"])
    assert shapes == [(8, 2)] * 3 + [(1, 16)] * 3


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole")
    train_sophiag.main([*tiny_words(corpus, out_dir), *SHORT])
    return out_dir


@pytest.mark.parametrize("interrupted_at", [7, 11, 14])
def test_a_run_resumes_exactly_at_a_boundary_and_within_a_stage(corpus, whole, tmp_path, monkeypatch, interrupted_at):
    words = [*tiny_words(corpus, tmp_path), *SHORT, "--eval_interval=11"]
    interrupt(monkeypatch, train_sophiag.main, words, interrupted_at)
    torch.manual_seed(99)
    train_sophiag.main([*words, "--init_from=resume"])
    assert losses(tmp_path) == losses(whole)
    first, second = (read_checkpoint(folder / "ckpt.pt") for folder in (whole, tmp_path))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert first["sequences_seen"] == second["sequences_seen"] == 20 * 24
    keys = ("step", "stage/length", "stage/clip_rate", "val/loss", "val/accuracy")
    ends = [[tuple(line[key] for key in keys) for line in read_lines(folder) if keys[1] in line]
            for folder in (whole, tmp_path)]  # fmt: skip
    assert ends[0] == ends[1]


def test_a_stage_ends_with_its_clip_rate_and_an_evaluation_at_the_full_length(whole):
    lines = read_lines(whole)
    ends = [line for line in lines if "stage/clip_rate" in line]
    assert [(line["step"], line["stage/length"]) for line in ends] == [(7, 2), (14, 12), (20, 16)]
    for start, line in zip((0, 7, 14), ends, strict=True):
        clipped = [one["grad_norm"] > 0.46 for one in lines[start : line["step"]]]
        assert line["stage/clip_rate"] == pytest.approx(sum(clipped) / len(clipped)) and "val/loss" in line
    assert len({line["stage/clip_rate"] for line in ends}) > 1


@pytest.mark.parametrize("schedule, ends", [("0:4,11:12,15:16", [15, 20]), ("0:4,13:16", [13, 20]), ("", [])])
def test_a_stage_of_another_schedule_counts_the_steps_from_the_resume_on(corpus, tmp_path, schedule, ends):
    words = [*tiny_words(corpus, tmp_path), *SHORT, "--lr_decay_iters=20"]
    train_sophiag.main([*words, "--max_iters=11"])
    before = len(read_lines(tmp_path)) - 1
    train_sophiag.main([*words, f"--block_size_schedule={schedule}", "--init_from=resume"])
    lines = read_lines(tmp_path)
    found = [line for line in lines[before:] if "stage/clip_rate" in line]
    assert [line["step"] for line in found] == ends
    for start, line in zip([11, *ends], found, strict=False):
        clipped = [one["grad_norm"] > 0.46 for one in lines[start : line["step"]]]
        assert line["stage/clip_rate"] == pytest.approx(sum(clipped) / len(clipped))


def test_two_ranks_train_as_one_and_resume_exactly(corpus, whole, tmp_path):
    words = [*SHORT, "--dropout=0.0", "--lr_decay_iters=20", "--eval_interval=7"]
    train_sophiag.main([*tiny_words(corpus, tmp_path / "one"), *words])
    for name, more in (("two", []), ("cut", ["--max_iters=14"]), ("cut", ["--init_from=resume"])):
        argv = [*tiny_words(corpus, tmp_path / name), *words, "--batch_size=4", *more]
        done = torchrun(2, "train_sophiag.py", argv)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "two"), "bit for bit"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_what_cannot_be_divided_is_refused(tiny, capsys):
    words = [*tiny, "--block_size_schedule=0:12,5:16"]
    error = refused(capsys, train_sophiag.main, [*words, "--hess_bs=4"])
    assert "hess_bs = 4 times block_size = 16" in error and "make hess_bs a multiple of 3" in error
    error = refused(capsys, train_adam.main, [*words, "--total_bs=16", "--batch_size=8"])
    assert "make total_bs a multiple of 3, or change 12" in error


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("length", range(1, 17))
def test_the_multiple_that_is_named_is_the_smallest_that_fits(length, ranks):
    def fits(sequences):
        try:
            check_whole("total_bs", sequences, 16, length, ranks)
        except Exception:
            return False
        return True

    assert [n for n in range(1, 200) if fits(n)] == [n for n in range(1, 200) if n * 16 % (length * ranks) == 0]
