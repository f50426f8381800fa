"""Which Pythons `make test-pythons` finds, with programs that pretend to be one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pythons import find_python, main

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


def write_python(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    program = folder / f"python{THIS}"
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)
    return program


def test_the_first_python_on_path_that_runs_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = write_python(tmp_path / "shims", "echo 'pyenv: command not found' >&2; exit 127")
    other = write_python(tmp_path / "other", "echo 2.7 2.7.18")
    real = write_python(tmp_path / "real", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", ":".join(str(p.parent) for p in (shim, other, real)))
    assert find_python(THIS) == real


def test_a_python_that_only_pyenv_has_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = write_python(tmp_path / "versions" / f"{THIS}.99" / "bin", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert find_python(THIS) == kept


def test_an_unsupported_version_is_refused_with_the_supported_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["3.9"]) == 2
    assert capsys.readouterr().out == "error: 3.9 is not among 3.10, 3.11, 3.12, 3.13, 3.14, ends\n"
