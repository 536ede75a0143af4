"""Sophia under DistributedDataParallel and fully_shard on 2 gloo ranks, activation checkpointing and torch.compile."""

import copy
import datetime
import importlib.util
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from sophia import SophiaG, SophiaH, hutchinson, sample_labels, sampled_label_loss


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.hidden = nn.Linear(7, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.scale = nn.Parameter(torch.ones(1))  # fewer rows than ranks: one rank's shard is empty
        self.checkpointed = False

    def forward(self, x):
        def body(t):
            return torch.tanh(self.hidden(t)) * self.scale

        t = self.embedding(x)
        return self.head(checkpoint(body, t, use_reentrant=False) if self.checkpointed else body(t))


def make(cls=SophiaG, wrap=lambda model: model, **settings):
    torch.manual_seed(0)
    model = wrap(Net())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "name": "decayed"}, {"params": others, "weight_decay": 0.0}]
    return model, cls(groups, lr=0.05, rho=0.5, max_grad_norm=0.1, **settings)


def train(model, optimizer, rank=0, ranks=1, steps=5, sophia=None):
    """Every rank on its rows of the same batches; labels by uniform numbers that do not depend on the ranks."""
    norms, sophia = [], sophia or optimizer
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(11, (8, 3), generator=generator)[rank::ranks]
        uniform = torch.rand(8, 3, generator=generator)[rank::ranks]
        if step % 2 == 0 and isinstance(sophia, SophiaG):
            sampled_label_loss(model(x), uniform=uniform).backward()
            sophia.update_hessian(scale=24 / 48)
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), ((x + 1) % 11).flatten()).backward()
        optimizer.step(**({"bs": 48} if isinstance(optimizer, SophiaG) else {}))
        optimizer.zero_grad()
        norms.append(0.0 if sophia.grad_norm is None else float(sophia.grad_norm))
    statistics = sophia.statistics(**({"bs": 48} if isinstance(optimizer, SophiaG) else {}))
    return norms, statistics


def implementations():
    return ["foreach", "fused"] if importlib.util.find_spec("triton") else ["foreach"]


def rank_main(rank, ranks, port, results):
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=timeout)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def shard(model, mesh):
        fully_shard(model.hidden, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    flat, square = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (1, ranks), mesh_dim_names=("r", "s"))
    wraps = {
        "ddp": nn.parallel.DistributedDataParallel,
        "fsdp": lambda model: shard(model, flat),
        "hsdp": lambda model: shard(model, square),
    }
    for name, wrap in wraps.items():
        for implementation in implementations():
            model, optimizer = make(wrap=wrap, **{implementation: True})
            norms, statistics = train(model, optimizer, rank, ranks)
            params = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
            state = [optimizer.state[p]["hessian"] for p in model.parameters()]
            hessians = [h.full_tensor() if isinstance(h, DTensor) else h for h in state]
            if implementation == "fused":
                import sophia_fused

                momenta = {p: optimizer.state[p]["exp_avg"] for p in model.parameters()}
                assert all(bucket.alignment for bucket in sophia_fused.buckets(optimizer, momenta))
            assert name == "ddp" or all(isinstance(h, DTensor) for h in state)
            copy.deepcopy(optimizer.state_dict())
            if rank == 0:
                tensors = [t.detach().numpy().copy() for t in [*params, *hessians]]
                results[name, implementation] = (tensors, norms, statistics)
    results["zero", rank] = zero_1(rank, ranks)
    results["fsdp1", rank] = fsdp_1(rank, ranks)
    results["hutchinson", rank] = hutchinson_under_ddp(rank)
    results["partial", rank] = estimates_of_some_ranks(rank)
    results["partial_sums", rank] = partial_sums(flat)
    results["sharded", rank] = sharded_edges(rank, lambda model: shard(model, flat))
    dist.destroy_process_group()


def zero_1(rank, ranks):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    settings = {"lr": 0.05, "rho": 0.5, "bs": 48, implementations()[-1]: True}
    zero = ZeroRedundancyOptimizer(model.parameters(), SophiaG, **settings)
    train(model, zero, rank, ranks, sophia=zero.optim)
    zero.consolidate_state_dict()
    kept = [] if rank else [state["hessian"] for _, state in sorted(zero.state_dict()["state"].items())]
    tensors = [t.detach().clone().numpy() for t in [*model.parameters(), *kept]]
    saved = [None if rank else copy.deepcopy(zero.state_dict())]
    dist.broadcast_object_list(saved)
    resumed = ZeroRedundancyOptimizer((twin := copy.deepcopy(model)).parameters(), SophiaG, **settings)
    resumed.load_state_dict(saved[0])
    for each, its in ((zero, model), (resumed, twin)):
        train(its, each, rank, ranks, sophia=each.optim)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    return tensors


