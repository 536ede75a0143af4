"""Checkpoints that no rank holds complete: a folder in which each rank writes its part of the tensors.

    shards = Shards(checkpoint, number=1, world=world)                # on every rank: a copy of its part in host memory
    write_folder("ckpt.1.tmp", {..., "shards": shards}, [shards.try_to_write("ckpt.1.tmp")])
    content, manifest = read_folder("ckpt")                           # tensors without storage, until `read_part`

    __RANK_0.distcp  the tensors that a rank wrote, in torch.distributed.checkpoint's format
    .metadata        for its loader. It is a pickle, so this project never reads it
    run.pt           everything else
    manifest.json    step, settings, size and SHA-256 of every file, where each tensor lies, and a SHA-256 of all this

The ranks agree through `world.store`, never by a collective, so no thread waits for a lost rank.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import stat
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from training.errors import UserError
from training.foreign import is_plain_name, load_tensors, parse_json, read_bytes, sha256_of_file

MANIFEST, REST = "manifest.json", "run.pt"
PARTS = ("model", "optimizer")  # of a checkpoint: their tensors are stored in shards
_POLL, _PATIENCE = 0.05, 10  # seconds between two looks into the store, and for an answer after a rank was lost


class HashingFile:
    """A file to write, which keeps size and SHA-256 of its content. Hash, disk and serialization overlap."""

    SYNC = 1 << 28  # bytes between two requests to bring them to the disk

    def __init__(self, path, mode="wb"):
        self.file, self.size, self._digest = open(path, mode), 0, hashlib.sha256()
        self._threads, self._syncing, self._synced, self._error = ThreadPoolExecutor(2), None, 0, None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.file.flush()
                if self._syncing:
                    self._syncing.result()  # the system tells an error of the disk once
                os.fsync(self.file.fileno())
        finally:
            self._threads.shutdown()
            self.file.close()

    def write(self, data):
        try:
            hashed = self._threads.submit(self._digest.update, data) if len(data) > 1 << 16 else None
            try:
                self.file.write(data)
            finally:
                hashed.result() if hashed else self._digest.update(data)  # torch frees `data` when this returns
            self.size += len(data)
            if self.size - self._synced > self.SYNC and (self._syncing is None or self._syncing.done()):
                if self._syncing:
                    self._syncing.result()
                self._syncing, self._synced = self._threads.submit(os.fsync, self.file.fileno()), self.size
        except OSError as error:
            self._error = error  # torch.save raises a RuntimeError instead of it
            raise
        return len(data)

    def flush(self):
        self.file.flush()

    def save(self, thing):
        """torch.save it. OSError if the disk fails."""
        try:
            torch.save(thing, self)
        except RuntimeError as error:
            raise self._error or error from None

    @property
    def sha256(self):
        return self._digest.hexdigest()

    def facts(self):
        return {"bytes": self.size, "sha256": self.sha256}


# ----- writing


class Shards:
    """This rank's part of a checkpoint, in host memory. Every rank has to make it.

    number: of the checkpoint in this run.
    rest: the checkpoint without the tensors of PARTS. tied: {path: path of the same tensor}.

    A rank writes its rows of a DTensor. Any other tensor is written by the first rank that has one of its path.
    """

    def __init__(self, checkpoint, number, world, alive=(), forget=lambda alive: None):
        """alive: on rank 0, the numbers of the checkpoints that may still be written.

        forget: called with rank 0's `alive` before memory is taken.
        """
        self.number, self._rank = number, world.rank
        self.rest, tensors, self.tied = _take_out(checkpoint)
        complete = [path for path, tensor in tensors.items() if not hasattr(tensor, "to_local")]
        found = world.gather((list(alive), complete))
        forget(found[0][0])
        others = {path for _, paths in found[: world.rank] for path in paths}
        parts = {path: _part(tensor) for path, tensor in tensors.items() if path not in others}
        self._parts = {
            path: (about, offsets, part.to("cpu", copy=True))
            for path, (about, offsets, part) in parts.items()
            if part is not None
        }

    def try_to_write(self, folder):
        """Write this rank's file. Returns {"files": ..., "tensors": ...} as in the manifest, or {"error": text}."""
        try:
            return self._write(folder)
        except Exception as error:  # a full disk, mostly
            return {"error": f"rank {self._rank}: {error}"}

    def _write(self, folder):
        name, tensors = f"__{self._rank}_0.distcp", {}
        with HashingFile(Path(folder) / name, "xb") as file:  # never over one of another checkpoint
            for path, (about, offsets, part) in self._parts.items():
                start = file.size
                file.save(part)
                chunk = {"offsets": offsets, "sizes": list(part.shape), "file": name, "start": start}
                tensors[path] = {**about, "chunks": [{**chunk, "bytes": file.size - start}]}
        return {"files": {name: file.facts()}, "tensors": tensors}


