"""Scripts on closed pipes, full disks, closed streams, Ctrl-C and terminals that cannot print a character."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, read_lines
from training.checkpoint import load_checkpoint
from training.terminal import printable, warn

TOOL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from training.errors import command
def main():
    for i in range(20000):
        print("line", i)
    open(sys.argv[1], "w").close()
command(main, goes_on=GOES_ON)
"""


def shell(tmp_path, redirection, goes_on=False, code=TOOL, **environment):
    """(exit code of the script, what is on stderr, whether it came to its end)."""
    (tmp_path / "tool.py").write_text(code.replace("GOES_ON", str(goes_on)))
    done = tmp_path / "done"
    done.unlink(missing_ok=True)
    line = f"{{ {sys.executable} {tmp_path}/tool.py {done} {redirection}"
    if "|" not in line:
        line += "; }"
    line = line.replace(" |", "; echo $? > " + str(tmp_path / "code") + "; } |")
    finished = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    code = int((tmp_path / "code").read_text()) if "|" in redirection else finished.returncode
    return code, finished.stderr, done.exists()


def test_a_tool_ends_quietly_when_its_reader_goes(tmp_path):
    assert shell(tmp_path, "| head -3") == (141, "", False)
    code, errors, done = shell(tmp_path, "| head -3", goes_on=True)
    assert (code, done) == (0, True), "a run goes on"
    assert errors == "warning: stdout cannot be written (Broken pipe); the run goes on without it.\n"


def test_a_full_disk_for_stdout_is_one_sentence(tmp_path):
    code, errors, done = shell(tmp_path, "> /dev/full")
    assert (code, done) == (1, False) and errors.count("\n") == 1 and errors.startswith("error: stdout cannot be")
    code, errors, done = shell(tmp_path, "> /dev/full", goes_on=True)
    assert (code, done) == (0, True) and errors.count("\n") == 1 and errors.startswith("warning: ")


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&- <&-", "> /dev/null 2> /dev/full", "> /dev/null 2>&-"])
def test_streams_that_were_never_open_matter_to_nobody(tmp_path, redirection, goes_on):
    assert shell(tmp_path, redirection, goes_on) == (0, "", True)


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = TOOL.replace("for i in range(20000):", "file = open(sys.argv[1] + '.txt', 'w')\n    for i in range(3):")
    assert shell(tmp_path, ">&- 2>&-", code=code)[0] == 0
    assert (tmp_path / "done.txt").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_character_is_printed_on_any_terminal(tmp_path, encoding):
    code = TOOL.replace('print("line", i)', 'print("é 中 \\ud800 \\x1b[2J\\u202e")').replace("20000", "1")
    (tmp_path / "tool.py").write_text(code.replace("GOES_ON", "False"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "tool.py", tmp_path / "done"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0 and done.stderr == b""
    text = done.stdout.decode(encoding)
    assert text.endswith("\\ud800 \\x1b[2J\\u202e\n")
    assert text.startswith("é 中" if encoding == "utf-8" else "\\xe9 \\u4e2d" if encoding == "ascii" else "é \\u4e2d")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_a_tool_quietly_and_it_tidies_up(tmp_path, number, code):
    waits = "print('begun', flush=True)\n            __import__('time').sleep(60)"
    tidies = f"try:\n            {waits}\n        finally:\n            open(sys.argv[1], 'w').close()"
    (tmp_path / "tool.py").write_text(TOOL.replace('print("line", i)', tidies).replace("GOES_ON", "False"))
    command = [sys.executable, tmp_path / "tool.py", tmp_path / "done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        assert process.communicate(timeout=30) == (b"", b"") and process.returncode == code
    assert (tmp_path / "done").exists()


STOPS = """
import sys
class Finder:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("numpy", "torch", "tqdm", "analysis.runs", "tiktoken", "matplotlib"):
            import time
            print("begun", flush=True)
            try:
                time.sleep(60)
            except BaseException:
                raise ImportError("as NumPy turns it into")
sys.meta_path.insert(0, Finder)
"""
SCRIPTS = ["train_adam", "train_sophiag", "sample", "evaluate", "export_hf", "sweep", "compare", "bench"]


@pytest.mark.parametrize("script", [*SCRIPTS, "data/text/prepare", "data/python/prepare"])
def test_ctrl_c_during_the_imports_is_quiet(tmp_path, script):
    (tmp_path / "sitecustomize.py").write_text(STOPS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **streams) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"") and process.returncode == 130


@pytest.mark.parametrize("error", ["open('/none/file')", "open('/dev/full', 'w', 1).write('x\\n')", "open('x' * 300)"])
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, error):
    code, errors, _ = shell(tmp_path, "", code=TOOL.replace('print("line", i)', error))
    assert code in (1, 2) and errors.count("\n") == 1 and errors.startswith("error: "), errors


def test_warnings_are_one_line_that_steers_no_terminal(capsys, monkeypatch):
    warn("two\nlines \x1b[31mred\x07 \u202e")
    assert capsys.readouterr().err == "warning: two lines \\x1b[31mred\\x07 \\u202e\n"
    assert printable("tab\tand\nline") == "tab\tand\nline"
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))
    warn("nobody hears it")


def test_a_run_outlives_its_terminal(tiny, tmp_path):
    """A pipe that closes after the first line, a full disk for stderr, then Ctrl-C: it trains on, then checkpoints."""
    command = [sys.executable, ROOT / "train_adam.py", *tiny, "--max_iters=100000", "--eval_interval=100000"]
    with open("/dev/full", "w") as full, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full) as process:
        assert process.stdout.readline()
        process.stdout.close()
        while len(read_complete(tmp_path / "out" / "metrics.jsonl")) < 5:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert load_checkpoint(tmp_path / "out")[0]["step"] == read_lines(tmp_path / "out")[-1]["step"] + 1


def read_complete(path):
    return path.read_text().splitlines() if path.exists() else []
