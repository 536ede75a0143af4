"""wandb's client with a stand-in for its server: one clean curve after a kill, whatever the server can do."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import ROOT, read_lines
from training.checkpoint import load_checkpoint

pytest.importorskip("wandb")


class Server(ThreadingHTTPServer):
    """A stand-in for wandb's server. runs: {id: its lines of history}. rewinds: whether it can cut them."""

    daemon_threads = True

    def __init__(self, rewinds):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.rewinds, self.url = {}, rewinds, f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client was killed."""

    def answer(self, operation, values):
        """The data of a GraphQL operation."""
        project = {"id": "p", "name": "sophia", "entity": {"id": "e", "name": "me"}}
        name = values.get("name") or values.get("runName")
        lines = self.runs.get(name)
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": self.url} for file in values["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if operation == "UpsertBucket":
            lines = self.runs.setdefault(name, [])
        if operation == "RewindRun":
            if not self.rewinds:
                return None
            lines[:] = [line for line in lines if line["_step"] <= values["metricValue"]]
        bucket = {"id": "x", "name": name, "displayName": name, "historyLineCount": len(lines or ()), "config": "{}"}
        bucket |= {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "project": project}
        bucket |= {"historyTail": json.dumps([json.dumps(line) for line in (lines or ())[-1:]])}
        bucket |= {"summaryMetrics": "{}", "wandbConfig": '{"t": 1}'}
        return {
            "model": project | {"bucket": None if lines is None else bucket},
            "upsertBucket": {"bucket": bucket, "inserted": True},
            "rewindRun": {"rewoundRun": bucket},
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            data = self.server.answer(asked.get("operationName"), asked.get("variables") or {})
            answer = {"data": data} if data else {"data": None, "errors": [{"message": "no preview here"}]}
        elif self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                lines = self.server.runs[self.path.split("/")[-2]]
                lines[history["offset"] :] = map(json.loads, history["content"])
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST


@pytest.fixture
def start(tiny):
    """Function that starts a training script that logs to a stand-in server."""

    def start(server, *more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        environment |= {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}
        command = [sys.executable, str(ROOT / "train_adam.py"), *tiny, "--wandb_log=True", "--init_from=auto", *more]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **streams)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("rewinds", [True, False])
def test_a_run_that_was_killed_has_one_clean_curve(tmp_path, start, rewinds):
    """It is killed after its checkpoint. What it logged after that stays on no chart of the run that goes on."""
    with Server(rewinds) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = start(server, "--max_iters=100000", "--lr_decay_iters=40", "--eval_interval=20")
        deadline = time.monotonic() + 90
        while not any(line["step"] > 25 for lines in list(server.runs.values()) for line in list(lines)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoint, _ = load_checkpoint(tmp_path / "out")
        first, step = checkpoint["wandb_id"], checkpoint["step"]
        time.sleep(1)  # wandb's own process sends what it has
        aborted = max(line["step"] for line in server.runs[first])

        process = start(server, f"--max_iters={step + 40}", "--lr_decay_iters=40", "--eval_interval=20")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        resumed = load_checkpoint(tmp_path / "out")[0]["wandb_id"]
        assert (resumed == first) == rewinds and len(server.runs) == 1 + (not rewinds)
        curve = server.runs[resumed]
        expected = read_lines(tmp_path / "out")
        assert [line["step"] for line in curve] == [line["step"] for line in expected] == list(range(step + 41))
        assert all(line["_step"] == line["step"] for line in curve)
        for key in ("train/loss", "seconds"):  # the seconds of the second attempt are others
            assert [line.get(key) for line in curve] == [line.get(key) for line in expected], key
        assert max(line["step"] for line in server.runs[first]) == (step + 40 if rewinds else aborted)
        warnings = re.findall("warning", errors, re.IGNORECASE)
        assert len(warnings) == (0 if rewinds else 1), errors


@pytest.mark.slow  # as the one above, without the kill
def test_a_run_that_was_stopped_goes_on_under_its_id(tmp_path, start):
    with Server(rewinds=False) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for steps in (10, 20):
            _, errors = start(server, f"--max_iters={steps}", "--lr_decay_iters=20").communicate(timeout=120)
            assert "warning" not in errors.lower(), errors
        (curve,) = server.runs.values()
        assert [line["step"] for line in curve] == list(range(21))


@pytest.mark.slow
def test_a_project_that_does_not_know_the_run_gets_all_of_its_lines(start):
    """The second server stands for another project: the run's id is new to it."""
    for steps in (10, 20):
        with Server(rewinds=False) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            _, errors = start(server, f"--max_iters={steps}", "--lr_decay_iters=20").communicate(timeout=120)
            assert "warning" not in errors.lower(), errors
            (curve,) = server.runs.values()
            assert [line["step"] for line in curve] == list(range(steps + 1))