def _take_out(checkpoint):
    """(checkpoint without the tensors in PARTS, {path: tensor}, {path: path of the same tensor})."""
    tensors, tied, first = {}, {}, {}

    def walk(thing, path):
        rest = {}
        for key, value in thing.items():
            here = f"{path}/{key}"
            if isinstance(value, dict):
                rest[key] = walk(value, here)
            elif not isinstance(value, torch.Tensor):
                rest[key] = value
            elif first.setdefault(id(value), here) == here:
                tensors[here] = value
            else:
                tied[here] = first[id(value)]
        return rest

    return {**checkpoint, **{part: walk(checkpoint[part], part) for part in PARTS}}, tensors, tied


def _part(tensor):
    """(dtype and shape of the tensor, offsets of this rank's part in it, the part or None if it has none to write)."""
    about = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if not hasattr(tensor, "to_local"):
        return about, [0] * tensor.dim(), tensor.detach()
    place = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    is_copy = any(at > 0 and placement.is_replicate() for at, placement in place)
    part = tensor.to_local().detach()
    return about, list(tensor.__create_chunk_list__()[0].offsets), None if is_copy or not part.numel() else part


def write_folder(folder, checkpoint, written):
    """Complete the folder of `checkpoint`, {..., "shards": Shards}, in which the ranks have `written` their parts."""
    folder, shards, tensors = Path(folder), checkpoint["shards"], {}
    for path, about in (item for part in written for item in part["tensors"].items()):
        tensors.setdefault(path, {**about, "chunks": []})["chunks"] += about["chunks"]
    with HashingFile(folder / REST) as file:
        file.save({key: value for key, value in checkpoint.items() if key != "shards"})
    files = {name: facts for part in written for name, facts in part["files"].items()} | {REST: file.facts()}
    settings = {key: str(value) for key, value in checkpoint.get("config", {}).items()}
    manifest = {"step": checkpoint["step"], "config": settings, "files": files, "tensors": tensors, "tied": shards.tied}
    for name, facts in files.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != facts["bytes"]:
            raise OSError(f"{name} of another rank is not there; out_dir must be one folder that all machines see")
    _check_tensors(manifest)
    for name, content in (".metadata", pickle.dumps(_metadata(manifest))), (MANIFEST, _sealed(manifest)):
        with HashingFile(folder / name) as file:
            file.write(content)
    sync_folder(folder)


def sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Exchange:
    """Messages of rank 0's writer to those of the other ranks, and their answers."""

    def __init__(self, world):
        self._world, self._count = world, 0

    def send(self, message):
        self._count += 1
        self._world.store.set(self._key(), json.dumps(message))

    def receive(self):
        """The next message. OSError if it does not come and a rank is lost."""
        self._count += 1
        return self._get(self._key())

    def answer(self, answer):
        self._world.store.set(self._key(self._world.rank), json.dumps(answer))

    def answers(self):
        """Those of all other ranks to the last message, which may come late. OSError if one does not come."""
        answers = []
        for key in map(self._key, range(1, self._world.size)):
            answers.append(self._get(key))
            self._world.store.delete_key(key)
        return answers

    def _key(self, rank=0):
        return f"checkpoint/{self._count}/{rank}"

    def _get(self, key):
        patience = _PATIENCE
        while not self._world.store.check([key]):
            if self._world.rank_lost():
                patience -= _POLL
            if patience < 0:
                raise OSError("a rank was lost")
            time.sleep(_POLL)
        return json.loads(self._world.store.get(key))


