"""Whatever is thrown at the scripts: a clean run, or one sentence and exit code 2; nothing half-written."""

import contextlib
import io
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compare
import evaluate
import export_hf
import sample
import sweep
import train_adam
import train_sophiag
from tests.conftest import tiny_words, write_corpus
from training.checkpoint import load_checkpoint
from training.config import describe
from training.errors import UserError, command

NAMES = [name for name, *_ in describe(train_sophiag.SophiaConfig)]
KEPT = ("out_dir", "dataset", "wandb_log", "compile", "device", "backend", "init_from")  # what would leave the sandbox
SIZES = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "total_bs",
    "batch_size",
    "max_iters",
    "eval_tokens",
    "eval_iters",
)
SMALL = ["--max_iters=2", "--eval_tokens=64"]
few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def ends_well(main, argv):
    """Run `main(argv)`; 0 after a clean run, 2 after one sentence. Anything else fails the test."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        try:
            command(lambda: main([str(argument) for argument in argv]))
            return 0
        except SystemExit as ended:
            code = ended.code or 0
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
    assert code in (0, 2), errors.getvalue()
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 20, lines
    return code


@pytest.mark.parametrize("script, argv", [(sample, []), (evaluate, []), (export_hf, ["--to=hf"])])
def test_scripts_of_one_process_are_refused_under_torchrun(monkeypatch, script, argv):
    """Each rank would do all of it, and print all of it."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start it without torchrun"):
        script.main(argv)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=12)
constants = st.sampled_from(["", "True", "None", "1e3", "0x10", "float16"])
values = st.one_of(st.integers(-3, 40).map(str), st.integers().map(str), st.floats().map(str), constants, texts)
arguments = st.one_of(
    st.tuples(st.sampled_from([name for name in NAMES if name not in KEPT + SIZES]), values).map(
        "--{0[0]}={0[1]}".format
    ),
    st.tuples(st.sampled_from(SIZES), st.integers(-2, 30)).map("--{0[0]}={0[1]}".format),
    texts,
)


@pytest.mark.parametrize("script", [train_adam, train_sophiag], ids=["adam", "sophiag"])
@few
@given(extra=st.lists(arguments, max_size=4))
def test_command_lines(corpus, tmp_path_factory, script, extra):
    out_dir = tmp_path_factory.mktemp("lines") / "out"
    code = ends_well(script.main, [*tiny_words(corpus, out_dir), *SMALL, *extra])
    if out_dir.exists():
        left = {path.name for path in out_dir.iterdir()}
        assert not [name for name in left if name.endswith((".tmp", ".link")) or ".probe" in name]
        assert code == 0 or not left, left


constants = st.one_of(st.integers(-3, 30), st.floats(), st.booleans(), st.none(), st.text("ab'\"\\\n"), st.just([1]))
lines = st.one_of(
    st.tuples(st.sampled_from([name for name in NAMES if name not in KEPT]), constants).map(
        lambda pair: f"{pair[0]} = {pair[1]!r}"
    ),
    st.sampled_from(
        ["import os", "raise SystemExit(3)", "1 / 0", "def f(:", "x = open('/no/such')", "x = float('nan')"]
    ),
    texts,
)


@few
@given(content=st.lists(lines, max_size=4).map("\n".join))
def test_config_files(corpus, tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("files")
    (folder / "config.py").write_text(content, encoding="utf-8")
    ends_well(train_adam.main, [*tiny_words(corpus, folder / "out"), folder / "config.py", *SMALL])


sizes, names = st.one_of(st.integers(-1, 70000), texts, st.none()), st.one_of(texts, st.none())
metas = st.fixed_dictionaries({"vocab_size": sizes, "tokenizer": names}).map(lambda meta: json.dumps(meta).encode())


@few
@given(
    train=st.binary(max_size=1200),
    val=st.binary(max_size=200),
    meta=st.one_of(st.none(), st.binary(max_size=30), metas),
)
def test_token_files(tmp_path_factory, train, val, meta):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "train.bin").write_bytes(train)
    (folder / "val.bin").write_bytes(val)
    if meta is not None:
        (folder / "meta.json").write_bytes(meta)
    argv = tiny_words(folder, folder / "out")
    ends_well(train_adam.main, [*argv, *SMALL, "--block_size=4", "--total_bs=2", "--batch_size=2", "--n_layer=1"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    corpus = write_corpus(folder / "corpus")
    characters = "".join(map(chr, range(64, 128)))
    (corpus / "meta.json").write_text(json.dumps({"vocab_size": 64, "tokenizer": {"characters": characters}}))
    train_adam.main([*tiny_words(corpus, folder / "out"), "--max_iters=4", "--eval_interval=2"])
    return folder


@settings(few, max_examples=12)
@given(data=st.data())
def test_checkpoint_bytes(finished, tmp_path_factory, data):
    """Both checkpoints spoiled in ways of their own: the run goes on from one that is whole, or says so."""
    out_dir = shutil.copytree(finished / "out", tmp_path_factory.mktemp("bytes") / "out")
    spoiled = []
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        content = bytearray((out_dir / name).read_bytes())
        (out_dir / name).unlink()
        how = data.draw(st.sampled_from(["whole", "flip", "cut", "random", "gone"]), name)
        if how == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        elif how == "random":
            content = data.draw(st.binary(max_size=300))
        if how != "gone":
            (out_dir / name).write_bytes(content)
        spoiled.append(how != "whole")
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    argv = [*tiny_words(finished / "corpus", out_dir), "--max_iters=6", "--eval_interval=2", "--init_from=resume"]
    code = ends_well(train_adam.main, argv)
    assert code == (2 if all(spoiled) else 0)
    if code:
        assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before, "nothing overwritten"
    else:
        assert load_checkpoint(out_dir)[0]["step"] == 6


KEYS = ["temperature", "top_k", "top_p", "seed", "stride", "split", "jobs", "seeds", "to", "start"]
tool_arguments = st.one_of(
    st.tuples(st.sampled_from(KEYS), values).map("--{0[0]}={0[1]}".format),
    st.tuples(st.sampled_from(["metrics.jsonl", "config.json", "ckpt.pt"]), st.binary(max_size=60)),  # a file spoiled
    texts,
)


@pytest.mark.parametrize("script", [sample, evaluate, export_hf, compare, sweep], ids=lambda script: script.__name__)
@few
@given(extra=st.lists(tool_arguments, max_size=3))
def test_the_other_scripts(finished, tmp_path_factory, monkeypatch, script, extra):
    folder = tmp_path_factory.mktemp("tools")
    out_dir = shutil.copytree(finished / "out", folder / "out")
    monkeypatch.chdir(folder)
    for name, content in (argument for argument in extra if isinstance(argument, tuple)):
        (out_dir / name).unlink()
        (out_dir / name).write_bytes(content)
    argv = [argument for argument in extra if isinstance(argument, str)]
    start = [f"--out_dir={out_dir}", "--device=cpu"]
    if script is compare:
        start = [str(out_dir)]
    elif script is sweep:
        start = ["nothing.py", f"--out_dir={folder / 'sweep'}"]
    elif script is export_hf:
        start = [f"--out_dir={out_dir}"]
    elif script is sample:
        start += ["--max_new_tokens=3", "--start=A"]
    ends_well(script.main, [*start, *argv])
