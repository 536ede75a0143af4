"""Machines without a compiler, or without Triton: one sentence that names what is missing."""

import sys

import pytest
import torch

import train_adam
from tests.training.test_resume import refused
from training.errors import command


def test_compile_without_a_cpp_compiler(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    error = refused(capsys, train_adam.main, [*tiny, "--compile=True"])
    assert "/nowhere/g++" in error and "install g++, or leave --compile out" in error


@pytest.mark.parametrize("compiler", [None, "/nowhere/gcc", "/bin/false"])
@pytest.mark.parametrize("compiled", [False, True])
def test_triton_without_a_c_compiler(capsys, monkeypatch, tmp_path, compiler, compiled):
    """None on the path, none where CC says, one that fails, as without Python's headers; also within torch.compile."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    (tmp_path / "x.c").touch()

    def use(*_):
        build._build("x", str(tmp_path / "x.c"), str(tmp_path), [], [], [], [])

    def backend(graph, inputs):
        use()

    function = use if not compiled else lambda _: torch.compile(torch.sin, backend=backend)(torch.ones(2))
    assert "need a C compiler" in refused(capsys, function, [])


def test_a_gpu_without_triton(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in refused(capsys, __import__, "triton")


def test_any_other_failure_of_torch_compile(capsys):
    def backend(graph, inputs):
        raise ValueError("no such kernel\nand more")

    with pytest.raises(SystemExit) as ended:
        command(lambda: torch.compile(torch.cos, backend=backend)(torch.ones(2)))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1 and "no such kernel" in error and "--compile" in error