class PartWriter:
    """The writer of a rank that is not 0. A thread writes its part of the checkpoints that rank 0's writer names."""

    step = None  # of the newest on disk is known to rank 0

    def __init__(self, out_dir, world):
        self._out_dir, self._world, self._exchange, self._count = out_dir, world, Exchange(world), 0
        self._lock, self._copies, self._thread, self._writing = threading.Condition(), {}, None, False

    def save(self, checkpoint, sharded=True):
        """Copy this rank's part to host memory and leave it to the thread."""
        self._count += 1
        shards = Shards(checkpoint, self._count, self._world, forget=self._forget)
        with self._lock:
            self._copies[self._count] = shards
            self._lock.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
                self._thread.start()

    def wait(self):
        """Wait until rank 0 has no more use for this rank's parts. If it is stopped, so is its store: not for ever."""
        patience = 2 * _PATIENCE
        while (thread := self._thread) and patience > 0:
            thread.join(_POLL)
            if self._world.rank_lost() and not self._writing:
                patience -= _POLL

    def _forget(self, alive, last=math.inf):
        with self._lock:
            for number in [number for number in self._copies if number <= last and number not in alive]:
                del self._copies[number]

    def _work(self):
        while True:
            try:
                message = self._exchange.receive()
            except (OSError, RuntimeError):  # a rank is lost, or the store with its process
                message = {"write": None, "alive": [], "last": math.inf}
            self._forget(message["alive"], message["last"])
            with self._lock:
                while message["write"] not in self._copies and message["write"] and not self._world.rank_lost():
                    self._lock.wait(_POLL)  # it is being copied
                shards = self._copies.get(message["write"])
                if not self._copies:
                    self._thread = None
                    return
            if shards:
                self._writing = True
                written = shards.try_to_write(self._out_dir / message["folder"])
                self._writing = False
                with contextlib.suppress(RuntimeError):
                    self._exchange.answer(written)
            del shards


# ----- reading


def read_folder(path, verify=True):
    """(content of a folder's checkpoint, its manifest). The tensors of the PARTS are on the meta device.

    UserError if a file is missing or, with `verify`, has changed since it was written.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path, verify)
        content = load_tensors(path / REST)
        for name, about in manifest["tensors"].items():
            put(content, name, torch.empty(about["shape"], dtype=_dtype(about), device="meta"))
        for name, first in manifest["tied"].items():
            put(content, name, get(content, first))
    except OSError as error:
        if not (path / MANIFEST).exists():
            remedy = "a checkpoint is the folder ckpt or the file ckpt.pt of a run"
            raise UserError(f"{path} cannot be read (it is a folder without {MANIFEST}); {remedy}.") from None
        name = f", {Path(error.filename).name}" if error.filename else ""
        raise UserError(f"{path} cannot be read ({error.strerror or error}{name}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path} is damaged: {MANIFEST} is not what was written.") from None
    return content, manifest


def _read_manifest(path, verify):
    manifest = parse_json(raw := read_bytes(path / MANIFEST))
    sha256 = manifest.pop("sha256")
    if _sealed(manifest) != raw:
        raise ValueError
    _check_tensors(manifest)
    files = manifest["files"]
    if not all(map(is_plain_name, files)):
        raise ValueError
    status = {name: os.stat(path / name) for name in files}
    intact = [stat.S_ISREG(s.st_mode) and s.st_size == files[name]["bytes"] for name, s in status.items()]  # or a FIFO
    if verify and all(intact):
        with ThreadPoolExecutor(8) as threads:
            found = threads.map(lambda name: sha256_of_file(path / name), files)
            intact = [sha256 == facts["sha256"] for sha256, facts in zip(found, files.values(), strict=True)]
    if not all(intact):
        name = list(files)[intact.index(False)]
        raise UserError(f"{path} is damaged: {name} is not what was written.")
    return {**manifest, "sha256": sha256}


def _sealed(manifest):
    """The manifest's text, with its own SHA-256."""
    sha256 = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": sha256}, sort_keys=True).encode()


