"""Checkpoints as folders of shards: written by all ranks or not at all, damage noticed, no code run.

The ranks are threads that share a store, with complete tensors on all of them or on one. For DTensors one process takes
each rank in turn, on torch's fake process group. test_fsdp.py has real ranks.
"""

import contextlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from training.checkpoint import (
    CheckpointWriter,
    all_checkpoints,
    kept_checkpoints,
    load_checkpoint,
    make_newest,
    read_checkpoint,
    recover,
    save_checkpoint,
)
from training.errors import UserError
from training.sharding import read_state
from training.shards import HashingFile, PartWriter, Shards, read_part, write_folder


class Ranks:
    """Writers of `size` ranks, which save together. lost: set when a rank is."""

    def __init__(self, out_dir, size=3, keep=0):
        self.lost, store, self._met = threading.Event(), HashStore(), [None] * size
        self._barrier = threading.Barrier(size)
        worlds = [
            SimpleNamespace(rank=rank, size=size, store=store, rank_lost=self.lost.is_set, gather=self._gather(rank))
            for rank in range(size)
        ]
        self.writers = [CheckpointWriter(out_dir, keep, world=worlds[0])]
        self.writers += [PartWriter(out_dir, world) for world in worlds[1:]]

    def _gather(self, rank):
        def gather(thing):
            self._met[rank] = thing
            self._barrier.wait(10)
            found = list(self._met)
            self._barrier.wait(10)
            return found

        return gather

    def save(self, step, is_best=False):
        states = [state(step, rank, is_best) for rank in range(len(self.writers))]
        threads = [
            threading.Thread(target=writer.save, args=(checkpoint, True))
            for writer, checkpoint in zip(self.writers, states, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for tensor in (s["model"]["w"] for s in states):
            tensor.zero_()  # training goes on

    def wait(self):
        for writer in self.writers:
            writer.wait()


def state(step, rank, is_best=False):
    """What rank `rank` passes on: weights that all have, the factor of one matrix, its random numbers."""
    weight = torch.full((50, 40), float(step))
    matrix = {"exp_avg": torch.arange(6.0).view(2, 3) + step, "step": torch.tensor(float(step))}
    own = {f"matrix{rank}": {"factor": torch.full((3, 3), 10.0 * rank + step)}}
    groups = [{"lr": 0.1, "params": ["matrix", "matrix0", "matrix1", "matrix2"], "betas": (0.9, 0.95)}]
    return {
        "step": step,
        "is_best": is_best,
        "config": {"fsdp": True},
        "model": {"w": weight, "tied": weight},
        "optimizer": {"adamw": {"state": {"matrix": matrix, **own}, "param_groups": groups}},
        "rng": [[torch.get_rng_state()]],
    }


def saved(tmp_path, *steps, **settings):
    ranks = Ranks(tmp_path, **settings)
    for step in steps:
        ranks.save(step)
        ranks.wait()
        assert ranks.writers[0].error is None
    return ranks


def test_each_tensor_is_stored_once_and_read_as_it_was(tmp_path):
    saved(tmp_path, 7)
    loaded, path = load_checkpoint(tmp_path)
    assert path == tmp_path / "ckpt" and loaded["step"] == 7 and torch.equal(loaded["rng"][0][0], torch.get_rng_state())
    assert torch.equal(loaded["model"]["w"], torch.full((50, 40), 7.0))
    assert loaded["model"]["tied"] is loaded["model"]["w"]
    states = loaded["optimizer"]["adamw"]["state"]
    assert [states[f"matrix{rank}"]["factor"][0, 0].item() for rank in range(3)] == [7.0, 17.0, 27.0]
    assert torch.equal(states["matrix"]["exp_avg"], torch.arange(6.0).view(2, 3) + 7) and states["matrix"]["step"] == 7
    assert loaded["optimizer"]["adamw"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert os.path.getsize(path / "__0_0.distcp") > 50 * 40 * 4 > os.path.getsize(path / "__1_0.distcp")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["config"] == {"fsdp": "True"}
    assert manifest["files"].keys() == {"run.pt", *(f"__{rank}_0.distcp" for rank in range(3))}
    only_model = read_checkpoint(path, parts=("model",))
    assert only_model["optimizer"]["adamw"]["state"]["matrix"]["exp_avg"].device.type == "meta"


@contextlib.contextmanager
def as_rank(rank, *mesh):
    """A mesh of that shape, of which this process is one rank. Nothing is exchanged."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh), store=FakeStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", mesh)
    finally:
        dist.destroy_process_group()


def sharded(mesh, tensor):
    """Its rows over the last dimension of the mesh, copies over the first of two."""
    return distribute_tensor(tensor, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)], src_data_rank=None)


@pytest.mark.parametrize("mesh", [(1,), (2,), (4,), (2, 2)])
@pytest.mark.parametrize("after", [(1,), (3,), (4,), (2, 2)])
def test_rows_are_written_once_and_read_by_any_number_of_ranks(tmp_path, mesh, after):
    """With as many rows as ranks, fewer, and numbers that the ranks do not divide."""
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{n}rows": torch.randn(n, 3, generator=draw) for n in (1, 2, 7, 16)} | {"vector": torch.arange(5.0)}
    (tmp_path / "ckpt").mkdir()
    written = []
    for rank in range(math.prod(mesh)):
        with as_rank(rank, *mesh) as devices:
            parts = {"model": {name: sharded(devices, t) for name, t in tensors.items()}, "optimizer": {}, "step": 1}
            world = SimpleNamespace(rank=rank, gather=lambda thing: [thing])
            shards = Shards(parts, 1, world)
            written.append(shards.try_to_write(tmp_path / "ckpt"))
    assert all("error" not in part for part in written), written
    write_folder(tmp_path / "ckpt", {"step": 1, **shards.rest, "shards": shards}, written)
    loaded = read_checkpoint(tmp_path / "ckpt")["model"]
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    for rank in range(math.prod(after)):
        with as_rank(rank, *after) as devices:
            targets = {f"model/{name}": sharded(devices, torch.full_like(t, -1)) for name, t in tensors.items()}
            read_part(read_checkpoint(tmp_path / "ckpt", parts=()), "model", lambda path, meta, to=targets: to[path])
            for name, tensor in tensors.items():
                assert torch.equal(targets[f"model/{name}"].to_local(), sharded(devices, tensor).to_local()), name


def test_a_rank_reads_its_rows_of_momenta_and_the_factors_that_it_owns(tmp_path):
    """Of a folder in which copies of the model, not shards, stored them."""
    saved(tmp_path, 7)
    with as_rank(1, 2) as devices:
        parameters = [sharded(devices, torch.zeros(2, 3)), *(sharded(devices, torch.zeros(4, 4)) for _ in range(3))]
        names = dict(zip(parameters, ("matrix", "matrix0", "matrix1", "matrix2"), strict=True))
        share = SimpleNamespace(rank=1, owner=dict(zip(parameters, (0, 0, 1, 0), strict=True)))
        checkpoint = read_checkpoint(tmp_path / "ckpt", parts=())
        read_state(checkpoint, SimpleNamespace(_share=share), names)
        states = checkpoint["optimizer"]["adamw"]["state"]
        assert states["matrix"]["exp_avg"].to_local().tolist() == [[10.0, 11.0, 12.0]]
        assert [len(states[f"matrix{number}"]) for number in range(3)] == [0, 1, 0]
        assert states["matrix1"]["factor"][0, 0] == 17


def test_torch_distributed_checkpoint_reads_it(tmp_path):
    saved(tmp_path, 7)
    dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "one.pt")
    theirs, ours = torch.load(tmp_path / "one.pt", weights_only=True), load_checkpoint(tmp_path)[0]
    assert torch.equal(theirs["model"]["w"], ours["model"]["w"])
    state = theirs["optimizer"]["adamw"]["state"]
    assert torch.equal(state["matrix2"]["factor"], torch.full((3, 3), 27.0))


def test_newest_previous_best_and_kept(tmp_path):
    ranks = Ranks(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        ranks.save(step, is_best=step == 20)
        ranks.wait()
    names = "ckpt", "ckpt_prev", "ckpt_best", "ckpt_30", "ckpt_40"
    assert [read_checkpoint(tmp_path / name)["step"] for name in names] == [40, 30, 20, 30, 40]
    assert sorted(os.listdir(tmp_path)) == sorted(names), "nothing left over"
    assert [path.name for path in kept_checkpoints(tmp_path)] == ["ckpt_30", "ckpt_40"]
    for which, step in ("best", 20), ("30", 30), (str(tmp_path / "ckpt_prev"), 30), ("newest", 40):
        assert load_checkpoint(tmp_path, which)[0]["step"] == step


def test_a_name_is_a_file_or_a_folder_never_both(tmp_path):
    for step, sharded in enumerate([False, True, True, False, False, True], start=1):
        ranks = Ranks(tmp_path)
        if sharded:
            ranks.save(step, is_best=True)
        else:
            ranks.writers[0].save(state(step, 0, is_best=True))
        ranks.wait()
        assert load_checkpoint(tmp_path)[0]["step"] == load_checkpoint(tmp_path, "best")[0]["step"] == step
        found = os.listdir(tmp_path)
        assert sorted(name.removesuffix(".pt") for name in found) == ["ckpt", "ckpt_best", "ckpt_prev"][: len(found)]
        if step > 1:
            (previous,) = tmp_path.glob("ckpt_prev*")
            assert read_checkpoint(previous)["step"] == step - 1


def test_every_damage_falls_back_to_the_previous_one(tmp_path, capsys):
    saved(tmp_path, 1, 2)
    newest, draw = tmp_path / "ckpt", random.Random(0)
    files = [path for path in sorted(newest.iterdir()) if path.name != ".metadata"]  # which is not read
    for path in files:
        whole = path.read_bytes()
        damaged = [b"", whole[:-1], whole + b" ", whole[::-1]]
        for _ in range(20):
            spoiled = bytearray(whole)
            spoiled[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            damaged.append(bytes(spoiled))
        for content in damaged:
            path.write_bytes(content)
            assert load_checkpoint(tmp_path)[0]["step"] == 1, path.name
        path.unlink()
        assert load_checkpoint(tmp_path)[0]["step"] == 1
        os.mkfifo(path)
        assert load_checkpoint(tmp_path)[0]["step"] == 1
        path.unlink()
        path.write_bytes(whole)
        assert load_checkpoint(tmp_path)[0]["step"] == 2
    said = capsys.readouterr().err.splitlines()  # a thread of an earlier test may have its say too
    named = [sum(line.startswith(f"warning: {newest}") and path.name in line for line in said) for path in files]
    assert named == [26] * len(files)
    shutil.rmtree(tmp_path / "ckpt_prev")
    files[0].unlink()
    with pytest.raises(UserError, match=f"no checkpoint can be read as the newest.*{files[0].name}"):
        load_checkpoint(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_told_of(tmp_path):
    """Most likely the folder of a run, in place of its ckpt."""
    saved(tmp_path, 1)
    for folder in tmp_path, shutil.copytree(tmp_path / "ckpt", tmp_path / "theirs"):
        (folder / "manifest.json").unlink(missing_ok=True)  # torch.distributed.checkpoint writes none
        with pytest.raises(UserError, match=r"is a folder without manifest.json\); .* the folder ckpt"):
            load_checkpoint(tmp_path, str(folder))
    for name in ("__0_0.distcp", "manifest.json"):
        with pytest.raises(UserError, match=rf"{name} is a part of a checkpoint; name its folder, .*ckpt\."):
            load_checkpoint(tmp_path, str(tmp_path / "ckpt" / name))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def resealed(folder, change):
    """Change a folder as someone would who means harm: its hashes fit."""
    import hashlib

    from training import shards

    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    for name, facts in (manifest["files"] or {}).items():
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(shards._sealed(manifest))


def test_no_code_in_a_folder_is_run(tmp_path):
    trap = tmp_path / "ran"
    saved(tmp_path, 1)
    pickled = pickle.dumps(Trap(str(trap)))
    (tmp_path / "ckpt" / ".metadata").write_bytes(pickled)
    assert read_checkpoint(tmp_path / "ckpt")["step"] == 1
    for name in "__0_0.distcp", "run.pt":
        folder = shutil.copytree(tmp_path / "ckpt", tmp_path / f"with{name}")
        whole = (folder / name).read_bytes()
        for content in pickled.ljust(len(whole), b"\0"), torch_saved(Trap(str(trap)), len(whole)):
            (folder / name).write_bytes(content)
            resealed(folder, lambda manifest: None)
            with pytest.raises(UserError):
                read_checkpoint(folder)
    assert not trap.exists()


def torch_saved(thing, size):
    """The thing in torch.save's form, in at least `size` bytes."""
    import io

    file = io.BytesIO()
    torch.save([thing, torch.zeros(size // 4)], file)
    return file.getvalue()


W = "model/w"


def halve_twice(chunks):
    """Two parts of as many numbers as the tensor has, both of its first rows; the others would stay unread."""
    chunks[0].update(sizes=[25, 40])
    chunks.append(dict(chunks[0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../outside": {"bytes": 1, "sha256": "0"}}),
        lambda m: m["tensors"][W]["chunks"][0].update(file="../outside"),
        lambda m: m["tensors"][W]["chunks"][0].update(file="run.pt"),
        lambda m: m["tensors"][W]["chunks"].clear(),
        lambda m: m["tensors"][W]["chunks"][0].update(sizes=[49, 40]),
        lambda m: m["tensors"][W]["chunks"][0].update(offsets=[1, 0]),
        lambda m: halve_twice(m["tensors"][W]["chunks"]),
        lambda m: m["tensors"][W]["chunks"][0].update(start=-1),
        lambda m: m["tensors"][W]["chunks"][0].update(start=1),
        lambda m: m["tensors"][W]["chunks"][0].update(bytes=10**12),
        lambda m: m["tensors"][W].update(shape=[50, 10**12]),
        lambda m: m["tensors"][W].update(shape="x"),
        lambda m: m["tensors"][W].update(dtype="save"),
        lambda m: m["tensors"].update({"model/w/x": m["tensors"][W]}),
        lambda m: m["tensors"].update({"step/x": m["tensors"][W]}),
        lambda m: m.update(tensors=[]),
        lambda m: m.update(files=None),
        lambda m: m["tied"].update({"model/z": "model/nowhere"}),
        lambda m: m.pop("tied"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_sentence(tmp_path, change):
    saved(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"0")
    resealed(tmp_path / "ckpt", change)
    with pytest.raises(UserError, match="ckpt"):
        read_checkpoint(tmp_path / "ckpt")


# ----- writing beside training


def test_of_those_that_wait_the_newest_and_the_best_are_written(tmp_path, monkeypatch, capsys):
    from training import shards

    gate, write = threading.Event(), shards.Shards._write

    def slow(part, folder):
        gate.wait(20)
        return write(part, folder)

    monkeypatch.setattr(shards.Shards, "_write", slow)
    ranks = Ranks(tmp_path)
    ranks.save(1)
    while ranks.writers[0]._next:
        time.sleep(0.01)
    for step in (2, 3, 4, 5, 6):
        ranks.save(step, is_best=step in (2, 4))
        assert all(len(writer._copies) <= 3 for writer in ranks.writers[1:]), "skipped ones take no memory"
    gate.set()
    ranks.wait()
    names = "ckpt_best", "ckpt_prev", "ckpt"
    assert [read_checkpoint(tmp_path / name)["step"] for name in names] == [4, 4, 6]
    assert not any(writer._copies for writer in ranks.writers[1:])
    assert capsys.readouterr().err.count("is skipped") == 3
    ranks.save(7)
    ranks.wait()
    assert load_checkpoint(tmp_path)[0]["step"] == 7


@pytest.mark.parametrize("rank", [0, 2, None])
def test_a_full_disk_on_any_rank_is_a_warning_and_another_try(tmp_path, monkeypatch, capsys, rank):
    saved(tmp_path, 1)
    monkeypatch.setattr(CheckpointWriter, "LAST_RETRY", 0.01)
    from training import shards

    write, failures = shards.Shards._write, itertools.count()

    def fails(part, folder):
        if rank in (part._rank, None) and next(failures) < (3 if rank is None else 2):
            raise OSError(28, "No space left on device")
        return write(part, folder)

    monkeypatch.setattr(shards.Shards, "_write", fails)
    ranks = Ranks(tmp_path)
    ranks.writers[0].step = 1
    ranks.save(2)
    ranks.wait()
    said = capsys.readouterr().err
    others = "; 2 other ranks failed too" if rank is None else ""
    reason = f"(rank {rank or 0}: [Errno 28] No space left on device{others})"
    assert f"step 2 could not be written {reason}; the newest good one is of step 1" in said
    assert load_checkpoint(tmp_path)[0]["step"] == 2 and ranks.writers[0].error is None
    assert read_checkpoint(tmp_path / "ckpt_prev")["step"] == 1 and len(os.listdir(tmp_path)) == 2


def test_a_machine_that_is_led_to_an_older_folder_harms_no_checkpoint(tmp_path, monkeypatch, capsys):
    """As NFS does for some seconds with the name of a folder that was renamed."""
    saved(tmp_path, 1)
    monkeypatch.setattr(CheckpointWriter, "LAST_RETRY", 0.01)
    write, folders = Shards._write, []

    def misled(part, folder):
        if part._rank == 1:
            folders.append(folder)
        return write(part, tmp_path / "ckpt" if part._rank == 1 and len(folders) == 1 else folder)

    monkeypatch.setattr(Shards, "_write", misled)
    ranks = Ranks(tmp_path)
    ranks.save(2)
    ranks.wait()
    assert "(rank 1: [Errno 17] File exists" in capsys.readouterr().err
    assert [read_checkpoint(tmp_path / name)["step"] for name in ("ckpt", "ckpt_prev")] == [2, 1]
    assert len(set(folders)) == 2, "each try has a name of its own"


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir", "link"])
def test_no_error_of_the_disk_ends_the_threads(tmp_path, monkeypatch, call):
    saved(tmp_path, 1)
    monkeypatch.setattr(CheckpointWriter, "LAST_RETRY", 0.01)
    original, failures = getattr(os, call), itertools.count()

    def fails(*arguments, **settings):
        if next(failures) < 2:
            raise OSError(5, os.strerror(5))
        return original(*arguments, **settings)

    ranks = Ranks(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        ranks.save(2)
        ranks.wait()
    assert ranks.writers[0].error is None and load_checkpoint(tmp_path)[0]["step"] == 2
    assert read_checkpoint(tmp_path / "ckpt_prev")["step"] == 1


def test_a_write_ends_when_a_rank_is_lost(tmp_path, monkeypatch, capsys):
    from training import shards

    saved(tmp_path, 1)
    monkeypatch.setattr(shards, "_PATIENCE", 0.2)
    monkeypatch.setattr(shards.Exchange, "answer", lambda exchange, answer: None)  # ranks that are gone
    ranks = Ranks(tmp_path)
    ranks.save(2)
    time.sleep(0.3)
    assert ranks.writers[0]._thread, "it waits for ranks that may be slow"
    ranks.lost.set()
    ranks.wait()
    assert "a rank was lost" in capsys.readouterr().err
    assert load_checkpoint(tmp_path)[0]["step"] == 1 and os.listdir(tmp_path) == ["ckpt"]


def test_a_run_that_was_killed_leaves_nothing_that_is_read(tmp_path):
    """Killed while it wrote, and between any two renames."""
    saved(tmp_path, 1, 2)
    for leftover in "ckpt.1.tmp", "ckpt_prev.aside", "ckpt_best.link":
        shutil.copytree(tmp_path / "ckpt_prev", tmp_path / leftover)
        (tmp_path / leftover / "__1_0.distcp").unlink()
    assert load_checkpoint(tmp_path)[0]["step"] == 2
    os.replace(tmp_path / "ckpt", tmp_path / "ckpt_prev.old2")
    assert load_checkpoint(tmp_path)[0]["step"] == 1, "the newest has become the previous one, and no other is there"
    shutil.rmtree(tmp_path / "ckpt_prev.old2")
    ranks = Ranks(tmp_path)
    for step in 3, 4:
        ranks.save(step, is_best=True)
        ranks.wait()
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "ckpt_best", "ckpt_prev"]
    assert load_checkpoint(tmp_path)[0]["step"] == 4


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(call_number):
    """Within, the process is killed at this call of those that change a folder. Yields a list: empty if it was not."""
    left, happened = itertools.count(call_number, -1), []

    def mortal(call):
        def killed(*arguments, **settings):
            if happened or next(left) <= 1:
                happened.append(call)
                raise Killed
            return call(*arguments, **settings)

        return killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        for name in ("replace", "link", "mkdir", "unlink", "rmdir", "rename"):
            patch.setattr(os, name, mortal(getattr(os, name)))
        yield happened


def save_as(form, out_dir, step, keep=1):
    """Save a folder ("f") or a file ("s"), with a capital letter the best one."""
    content, write_parts = state(step, 0, is_best=form.isupper()), None
    content["optimizer"]["adamw"]["state"] = {}
    if form in "fF":
        shards = Shards(content, step, SimpleNamespace(rank=0, gather=lambda thing: [thing]))
        content, write_parts = {**shards.rest, "shards": shards}, lambda folder, part: [part.try_to_write(folder)]
    save_checkpoint(out_dir, content, keep, write_parts)


@pytest.mark.parametrize("forms", ["FfF", "SsS", "SSfF", "FFsS", "SSFSf"])
def test_a_kill_between_any_two_calls_of_the_system_loses_no_checkpoint(tmp_path, forms):
    """The newest or the one before, the best and the kept one are there. The next saves leave nothing else."""
    (tmp_path / "before").mkdir()
    *before, last = enumerate(forms, start=1)
    for step, form in before:
        save_as(form, tmp_path / "before", step)
    best, steps = max(step for step, form in before if form.isupper()), {before[-1][0], last[0]}
    for calls in itertools.count(1):
        out = shutil.copytree(tmp_path / "before", tmp_path / str(calls))
        with killed_at(calls) as killed:
            save_as(last[1], out, last[0])
        recover(out)  # as the next start does
        assert load_checkpoint(out)[0]["step"] in steps
        assert load_checkpoint(out, "best")[0]["step"] in {best, last[0] if last[1].isupper() else best}
        assert {path.stem for path in kept_checkpoints(out)} & {f"ckpt_{step}" for step in steps}
        for step in last[0] + 1, last[0] + 2:
            save_as(last[1].upper(), out, step)
        assert load_checkpoint(out)[0]["step"] == load_checkpoint(out, "best")[0]["step"] == last[0] + 2
        names = {"ckpt", "ckpt_prev", "ckpt_best", f"ckpt_{last[0] + 2}"}
        assert sorted(name.removesuffix(".pt") for name in os.listdir(out)) == sorted(names)
        if not killed:
            break


@pytest.mark.parametrize("forms", ["fFff", "sSss", "sSff", "fFss"])
def test_a_kill_while_an_older_one_becomes_the_newest_leaves_all_of_them(tmp_path, forms):
    (tmp_path / "before").mkdir()
    for step, form in enumerate(forms, start=1):
        save_as(form, tmp_path / "before", step, keep=4)
    for calls in itertools.count(1):
        out = shutil.copytree(tmp_path / "before", tmp_path / str(calls))
        with killed_at(calls) as killed:
            make_newest(out / ("ckpt_2" if forms[1] == "F" else "ckpt_2.pt"), out)
        recover(out)
        assert {read_checkpoint(path)["step"] for path in all_checkpoints(out)} == {1, 2, 3, 4}
        assert load_checkpoint(out)[0]["step"] in ({2, 4} if killed else {2})
        if not killed:
            break


def test_the_hash_is_that_of_the_file(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(HashingFile, "SYNC", 1 << 20)
    pieces = [os.urandom(size) for size in (10, 1 << 21, 1 << 17, 3, 1 << 22)]
    with HashingFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces) and file.facts() == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_an_error_of_an_early_fsync_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(HashingFile, "SYNC", 1)
    errors = itertools.chain([OSError(5, "Input/output error")], itertools.repeat(None))

    def told_once(descriptor):
        if error := next(errors):
            raise error

    monkeypatch.setattr(os, "fsync", told_once)
    with pytest.raises(OSError, match="Input/output"), HashingFile(tmp_path / "file") as file:
        file.write(b"1234")
