"""Ranks as torchrun starts them, but forks of a process that has imported torch: that takes seconds for each rank."""

import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_adam", "train_sophiag", "torch._dynamo", "torch.distributed.fsdp"])
PATIENCE = 30  # seconds that the other ranks have to notice that one has failed


def run_ranks(ranks, script, words, timeout):
    """Run a script on `ranks` processes; their returncode, stdout and stderr. TimeoutError after `timeout` seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deadline, failed = time.monotonic() + timeout, False
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            settings = sizes | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            settings["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{rank}/error.json"
            environment = os.environ | {key: str(value) for key, value in settings.items()}
            processes.append(FORKS.Process(target=_be_rank, args=(script, words, environment, folder), daemon=True))
            processes[-1].start()
        while (alive := [p for p in processes if p.is_alive()]) and time.monotonic() < deadline:
            wait([p.sentinel for p in alive], timeout=1)
            if not failed and any(p.exitcode for p in processes):
                failed, deadline = True, min(deadline, time.monotonic() + PATIENCE)
        for p in processes:
            p.kill()
            p.join()
        output = {name: Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr")}
    if alive and not failed:
        raise TimeoutError(f"{script} took more than {timeout} s\n{output['stdout']}\n{output['stderr']}")
    return SimpleNamespace(returncode=next((p.exitcode for p in processes if p.exitcode), 0), **output)


def _be_rank(script, words, environment, folder):
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.enable()
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