def fsdp_1(rank, ranks):
    """Parameters are pieces of flat ones; with every step they may lie elsewhere."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = SophiaG(model.parameters(), lr=0.05, rho=0.5, bs=48, **{implementations()[-1]: True})
    train(model, optimizer, rank, ranks)
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone().numpy() for p in model.parameters()]


def batch(rank, step):
    return torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x).flatten(0, 1), ((x + 1) % 11).flatten())


def hutchinson_under_ddp(rank):
    """12 steps, every rank with its own batches and random numbers. Returns the parameters and the first curvature."""
    model, optimizer = make(SophiaH, nn.parallel.DistributedDataParallel)
    torch.manual_seed(100 + rank)
    first = None
    for step in range(12):
        if step % 3 == 0:
            estimates = hutchinson(lambda step=step: loss_of(model.module, batch(rank, step)), model.parameters())
            kept = [e.clone() for e in estimates]
            optimizer.update_hessian(estimates)
            assert all(torch.equal(a, b) for a, b in zip(estimates, kept, strict=True)), "the caller's are changed"
            if first is None:
                first = kept, [optimizer.state[p]["hessian"].clone() for p in model.parameters()]
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [[t.detach().numpy() for t in tensors] for tensors in ([*model.parameters()], *first)]


def estimates_of_some_ranks(rank):
    """Rank 1 has no estimate of the second parameter: not waited for, and nobody's mean is taken for that of all."""
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SophiaH([first, second])
    with pytest.raises(RuntimeError, match="the ranks have estimates of different parameters"):
        SophiaH([first, second][rank:]).update_hessian([torch.ones(3)] * (2 - rank))  # their shares, as of ZeRO-1
    try:
        optimizer.update_hessian({first: torch.ones(3), second: torch.ones(3) if rank == 0 else None})
    except RuntimeError as error:
        return str(error), len(optimizer.state)


