"""verify-core: the checkout's numbers hold, another folder's too, and a wrong one is reported."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vggt_weights import vggt_state_dict
from janus_cluster.janusvln.verify import command as verify
from janus_cluster.job.resources import vectors_dir
from janus_cluster.modelspec.networks import VggtConfig

pytestmark = pytest.mark.train

VECTORS = vectors_dir()
WEIGHTS, CASE = "janus_model_tiny_seed0", "janus_model_tiny_seed0.case_b1_1img"


def write_vectors(folder: Path, name: str, tensors: dict[str, torch.Tensor], sidecar: dict[str, Any]) -> None:
    file = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    values = sidecar | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / f"{name}.json").write_text(json.dumps(values))


def copy_model(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One case and its weights in `folder`; the case's tensors and sidecar."""
    for name in (WEIGHTS, CASE):
        for suffix in (".json", ".safetensors"):
            shutil.copy(VECTORS / (name + suffix), folder)
    return load_file(folder / f"{CASE}.safetensors"), json.loads((folder / f"{CASE}.json").read_text())


def verdict(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = verify.main([str(folder), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def failures(result: dict[str, Any]) -> set[tuple[str, str]]:
    return {(q["case"], q["quantity"]) for q in result["quantities"] if not q["ok"]}


def test_the_command_reproduces_the_numbers_of_the_checkout() -> None:
    command = [sys.executable, "-m", "janus_cluster.cli", "verify-core"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "182 quantities, all hold (cpu, float32" in done.stdout
    for quantity in ("out.features", "features, frame by frame", "out.loss_total", "in.position_ids", "padded batch"):
        assert f"ok   {quantity}" in done.stdout


def test_bfloat16_holds_within_its_own_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (*VECTORS.glob("janus_*"), *VECTORS.glob("vggt_*")):
        shutil.copy(path, tmp_path)
    code, result = verdict(tmp_path, capsys, "--dtype", "bfloat16")
    assert code == 0, failures(result)
    exact = {q["quantity"] for q in result["quantities"] if q["difference"] == 0}
    assert "out.features" not in exact


def test_one_wrong_number_is_reported_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, sidecar = copy_model(tmp_path)
    tensors["out.loss_action"] = tensors["out.loss_action"] + 2e-5
    tensors["in.position_ids"][0, 0, 3] += 1
    tensors["out.something_else"] = torch.zeros(1)
    write_vectors(tmp_path, CASE, tensors, sidecar)
    code, result = verdict(tmp_path, capsys)
    assert code == 1
    assert not result["ok"]
    wrong = {"out.loss_action", "in.position_ids", "out.something_else"}
    assert failures(result) == {(CASE, quantity) for quantity in wrong}
    assert verify.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL out.loss_action" in printed
    assert "3 DO NOT HOLD" in printed


def test_frames_that_are_no_whole_grey_levels_hold_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, sidecar = copy_model(tmp_path)
    frames = tensors["in.images_vggt.0"]
    tensors["in.pixel_values"] = pixels.qwen_patches(frames)
    tensors["in.images_vggt.0"] = pixels.unit_frames(frames) + 1e-7
    write_vectors(tmp_path, CASE, tensors, sidecar)
    code, result = verdict(tmp_path, capsys)
    assert code == 0, failures(result)


def test_sizes_and_cases_are_read_from_the_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = VggtConfig(
        embed_dim=32, depth=5, num_heads=2, mlp_ratio=2, num_register_tokens=3, dino_depth=1, dino_num_heads=4,
        dino_image_size=42,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        aggregator = Aggregator(config)
        frames = torch.rand(3, 3, 28, 56)
    tensors = vggt_state_dict(aggregator)
    tensors |= {"case.mine.in.frames": frames, "case.mine.out.features": aggregator(frames).flatten(0, 1)}
    numbers = config.to_dict()
    sidecar = {"config": numbers | {"dino_img_size": numbers.pop("dino_image_size")}}
    write_vectors(tmp_path, "other_seed5", tensors, sidecar)
    code, result = verdict(tmp_path, capsys)
    assert code == 0, result
    quantities = [(q["case"], q["quantity"]) for q in result["quantities"]]
    assert quantities == [("other_seed5.mine", "out.features"), ("other_seed5.mine", "features, frame by frame")]
    write_vectors(tmp_path, "other_seed5", tensors, {"config": sidecar["config"] | {"num_heads": 4}})
    with pytest.raises(RuntimeError, match="q_norm"):
        verify.main([str(tmp_path)])
    del sidecar["config"]["num_heads"]
    write_vectors(tmp_path, "other_seed5", tensors, sidecar)
    assert verify.main([str(tmp_path)]) == 2
    assert "lack 'num_heads'" in capsys.readouterr().err


def test_data_that_differ_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "data_pipeline_tiny_seed0"
    shutil.copytree(VECTORS / name, tmp_path / name)
    sidecar = json.loads((VECTORS / f"{name}.json").read_text())
    del sidecar["runs"]["history_8"]
    samples = sidecar["runs"]["history_2"]["samples"]
    samples[3]["images"] = samples[3]["images"][1:]
    samples[4]["segment_ids_rle"][0][1] += 1
    path = next(iter(sidecar["images"]))
    sidecar["images"][path]["vggt"]["probes_c_y_x_value"][0][3] -= 0.1
    (tmp_path / f"{name}.json").write_text(json.dumps(sidecar))
    code, result = verdict(tmp_path, capsys)
    assert code == 1
    run = f"{name}.history_2"
    assert failures(result) == {(run, "samples, frames and texts"), (run, "segments"), (name, "pixels, VGGT")}


def test_what_is_no_folder_of_vectors_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal() -> str:
        assert verify.main([str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "holds no vectors" in refusal()
    (tmp_path / "other.json").write_text('{"name": "nothing of ours"}')
    assert "holds no vectors" in refusal()
    copy_model(tmp_path)
    (tmp_path / f"{WEIGHTS}.json").unlink()
    assert f"have no sidecar here: {CASE}.json" in refusal()
    shutil.copy(VECTORS / f"{WEIGHTS}.json", tmp_path)
    with (tmp_path / f"{CASE}.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert f"{CASE}.safetensors: sha256 is " in refusal()
    (tmp_path / f"{CASE}.safetensors").unlink()
    assert f"{CASE}.safetensors: cannot be read" in refusal()
    (tmp_path / f"{CASE}.json").write_text("{")
    assert f"{CASE}.json: cannot be read" in refusal()


def test_a_gpu_that_is_not_there_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert verify.main(["--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
