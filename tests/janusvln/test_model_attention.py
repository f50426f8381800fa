"""Attention takes no kernel that is built anew for every length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from model_cases import CHECKPOINT, build_reference_model

from janus_cluster.janusvln.model.load import load_exported, why_not_importable, write_vggt

pytestmark = pytest.mark.train


@pytest.fixture(autouse=True)
def torchs_own_choice() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to((CHECKPOINT / "model.safetensors").resolve())
    write_vggt(build_reference_model(), tmp_path)
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_exported(tmp_path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("load", [lambda _: build_reference_model(), evaluated], ids=["trained", "evaluated"])
def test_attention_is_left_to_kernels_of_any_length(load: Callable[[Path], object], tmp_path: Path) -> None:
    load(tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_library_that_was_built_for_another_torch_is_reported_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built_elsewhere.py").write_text("raise ImportError('a.so: undefined symbol: _ZN3c1\\nmore')")
    (tmp_path / "sound.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_not_importable("built_elsewhere") == "ImportError: a.so: undefined symbol: _ZN3c1"
    assert why_not_importable("sound") is None
