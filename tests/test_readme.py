"""The README against the code: its snippet runs, its table is the settings, its files and scripts are there."""

import re

from benchmarks.report import markdown_table
from sophia import SophiaG
from tests.conftest import ROOT
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import describe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def settings_table():
    """The README's table of settings; `python -m tests.test_readme` prints it."""
    ours = {row[0]: row for row in describe(SophiaConfig)}
    adam = {row[0]: row for row in describe(AdamConfig)}
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, (_, kind, default, help) in ours.items():
        if name not in adam:
            help = f"Sophia: {help}"
        elif name == "optimizer_name":
            default, help = f"{adam[name][2]} / {default}", f"{adam[name][3]} / {help}"
        elif adam[name][2] != default:
            default = f"{adam[name][2]} (AdamW), {default} (Sophia)"
        lines.append(f"| `{name}` | {kind} | {default} | {help} |")
    lines += [f"| `{row[0]}` | {row[1]} | {row[2]} | {row[3]} |" for row in adam.values() if row[0] not in ours]
    return "\n".join(lines)


def test_settings_table_is_the_code():
    assert settings_table() in README, "print it with: python -m tests.test_readme"


LOOP, TRAINER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop_runs():
    names = {}
    exec(compile(LOOP, "README.md", "exec"), names)
    assert names["optimizer"].statistics()["hessian_norm"] > 0


def test_the_trainer_is_the_one_that_the_docstring_has_and_its_test_runs():
    code = TRAINER.removeprefix("# needs: model, args, dataset, k, tokens, bs\n")
    assert " ".join(code.split()) in " ".join(SophiaG.__doc__.split())


def test_tables_of_measurements_are_their_files():
    for path in re.findall(r"bench.py table (assets/bench/\w+.json)", README):
        assert markdown_table(ROOT / path) in README, path


def test_files_that_it_names_are_there():
    named = set(re.findall(r"(?:config|data|assets|training)/[\w/]+\.(?:py|png|svg|json)", README))
    named |= set(re.findall(r"python (\w+\.py)", README))
    assert {"train_adam.py", "config/train_gpt2_small_sophiag.py", "data/text/prepare.py"} <= named
    made_up = {"FILE", "SIZE"}  # stand for names
    missing = [name for name in named if not (ROOT / name).exists() and not made_up & set(re.split(r"[_./]", name))]
    assert not missing


if __name__ == "__main__":
    print(settings_table())
