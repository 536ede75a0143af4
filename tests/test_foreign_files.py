"""Files that others wrote: one sentence for each that is not what it claims to be. Nothing in them is run."""

import json
import math
import os
import pickle
import time

import numpy as np
import pytest
import torch

import compare
import evaluate
import sample
import sweep
import train_adam
from analysis.runs import group, read_run, read_sweep
from analysis.tables import report, run_table
from experiments import collect
from tests.analysis.made_runs import write_run, write_seeds
from tests.conftest import tiny_words, write_corpus
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import check_split, open_dataset
from training.errors import UserError, command
from training.foreign import load_tensors, parse_json, read_json
from training.metrics import read_metrics
from training.schedule import sequence_length

DEEP = "[" * 100_000 + "]" * 100_000
NUMBERS = ["1" + "0" * 400, "1" + "0" * 5000, "1e400", "-1e999", "NaN", "Infinity"]
VALUES = [None, "x", "a\0b", -1, 0, 1.5, True, [], {}, [[]], {"a": []}, 10**18, "\x1b[2J", "<script>$x$|"]


def refused(main, argv, capsys):
    """The one sentence with which `main` refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(list(map(str, argv))))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert ended.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


# ----- JSON


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 500 + "1" + "}" * 500, *NUMBERS], ids=lambda text: text[:8])
def test_json_beyond_any_use_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        parse_json(text)
    for name in ("meta.json", "config.json", "sweep.json"):
        (tmp_path / name).write_text('{"step": 1, "vocab_size": ' + text + "}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "x": ' + text + "}\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]
    for read in (read_run, read_sweep, lambda folder: open_dataset(folder)):
        with pytest.raises(UserError, match="json"):
            read(tmp_path)


def test_a_fifo_and_a_huge_file_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(UserError, match="is not a file"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        load_tensors(tmp_path / "meta.json")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)  # sparse
    for read in (read_json, read_metrics):
        with pytest.raises(UserError, match="is it damaged"):
            read(tmp_path / "large")


@pytest.mark.parametrize("name", ["/dev/zero", "fifo.py", "large.py", "folder.py"])
def test_what_is_no_short_text_is_no_config_sweep_or_prompt(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.py")
    os.mkdir("folder.py")
    with open("large.py", "wb") as file:
        file.truncate(1 << 40)
    assert name in refused(train_adam.main, [name], capsys)
    if name.endswith(".py"):
        assert name in refused(sweep.main, [name, "--out_dir=out"], capsys)
    if name != "fifo.py":  # that may be a pipe in which someone writes
        with pytest.raises(UserError, match=name):
            sample.prompt_ids(f"FILE:{name}", None)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_wrong_types_anywhere_in_a_runs_files(tmp_path, value, capsys):
    """Each value of config.json replaced, each removed: compare.py prints tables or one sentence."""
    run = write_run(tmp_path / "a")
    whole = json.loads((tmp_path / "a" / "config.json").read_text())
    places = [(key,) for key in whole] + [(key, inner) for key in ("config", "data", "model") for inner in whole[key]]
    for place in places:
        for remove in (False, True):
            facts = json.loads(json.dumps(whole))
            parent = facts if len(place) == 1 else facts[place[0]]
            if remove:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            (tmp_path / "a" / "config.json").write_text(json.dumps(facts))
            ends_well(tables, [run], capsys)
    (tmp_path / "a" / "config.json").write_text(json.dumps(whole | {"history": [{"step": 1, "changed": value}]}))
    ends_well(tables, [run], capsys)
    (tmp_path / "a" / "config.json").write_text(json.dumps(whole))
    keys = ("step", "tokens", "seconds", "flops", "val/loss", "train/loss", "train/clip_rate", "lr")
    for key in keys:
        lines = [{"step": 100, "tokens": 1, "seconds": 1.0, "val/loss": 2.0} | {key: value}]
        (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ends_well(tables, [run], capsys)


def tables(folders):
    groups = group([read_run(folder) for folder in folders])
    print("\n".join([*report(groups), *run_table(groups)]))


def ends_well(main, argv, capsys):
    try:
        main(argv)
    except UserError as error:
        assert len(str(error)) > 20
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_wrong_types_anywhere_in_a_sweep_json(tmp_path, value, capsys):
    run = {"run": "adamw_1", "optimizer": "adamw", "swept": {"lr": 1}, "seed": None, "loss": 1.0, "error": ""}
    whole = {"sweep": {"common": {}, "optimizers": {"adamw": {}}}, "runs": [run]}
    broken = [whole | {key: value} for key in whole] + [whole | {"runs": [run | {key: value}]} for key in run]
    broken += [whole | {"sweep": whole["sweep"] | {key: value}} for key in whole["sweep"]]
    definition = {"common": {}, "optimizers": {"adamw": {}}}
    for state in broken:
        (tmp_path / "sweep.json").write_text(json.dumps(state))
        for main in (
            lambda: sweep.read_state(tmp_path, definition),
            lambda: collect.main(["n", str(tmp_path)], tmp_path),
        ):
            ends_well(lambda _, main=main: main(), None, capsys)


def test_a_sweep_json_cannot_lead_out_of_its_folder(tmp_path):
    for name in ("../x", "/etc", "..", "a/b", ""):
        run = {"run": name, "optimizer": "adamw", "swept": {}, "seed": None, "loss": 1.0, "error": ""}
        (tmp_path / "sweep.json").write_text(json.dumps({"sweep": {}, "runs": [run]}))
        with pytest.raises(UserError, match="is damaged"):
            read_sweep(tmp_path)


# ----- token files


def test_a_note_that_lies_is_not_believed(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    truth = check_split(open_dataset(folder), "train")
    note = json.loads((folder / ".checked.json").read_text())
    path, size = folder / "train.bin", (folder / "train.bin").stat()
    np.full(6000, 7, "<u2").tofile(tmp_path / "other")
    os.replace(tmp_path / "other", path)  # of the same size, and dated back
    os.utime(path, ns=(size.st_atime_ns, size.st_mtime_ns))
    found = check_split(open_dataset(folder), "train")
    assert found[0] == 7 and found[1] != truth[1]
    for entry in ({"files": 1}, {**note["train"], "largest": "x"}, {**note["train"], "sha256": None}, [], "x"):
        (folder / ".checked.json").write_text(json.dumps({"train": entry}))
        assert check_split(open_dataset(folder), "train") == found
    (folder / ".checked.json").write_text(DEEP)
    assert check_split(open_dataset(folder), "train") == found


def test_a_tokenizers_file_is_in_the_folder(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    for name in ("../../etc/passwd", "/dev/zero", ".."):
        spec = {"file": name, "sha256": "0" * 64}
        (folder / "meta.json").write_text(json.dumps({"vocab_size": 64, "tokenizer": spec}))
        with pytest.raises(UserError, match="no name in this folder"):
            open_dataset(folder)


def test_many_phases_take_no_time():
    config = train_adam.AdamConfig(block_size=16, block_size_schedule=",".join(f"{step}:4" for step in range(1000)))
    began = time.perf_counter()
    assert {sequence_length(step, config) for step in range(100_000)} == {4}
    assert time.perf_counter() - began < 3


# ----- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus")
    (corpus / "meta.json").write_text(json.dumps({"vocab_size": 64, "tokenizer": {"characters": CHARACTERS}}))
    argv = [
        *tiny_words(corpus, folder / "out"),
        "--n_layer=1",
        "--max_iters=2",
        "--eval_interval=1",
        "--warmup_iters=0",
    ]
    train_adam.main(argv)
    return argv, load_checkpoint(folder / "out")[0], corpus


CHARACTERS = "".join(map(chr, range(64, 128)))


def test_checkpoints_with_wrong_parts_and_a_right_hash(trained, tmp_path, capsys):
    argv, checkpoint, _ = trained
    argv = [*argv, f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=2", "--eval_tokens=16"]
    for key in checkpoint:
        for value in ("missing", None, {"a": [1]}):
            broken = {k: v for k, v in checkpoint.items() if k != key} | ({} if value == "missing" else {key: value})
            for path in tmp_path.iterdir():
                path.unlink()
            save_checkpoint(tmp_path, broken)
            capsys.readouterr()
            for script in (
                (train_adam, sample) if key in ("model", "model_args", "tokenizer", "step") else (train_adam,)
            ):
                words = argv if script is train_adam else [f"--out_dir={tmp_path}", "--max_new_tokens=1"]
                try:
                    script.main(words)
                except UserError as error:
                    assert len(str(error)) > 20 and "weights_only" not in str(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].pop("lm_head.weight"),
        lambda c: c["model"].update({"lm_head.weight": torch.zeros(3)}),
        lambda c: c["model"].update({"lm_head.weight": "x", 5: 6}),
        lambda c: c["model_args"].update(n_layer=10**9),
        lambda c: c["model_args"].update(n_layer="1"),
        lambda c: c["model_args"].update(n_embd=10**30),
        lambda c: c["model_args"].update(unknown=1),
        lambda c: c["config"].update(learning_rate="x"),
        lambda c: c["config"].update(total_bs=[1]),
        lambda c: c["config"].update(dataset="a\0b"),
        lambda c: c.update(flops=10**400),
        lambda c: c.update(recent_losses=[10**400]),
        lambda c: c["counts"].update(skipped=10**30),
        lambda c: c["optimizer"].clear(),
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda c: c["optimizer"]["state"][0].pop("exp_avg"),
        lambda c: c["optimizer"].update(param_groups=[]),
        lambda c: c.update(rng=[[torch.zeros(3)]]),
        lambda c: c.update(rng=[]),
        lambda c: c.update(history=[{"step": "x"}]),
        lambda c: c.update(history=[{"step": 1, "changed": {"x": torch.zeros(2)}}]),
        lambda c: c.update(facts={"torch": torch.zeros(2)}),
        lambda c: c.update(seconds=math.nan),
        lambda c: c["counts"].update(skipped_in_a_row=math.nan),
        lambda c: c["config"].update(total_bs=0),
        lambda c: c["config"].update(learning_rate=math.nan),
        lambda c: c["config"].update(lr_schedule="cosine_restarts", restart_iters=0),
        lambda c: c["config"].update(lr_decay_iters=None),
        lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"].to_sparse()}),
        lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"].to("meta")}),
        lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"].int()}),
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(64, 32, dtype=torch.complex64)),
    ],
)
def test_checkpoints_whose_parts_do_not_fit(trained, tmp_path, change, capsys):
    argv, *_ = trained
    broken = load_checkpoint(argv_value(argv, "out_dir"))[0]
    change(broken)
    save_checkpoint(tmp_path, dict(broken))
    argv = [*argv, f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=3"]
    if broken.get("rng") == []:
        train_adam.main(argv)  # as from another number of ranks
    else:
        assert "weights_only" not in refused(train_adam.main, argv, capsys)


def argv_value(argv, key):
    return next(word.split("=", 1)[1] for word in argv if word.startswith(f"--{key}="))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_no_file_is_run_and_nobody_is_told_to_run_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap(), "model_args": {}, "iter_num": 1}, "foreign.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("foreign.pt", "plain.pt"):
        for form in ("import", "ckpt"):
            said = refused(evaluate.main, [f"--init_from={form}:{name}", "--dataset=x"], capsys)
            assert "weights_only" not in said and "trapped" not in os.listdir()


# ----- names in tables and figures


def test_names_from_others_are_escaped(tmp_path, capsys):
    name = "a\x1b[31m<script>alert(1)</script>$x^2$|b`\u202e"
    write_seeds(tmp_path, "adamw", [1.0, 1.1, 1.2])
    runs = write_seeds(tmp_path, "odd", [1.0, 1.1, 1.2], optimizer_name=name)
    out = tmp_path / "figure"
    compare.main([*runs, *(str(tmp_path / f"adamw_100_seed{i}") for i in range(3)), f"--out={out}"])
    markdown = (tmp_path / "figure.md").read_text()
    for text in (capsys.readouterr().out, markdown):
        assert "\x1b" not in text and "\u202e" not in text and "<script" not in text and "\\x1b[31m" in text
        rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
        assert {row.count("|") for row in rows} <= {8, 13}, "no name makes a column of its own"
        assert "$x" not in text.replace("\\$", "")
    for path in tmp_path.glob("figure*.svg"):
        text = path.read_text()
        assert "<script" not in text and "\x1b" not in text and "\u202e" not in text, path


def test_lines_of_metrics_that_are_there_twice_or_in_disorder_count_once(tmp_path):
    """Two copies of a run's lines in one file, of which the later lines count."""
    runs = [write_run(tmp_path / f"s{seed}", config={"seed": seed}) for seed in (1, 2)]
    path = tmp_path / "s2" / "metrics.jsonl"
    right, lines = read_run(runs[1]), path.read_text().splitlines(keepends=True)
    wrong = [line.replace('"val/loss": ', '"val/loss": 1') for line in lines]
    path.write_text("".join(wrong + lines[::-1]))
    assert read_run(runs[1]).lines == right.lines
    compare.main([*runs, f"--out={tmp_path / 'both'}"])
    assert list(tmp_path.glob("both*.svg"))
