"""The ranks of a run: which devices they may have, and whether they are on one machine."""

import socket

import pytest

from train_adam import AdamConfig
from training.config import load_config
from training.distributed import Distributed
from training.errors import UserError, command


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
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=message):
        Distributed(device)


def test_an_error_of_one_of_several_machines_names_it():
    with Distributed("cpu") as world:
        world.one_machine = False
        for said in ("train.bin is missing.", f"train.bin is missing (on {socket.gethostname()})."):

            def fails(said=said):
                raise UserError(said)

            with pytest.raises(UserError, match=rf"^train.bin is missing \(on {socket.gethostname()}\)\.$"):
                world.local_rank0_first(fails)


@pytest.mark.parametrize("local, one_machine", [(None, True), (8, True), (4, False)])
def test_one_machine_or_several(monkeypatch, local, one_machine):
    monkeypatch.setattr(Distributed, "_join", lambda *_: None)
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": local}.items():
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert Distributed("cpu").one_machine == one_machine


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"RANK": "x"}, "RANK = 'x'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2 is not below WORLD_SIZE = 2"),
        ({"RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT = None"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = -1"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT = 99999"),
        ({"RANK": "0", "LOCAL_RANK": "first"}, "LOCAL_RANK = 'first'"),
    ],
)
def test_an_environment_that_no_launcher_made_is_one_sentence(monkeypatch, capsys, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command(lambda: Distributed("cpu"))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and "start the ranks with torchrun" in error


def test_a_timeout_beyond_any_clock_is_refused(capsys):
    with pytest.raises(SystemExit):
        command(lambda: load_config(AdamConfig, [f"--nccl_timeout={10**30}"]))
    assert "nccl_timeout" in capsys.readouterr().err


def test_a_world_size_alone_is_no_world(monkeypatch, capsys):
    """It would leave out the batches of ranks that are not there."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        for text in ("4", "x", ""):
            monkeypatch.setenv(name, text)
            world = Distributed("cpu")
            assert (world.size, world.local_rank, world.one_machine) == (1, 0, True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        command(lambda: Distributed("nothing"))
    assert "device = 'nothing'" in capsys.readouterr().err, "a process that is alone says what is wrong"
