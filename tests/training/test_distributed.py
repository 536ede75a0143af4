"""The ranks of a run: which devices they may have, and whether they are on one machine."""

import pytest

from training.distributed import Distributed
from training.errors import UserError


@pytest.mark.parametrize(
    "device, ranks, gpus, message",
    [
        ("cuda", 4, 2, r"too few GPUs \(2, ranks: 4\); start --nproc_per_node=2, or"),
        ("cuda", 1, 0, r"too few GPUs \(0, ranks: 1\); use --device=cpu"),
        ("cuda:3", 1, 2, r"too few GPUs \(2, the first is number 0\); name another, or use"),
    ],
)
def test_too_few_gpus_are_noticed_on_the_rank_that_has_one(monkeypatch, device, ranks, gpus, message):
    """On local rank 0, which is the one that speaks; or it would wait for the others, who have left without a word."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=message):
        Distributed(device)


@pytest.mark.parametrize("local, one_machine", [(None, True), (8, True), (4, False)])
def test_one_machine_or_several(monkeypatch, local, one_machine):
    monkeypatch.setenv("WORLD_SIZE", "8")
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert Distributed("cpu").one_machine == one_machine