def partial_sums(mesh):
    """Two steps of a parameter that all ranks have, with gradients to be summed over them (tensor parallelism)."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    ends = []
    for implementation in implementations():
        p = nn.Parameter(DTensor.from_local(torch.ones(64, 64), mesh, [Replicate()]))
        optimizer = SophiaG([p], lr=0.1, rho=0.5, bs=2, **{implementation: True})
        for step in range(2):
            p.grad = DTensor.from_local(torch.full((64, 64), step - 0.25 + mesh.get_rank()), mesh, [Partial()])
            optimizer.update_hessian()
            optimizer.step()
        ends.append([p.to_local().detach().numpy(), optimizer.state[p]["hessian"].to_local().numpy()])
    return ends


def sharded_edges(rank, wrap):
    """What DistributedTensors do at the edges; strings and numbers that a test compares."""
    found = {}
    model, optimizer = make(wrap=wrap)
    try:
        hutchinson(lambda: loss_of(model, batch(rank, 0)), model.parameters())
    except RuntimeError as error:
        found["hutchinson"] = str(error)
    train(model, optimizer, rank, 2, steps=2)
    before = [optimizer.state[p]["hessian"].full_tensor() for p in model.parameters()]
    sampled_label_loss(model(batch(rank, 0))).backward()
    if rank == 1:
        model.embedding.weight.grad.to_local()[0, 0] = float("inf")  # of this rank's shard alone
    optimizer.update_hessian()
    optimizer.zero_grad()
    after = [optimizer.state[p]["hessian"].full_tensor() for p in model.parameters()]
    found["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    found["skipped"] = float(optimizer.skipped_estimates)
    loss_of(model, batch(rank, 0)).backward()
    for state in optimizer.state.values():
        state["hessian"] = state["hessian"].full_tensor()  # as a checkpoint of a run that was not sharded has it
    try:
        optimizer.step()
    except ValueError as error:
        found["not sharded"] = str(error)
    return found


@pytest.fixture(scope="module")
def two_ranks():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(rank_main, (2, port, results), nprocs=2, start_method="forkserver")
        return dict(results)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_two_ranks_equal_one(two_ranks, name, implementation):
    """Parameters, curvature, the clipped gradient norm of every step, and the statistics."""
    model, optimizer = make()
    norms, statistics = train(model, optimizer)
    assert min(norms) > 0.1  # every step is clipped
    expected = [*model.parameters(), *(optimizer.state[p]["hessian"] for p in model.parameters())]
    tensors, their_norms, their_statistics = two_ranks[name, implementation]
    for ours, theirs in zip(expected, tensors, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours.detach(), rtol=2e-5, atol=2e-6)
    assert their_norms == pytest.approx(norms, rel=1e-5)
    assert their_statistics == pytest.approx(statistics, rel=1e-4)
    assert 0 < statistics["win_rate"] < 1


def test_gradients_that_are_still_to_be_summed_over_the_ranks(two_ranks):
    """The sum is a temporary tensor: the kernels must not read it after it is gone."""
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = SophiaG([p], lr=0.1, rho=0.5, bs=2)
    for step in range(2):
        p.grad = torch.full((64, 64), 2 * step + 0.5)
        optimizer.update_hessian()
        optimizer.step()
    for rank in (0, 1):
        for weights, hessian in two_ranks["partial_sums", rank]:
            torch.testing.assert_close(torch.from_numpy(weights), p.detach())
            torch.testing.assert_close(torch.from_numpy(hessian), optimizer.state[p]["hessian"])


@pytest.mark.parametrize("name", ["zero", "fsdp1"])
def test_zero_1_and_fsdp_1_equal_one_rank(two_ranks, name):
    torch.manual_seed(0)
    model = Net()
    optimizer = SophiaG(model.parameters(), lr=0.05, rho=0.5, bs=48)
    train(model, optimizer)
    expected = [*model.parameters(), *(optimizer.state[p]["hessian"] for p in model.parameters())]
    for ours, theirs in zip(expected, two_ranks[name, 0], strict=name == "zero"):
        torch.testing.assert_close(torch.from_numpy(theirs), ours.detach(), rtol=2e-5, atol=2e-6)
    for a, b in zip(two_ranks[name, 0], two_ranks[name, 1], strict=False):
        assert (a == b).all()


def test_hutchinson_keeps_the_ranks_together_and_averages_their_estimates(two_ranks):
    (params, estimates, hessians), (other, others, _) = two_ranks["hutchinson", 0], two_ranks["hutchinson", 1]
    for a, b in zip(params, other, strict=True):
        assert (a == b).all(), "ranks differ"
    for a, b, h in zip(estimates, others, hessians, strict=True):
        torch.testing.assert_close(torch.from_numpy(0.01 * (a + b) / 2), torch.from_numpy(h))
    assert any((a != b).any() for a, b in zip(estimates, others, strict=True)), "every rank has its own u"


def test_estimates_that_not_all_ranks_have_are_refused_on_all(two_ranks):
    for rank in (0, 1):
        message, states = two_ranks["partial", rank]
        assert "the ranks have estimates of different parameters; pass zeros" in message and states == 0


def test_what_does_not_work_on_shards_is_refused_and_one_ranks_inf_skips_the_estimate_on_all(two_ranks):
    for rank in (0, 1):
        found = two_ranks["sharded", rank]
        assert "does not work on sharded parameters" in found["hutchinson"]
        assert found["unchanged"] and found["skipped"] == 1
        assert "is not sharded as its parameter is" in found["not sharded"]


def test_activation_checkpointing_changes_nothing():
    plain, checkpointed = make(), make()
    checkpointed[0].checkpointed = True
    train(*plain)
    train(*checkpointed)
    for p, q in zip(plain[0].parameters(), checkpointed[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
def test_a_compiled_model_trains_as_the_plain_one(cls):
    plain, compiled = make(cls), make(cls)
    train(*plain)
    train(torch.compile(compiled[0], backend="aot_eager"), compiled[1])
    for p, q in zip(plain[0].parameters(), compiled[0].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_labels_of_a_step_do_not_depend_on_the_micro_batch():
    logits, uniform = torch.randn(6, 4, 30), torch.rand(6, 4)
    halves = [sample_labels(a, uniform=b) for a, b in zip(logits.split(3), uniform.split(3), strict=True)]
    assert torch.equal(torch.cat(halves), sample_labels(logits, uniform=uniform))
