"""muon_distributed.py on 1 to 4 gloo ranks, with copies and with shards, against one process."""

import copy
import datetime
import math
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import muon_distributed
from muon import Muon, WhitenedMuon
from muon_distributed import share, update_flops

SHAPES = [(6, 6), (18, 6), (6, 24), (24, 6), (6, 6), (6, 24), (5, 7), (24, 6)]  # not divisible by all numbers of ranks
SPLITS = [1, 3, 1, 1, 1, 1, 1, [12, 8, 4]]
OPTIMIZERS = {
    "muon": (Muon, {"cautious": True}),
    "whitened": (WhitenedMuon, {"interval": 2, "max_width": 12}),
    "sampled": (WhitenedMuon, {"source": "update_factors", "sides": "input"}),
}


class Matrices(nn.Module):
    """Its loss has a gradient that is the mean of one for each of four rows, by step."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)

    def forward(self, step, rows):
        generator = torch.Generator().manual_seed(1 + step)
        noise = [torch.randn(12, *shape, generator=generator) for shape in SHAPES]
        return sum((w * n[rows].mean(0) * (1 + 0.1 * w)).sum() for w, n in zip(self.weights, noise, strict=True))


def train(model, optimizer, steps, rank=0, ranks=1):
    rows = range(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    for step in steps:
        if optimizer.param_groups[0].get("source") == "update_factors" and step % 2 == 0:
            model(100 + step, rows).backward()
            optimizer.update_factors(0.5)
            optimizer.zero_grad()
        model(step, rows).backward()
        optimizer.found_inf = torch.tensor(float(step == 3 and rank == ranks - 1))  # all ranks skip this step
        optimizer.grad_scale = torch.tensor(2.0)
        optimizer.step()
        optimizer.zero_grad()


def make(name, wrap=None):
    cls, settings = OPTIMIZERS[name]
    model = Matrices()
    model = wrap(model) if wrap else model
    return model, cls(model.parameters(), lr=0.05, split=SPLITS, **settings)


def numbers_in_factors(states):
    return sum(value.numel() for state in states.values() for key, value in state.items() if "_factor" in key)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collected(optimizer):
    """A state_dict that is complete on every rank, as a checkpoint has it."""
    state_dict = optimizer.state_dict()
    states = [{k: full(v).clone() for k, v in s.items()} for _, s in sorted(state_dict["state"].items())]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, states)
    merged = {
        i: {k: v for part in parts for k, v in part.items()} for i, parts in enumerate(zip(*everyones, strict=True))
    }
    return state_dict | {"state": merged}


def scatter(optimizer, state_dict):
    from torch.distributed.tensor import distribute_tensor

    params = optimizer.param_groups[0]["params"]
    for i, state in state_dict["state"].items():
        if hasattr(params[i], "device_mesh"):
            moved = distribute_tensor(state["momentum_buffer"], params[i].device_mesh, params[i].placements)
            state_dict["state"][i] = state | {"momentum_buffer": moved}
    return state_dict


def join(rank, ranks, port):
    """Join the other ranks; the two ways to wrap a model."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=timeout)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    return {"copies": nn.parallel.DistributedDataParallel, "shards": lambda model: fully_shard(model, mesh=mesh)}