def _check_tensors(manifest):
    """ValueError, or another error of a wrong type, if the parts of a tensor do not make it up or are in no file."""
    for path, about in manifest["tensors"].items():
        left, size, row = math.prod(about["shape"]), _dtype(about).itemsize, 0
        for chunk in sorted(about["chunks"], key=lambda chunk: chunk["offsets"]):  # rows, as fully_shard splits them
            place = [*about["shape"], *chunk["offsets"], *chunk["sizes"], chunk["start"], chunk["bytes"]]
            ends = [offset + length for offset, length in zip(chunk["offsets"], chunk["sizes"], strict=True)]
            if not all(type(number) is int and number >= 0 for number in place) or any(
                end > whole for end, whole in zip(ends, about["shape"], strict=True)
            ):
                raise ValueError(f"{path} has parts of a wrong size")
            count, end = math.prod(chunk["sizes"]), chunk["start"] + chunk["bytes"]
            if count * size > chunk["bytes"] or end > manifest["files"][chunk["file"]]["bytes"]:
                raise ValueError(f"{path} has parts that are in no file")
            left -= count
            if chunk["offsets"][:1] not in ([], [row]):
                raise ValueError(f"{path} has parts that overlap, or a gap between them")
            row += sum(chunk["sizes"][:1])
        if left:
            raise ValueError(f"{path} is incomplete")


def _dtype(about):
    if not isinstance(dtype := getattr(torch, about["dtype"]), torch.dtype):
        raise ValueError
    return dtype


def put(content, path, thing):
    """Put `thing` into nested dicts at "a/b/c". None takes away what is there."""
    *keys, last = path.split("/")
    for key in keys:
        content = content.setdefault(key, {})
    if not isinstance(content, dict):
        raise TypeError
    content[last] = thing
    if thing is None:
        del content[last]


def get(content, path):
    for key in path.split("/"):
        content = content[key]
    return content


def read_part(checkpoint, part, target=lambda path, meta: torch.empty_like(meta, device="cpu")):
    """Read the tensors of "model" or "optimizer" into a folder's checkpoint.

    target: (path, tensor on the meta device) -> the tensor that takes it. Of a DTensor only this rank's part is read.
    None: it is left out.
    """
    import torch.distributed.checkpoint as dcp

    folder, manifest, targets = checkpoint.path, checkpoint.manifest, {}
    for path in (path for path in manifest["tensors"] if path.startswith(f"{part}/")):
        put(checkpoint, path, tensor := target(path, get(checkpoint, path)))
        if tensor is not None and _local(tensor).numel():
            targets[path.replace("/", ".")] = tensor
    for path, first in manifest["tied"].items():
        put(checkpoint, path, get(checkpoint, first))

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *arguments, **settings):
            return _metadata(manifest)  # never from .metadata, a pickle

    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the ranks do not read together
        try:
            dcp.load(targets, storage_reader=Reader(folder), planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            ((reason, _),) = error.failures.values()
            raise UserError(f"{folder} cannot be read ({reason}); name another checkpoint.") from None


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _metadata(manifest):
    """The manifest in torch.distributed.checkpoint's form."""
    from torch.distributed.checkpoint import filesystem, metadata

    tensors, places, keys = {}, {}, {}
    for path, about in manifest["tensors"].items():
        chunks, name = [], path.replace("/", ".")
        for chunk in about["chunks"]:
            offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
            chunks.append(metadata.ChunkStorageMetadata(offsets, sizes))
            place = filesystem._StorageInfo(chunk["file"], chunk["start"], chunk["bytes"])
            places[metadata.MetadataIndex(name, offsets)] = place
        properties = metadata.TensorProperties(_dtype(about))
        tensors[name] = metadata.TensorStorageMetadata(properties, torch.Size(about["shape"]), chunks)
        keys[name] = tuple(path.split("/"))
    return metadata.Metadata(tensors, keys, places)
