"""bench.py: its rows, its table, its errors; the times themselves mean something on a GPU only."""

import json

import pytest
import torch

import bench
from benchmarks import report
from training.errors import command


def test_optimizer_rows_and_table(tmp_path, monkeypatch, capsys):
    """A tiny model on the CPU: every contender is timed, the floors are what they are defined to be."""
    monkeypatch.setitem(report.GPT2_SIZES, "30M", (1, 64))
    out = tmp_path / "o.json"
    bench.main(f"optimizer --device cpu --models 30M --rounds 3 --calls 2 --commit abc --out {out}".split())
    result = json.loads(out.read_text())
    assert (result["device"], result["torch"], result["commit"]) == ("cpu", torch.__version__, "abc")
    assert result["errors"] == []
    value = {(row["contender"], row["metric"]): row["value"] for row in result["rows"]}
    for contender in ("sophia", "adamw_foreach", "floor"):
        assert value[contender, "step_ms"] > 0 and value[contender, "clip_step_ms"] > 0
    assert value["floor", "step_ms"] == pytest.approx(2 * value["floor", "update_hessian_ms"]), "24 bytes and 12"
    capsys.readouterr()
    bench.main(["table", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| metric | contender | 30M |"
    assert f"| step, ms | sophia | {value['sophia', 'step_ms']:.4g} |" in lines


@pytest.mark.parametrize(
    "words, said",
    [
        ("optimizer --official /no/such --device cpu --models 30M --out OUT", "has no sophia.py"),
        ("table /no/such.json", "is no result of this script"),
        ("table EMPTY", "is no result of this script"),
        ("optimizer --out OUT", "no CUDA device"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty").write_text("{}")
    words = words.replace("EMPTY", str(tmp_path / "empty")).replace("OUT", str(tmp_path / "o.json"))
    with pytest.raises(SystemExit) as ended:
        command(lambda: bench.main(words.split()))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "o.json").exists(), "nothing half-written"