def start_ranks(function, ranks, *arguments):
    """Run `function(rank, ranks, port, *arguments, results)` on several ranks; the dict `results`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        words = (ranks, port, *arguments, results)
        mp.start_processes(function, words, nprocs=ranks, start_method="forkserver")
        return dict(results)


def rank_main(rank, ranks, port, saved, results):
    wraps = join(rank, ranks, port)
    exchange, sent = dist.all_to_all_single, []

    def counted(received, tensor, take, give, *arguments, **more):
        sent.append(sum(give) - give[rank])
        return exchange(received, tensor, take, give, *arguments, **more)

    dist.all_to_all_single = counted
    for how, wrap in wraps.items():
        for name in OPTIMIZERS:
            model, optimizer = make(name, wrap)
            share(optimizer)
            sent.clear()
            train(model, optimizer, range(5), rank, ranks)
            results[how, name, rank, "sent"] = sum(sent) / 5
            half = collected(optimizer)
            train(model, optimizer, range(5, 9), rank, ranks)
            factors = numbers_in_factors(optimizer.state)
            results[how, name, rank] = [full(p).detach().numpy().copy() for p in model.parameters()], factors
            again, resumed = make(name, wrap)  # from the state and weights of a single process
            share(resumed)
            state_dict, weights = copy.deepcopy(saved[name])  # shared with the other ranks
            resumed.load_state_dict(scatter(resumed, state_dict))
            with torch.no_grad():
                for p, w in zip(again.parameters(), weights, strict=True):
                    if hasattr(p, "device_mesh"):
                        rows = w.chunk(ranks)
                        w = rows[rank] if rank < len(rows) else w[:0]
                        p = p.to_local()
                    p.copy_(w)
            train(again, resumed, range(5, 9), rank, ranks)
            results[how, name, rank, "resumed"] = [full(p).detach().numpy().copy() for p in again.parameters()]
            if rank == 0:
                results[how, name, "half"] = half
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    """{optimizer: (its state and the weights after 5 steps, the weights after 9)} of one process."""
    found = {}
    for name in OPTIMIZERS:
        model, optimizer = make(name)
        train(model, optimizer, range(5))
        half = optimizer.state_dict(), [p.detach().clone() for p in model.parameters()]
        half = copy.deepcopy(half)
        train(model, optimizer, range(5, 9))
        found[name] = half, [p.detach() for p in model.parameters()]
    return found


@pytest.mark.parametrize("ranks", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4)), 2])
def test_ranks_take_the_steps_of_one_process_and_resume_them(alone, ranks):
    results = start_ranks(rank_main, ranks, {name: half for name, (half, _) in alone.items()})
    for how in ("copies", "shards"):
        for name, (half, weights) in alone.items():
            for rank in range(ranks):
                found, _ = results[how, name, rank]
                assert all((a == b).all() for a, b in zip(found, results[how, name, 0][0], strict=True)), "ranks differ"
                for a, b, w in zip(found, results[how, name, rank, "resumed"], weights, strict=True):
                    torch.testing.assert_close(torch.from_numpy(a), w, rtol=1e-4, atol=1e-5, msg=f"{how} {name}")
                    torch.testing.assert_close(torch.from_numpy(b), w, rtol=1e-4, atol=1e-5, msg=f"{how} {name}")
            ours, theirs = results[how, name, "half"]["state"], half[0]["state"]
            for i, state in theirs.items():
                assert ours[i].keys() == state.keys()
                for key, value in state.items():
                    torch.testing.assert_close(ours[i][key], value, rtol=1e-3, atol=1e-4)
            sent = sum(results[how, name, rank, "sent"] for rank in range(ranks))
            trips = {"muon": 2, "whitened": 3, "sampled": 2 + 3 / 5}[name] if how == "shards" else 0
            assert sent == pytest.approx(trips * sum(map(math.prod, SHAPES)) * (ranks - 1) / ranks, rel=0.1)
            if name != "muon":
                shares = [results[how, name, rank][1] for rank in range(ranks)]
                assert sum(shares) == numbers_in_factors(theirs), "each factor once"


def profiled_main(rank, ranks, port, results):
    """Profile a step. Rank 1 sends its updates a tenth of a second late."""
    for exchange in (muon_distributed._Copies, muon_distributed._Shards):

        def to_all(self, updates, exchange=exchange.to_all):
            time.sleep(0.1 * rank)
            return exchange(self, updates)

        exchange.to_all = to_all
    for how, wrap in join(rank, ranks, port).items():
        model, optimizer = make("muon", wrap)
        share(optimizer)

        def compute(*arguments, direction=optimizer._direction):
            with torch.profiler.record_function("update"):
                time.sleep(0.02)
                return direction(*arguments)

        optimizer._direction = compute
        model(0, range(12)).backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()]
        results[how, rank] = [span for span in spans if span[0] == "update" or span[0].startswith("gloo:all")]
    dist.destroy_process_group()


def test_updates_are_sent_while_the_next_are_computed():
    """In torch's profile of gloo ranks. NCCL was not profiled."""
    results = start_ranks(profiled_main, 2)
    for how in ("copies", "shards"):
        spans = results[how, 0]
        updates = [span for span in spans if span[0] == "update"]
        sent = [span for span in spans if span[0] != "update" and span[2] > updates[0][2]]
        assert len(updates) > 2
        for _, _, end in updates[1:]:
            assert any(begin < end < finish for _, begin, finish in sent), how


def pretend(monkeypatch, rank, ranks, others=None):
    """This process is a rank of several. The others have the same parameters, or those of `others`."""
    monkeypatch.setattr(dist, "get_rank", lambda _: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda _: ranks)

    def all_gather_object(found, own, _):
        found[:] = [own if rank == i or others is None else others(own) for i in range(ranks)]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("cls", [Muon, WhitenedMuon])
