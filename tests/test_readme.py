"""The README and the pages of docs against the repository: links resolve, commands parse, files exist, code runs.

A Python block runs where the line before its fence is <!-- test: run -->; the blocks of a page share their names. A
comment "needs: model, batches" says which names it takes from the reader; the test gives a small model.
"""

import re
import shlex

import pytest
import torch

from evaluate import EvaluateConfig
from export_hf import ExportConfig
from sample import SampleConfig
from tests.conftest import ROOT
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import load_config

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
SCRIPTS = {
    "train_adam.py": AdamConfig,
    "train_sophiag.py": SophiaConfig,
    "sample.py": SampleConfig,
    "evaluate.py": EvaluateConfig,
    "export_hf.py": ExportConfig,
}
STANDS_FOR_A_NAME = re.compile(r"\b[A-Z]{3,}\b|[*{}]|\.\.\.")  # config/train_gpt2_SIZE_adam.py, data/NAME/prepare.py


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(text):
    """The words of every command in the shell blocks of a page, one list a command."""
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(python|torchrun|sbatch|make|pip) ", line):
                yield shlex.split(line, comments=True)


def slugs(text):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    if page == "CHANGELOG.md":
        return  # it names files of the past
    named = set(re.findall(r"(?:\w+/)+[\w.]+\.(?:py|png|svg|json|sbatch|md|yml)\b", PAGES[page]))
    named |= set(re.findall(r"(?<![\w/.-])\w+\.py\b", PAGES[page]))
    made = {name for name in named if name.startswith("out/")}
    folders = [ROOT, (ROOT / page).parent, ROOT / "training", ROOT / "data/text"]
    missing = [name for name in named - made if not any((folder / name).exists() for folder in folders)]
    assert not [name for name in missing if not STANDS_FOR_A_NAME.search(name)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
    for words in commands(PAGES[page]):
        if "--base" in words:  # the settings of the runs that bench.py losses starts
            words = ["train_sophiag.py", *words[words.index("--base") + 1].replace("$PWD/", "").split()]
        script = next((word for word in words if word in SCRIPTS), None)
        if script is None:
            continue
        arguments = words[words.index(script) + 1 :]
        if not any(STANDS_FOR_A_NAME.search(word) for word in arguments if not word.startswith("--")):
            load_config(SCRIPTS[script], [word for word in arguments if word not in ("...", "--help")])


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- test: run -->" in PAGES[page]] or ["README.md"])
def test_code_runs(page):
    blocks = re.findall(r"<!-- test: run -->\n```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert blocks, page
    names = {
        "model": torch.nn.Sequential(torch.nn.Embedding(100, 32), torch.nn.Linear(32, 100)),
        "batches": [torch.randint(100, (2, 8, 16)) for _ in range(20)],
        "bs": 8 * 16,
    }
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert names["optimizer"].statistics()["hessian_norm"] > 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in PAGES.values():
        for target in re.findall(r"`make (\w+)`", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 12 * 1024