def test_matrices_are_shared_out_by_their_cost(monkeypatch, cls, ranks):
    """GPT-2 of 124M: no rank has more than 1.1 times the mean of the FLOPs, though some have more matrices."""
    pretend(monkeypatch, 0, ranks)
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
    params, split = [torch.empty(shape, device="meta") for shape in shapes], [3, 1, 1, 1] * 12
    optimizer = cls(params, split=split)
    share(optimizer)
    loads, counts = [0.0] * ranks, [0] * ranks
    for p in params:
        loads[optimizer._share.owner[p]] += update_flops(p.shape, optimizer._share.rows[p], optimizer.param_groups[0])
        counts[optimizer._share.owner[p]] += 1
    assert max(loads) < 1.1 * sum(loads) / ranks
    assert ranks < 8 or max(counts) > min(counts)


def test_share_leaves_factors_to_the_owners_and_refuses_further_groups(monkeypatch):
    pretend(monkeypatch, 1, 2)
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(4)]
    optimizer = WhitenedMuon(params)
    for p in params:
        p.grad = torch.eye(4)
    optimizer.step()
    share(optimizer)
    assert ["left_root" in optimizer.state[p] for p in params] == [False, True, False, True]
    assert all("momentum_buffer" in optimizer.state[p] for p in params)
    with pytest.raises(RuntimeError, match="before muon_distributed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    with pytest.raises(RuntimeError, match="already called"):
        share(optimizer)
    with pytest.raises(RuntimeError, match="cannot be copied; its state_dict"):  # a copy would step all matrices
        copy.deepcopy(optimizer)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="a parameter is not the one of muon_distributed"):
        optimizer.step()


@pytest.mark.parametrize("source", ["gradient", "update_factors"])
def test_a_state_without_the_factors_of_other_ranks_is_told_of(monkeypatch, recwarn, source):
    """A rank's own state_dict after share(), as rank 0 alone may save it, given to a process that needs all factors."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]

    def step(optimizer):
        for p in params:
            p.grad = torch.eye(4)
        optimizer.update_factors() if source == "update_factors" else None
        optimizer.step()
        return optimizer

    saved = step(WhitenedMuon(params, source=source))
    step(WhitenedMuon(params, source=source)).load_state_dict(saved.state_dict())
    begun = WhitenedMuon(params, source=source)
    begun.load_state_dict(begun.state_dict())  # as accelerate does
    step(begun)
    complete = WhitenedMuon(params, source=source)
    complete.load_state_dict(saved.state_dict())
    step(complete)
    assert not recwarn.list
    pretend(monkeypatch, 0, 2)
    share(saved)
    incomplete = WhitenedMuon(params, source=source)
    incomplete.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match="lacks a (left|right)_factor, .* give each rank those of all"):
        step(incomplete)


@pytest.mark.parametrize(
    "others, message",
    [
        (lambda own: own[:1], "rank 0 has 2 parameters, and rank 1 1"),
        (lambda own: [own[0], (*own[1][:2], False)], r"number 1 .* True\), and rank 1 .* False\)"),
        (lambda own: own[::-1], "number 0"),
        (lambda own: [((4, 6), [2, 2], True), own[1]], r"\[4\], True\), and rank 1 .*\[2, 2\]"),
    ],
)
def test_ranks_with_different_parameters_are_refused(monkeypatch, others, message):
    pretend(monkeypatch, 0, 2, others)
    with pytest.raises(RuntimeError, match=message):
        share(Muon([nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6, 4))]))


def test_share_refuses_other_optimizers_and_a_rank_outside_the_group(monkeypatch):
    p = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(TypeError, match="not AdamW"):
        share(torch.optim.AdamW([p]))
    pretend(monkeypatch, -1, -1)
    with pytest.raises(RuntimeError, match="not in the process group"):
        share(Muon([p]))


def test_a_gradient_that_only_some_ranks_may_have_is_refused_before_anything_changes(monkeypatch):
    """The ranks would wait for each other, or take another matrix's update."""
    pretend(monkeypatch, 0, 2)
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    params[2].requires_grad_(False)
    optimizer = Muon(params)
    share(optimizer)
    params[0].grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"\(4, 4\) has no gradient"):
        optimizer.step()
    params[1].grad = params[2].grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="was frozen"):
        optimizer.step()
    assert all((p == 1).all() for p in params)
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


def test_sharded_matrices_need_share():
    p = nn.Parameter(torch.zeros(4, 4))
    p.device_mesh, p.grad = "a mesh", torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match=r"only after muon_distributed.share"):
        Muon([p]).step()
