"""Weights on disk: the layouts that must load, and the broken ones that must not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import CHECKPOINT, EVERYTHING, IDS, build_reference_model, load_case
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import load_exported, write_vggt
from janus_cluster.janusvln.model.vggt_weights import vggt_state_dict
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.check_weights import check_weights
from janus_cluster.modelspec.networks import VggtConfig
from janus_cluster.modelspec.weight_names import OWN_PREFIXES, janus_shapes, name_on_disk, vggt_shapes

pytestmark = pytest.mark.train

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def stored() -> Tensors:
    return load_file(CHECKPOINT / "model.safetensors")


def write_folder(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | config), encoding="utf-8")
    return folder


def build(path: Path | str, *, seed: int = 0, **model_keys: Any) -> JanusModel:
    return build_model(
        Model(path=str(path), **({"preset": "tiny"} | model_keys)),
        EVERYTHING,
        tokenizer_ids=IDS,
        device="cpu",
        dtype=torch.float32,
        seed=seed,
    )


def refusal(path: Path | str, **model_keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        build(path, **model_keys)
    return str(caught.value)


def in_model(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return re.sub(r"^model\.", "model.language_model.", name)


def assert_holds(model: JanusModel, stored: Tensors, *, but: tuple[str, ...] = ()) -> None:
    state = model.state_dict()
    names = [name for name in stored if not name.startswith(("vggt.", *but))]
    assert len(names) + sum(name.startswith(but or ("\0",)) for name in state) == len(state)
    for name in names:
        key = name if name.startswith((*OWN_PREFIXES, "lm_head.")) else in_model(name)
        assert torch.equal(state[key], stored[name]), name


def qwen_only(stored: Tensors) -> Tensors:
    return {name: t for name, t in stored.items() if not name.startswith(("vggt.", *OWN_PREFIXES))}


def vggt_only(stored: Tensors) -> Tensors:
    return {name.removeprefix("vggt."): t for name, t in stored.items() if name.startswith("vggt.")}


def test_published_checkpoint_gives_every_weight_and_shows_what_it_ignored(
    stored: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_reference_model()
    assert_holds(model, stored)
    assert torch.equal(model.vggt.camera_token, stored["vggt.aggregator.camera_token"])
    out = capsys.readouterr().out
    assert "80 tensors taken, 0 newly initialised (none), 306 ignored (vggt.*)" in out
    assert "146 tensors taken" in out


def test_own_folder_loads_again_and_plain_qwen_reads_it(tmp_path: Path) -> None:
    model = build_reference_model(lam=0.7, reference_frame="last")
    batch, _ = load_case("b1_3img")
    model.save_pretrained(tmp_path)
    write_vggt(model, tmp_path)
    again = load_exported(tmp_path, device="cpu", dtype=torch.float32)
    assert (again.config.lam, again.config.reference_frame) == (0.7, "last")
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"model", "visual", "lm_head", "merger", "action_head"}

    plain, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith(OWN_PREFIXES) for name in info["unexpected_keys"])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_sharded_hub_layout_loads_and_draws_new_modules_from_the_seed(
    stored: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "hub", {"unused": torch.zeros(1)})
    names = list(qwen_only(stored))
    shards = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, members in shards.items():
        save_file({name: stored[name] for name in members}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file(vggt_only(stored), tmp_path / "vggt.safetensors")
    keys = {"vggt_path": str(tmp_path / "vggt.safetensors")}

    model, same, other = build(folder, **keys), build(folder, **keys), build(folder, seed=1, **keys)
    assert_holds(model, qwen_only(stored), but=OWN_PREFIXES)
    assert "11 newly initialised (merger., action_head.)" in capsys.readouterr().out
    assert torch.equal(model.merger.mlp[0].weight, same.merger.mlp[0].weight)
    assert not torch.equal(model.merger.mlp[0].weight, other.merger.mlp[0].weight)
    assert 0.01 < float(model.action_head[0].weight.detach().std()) < 0.03

    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in refusal(folder, **keys)


def write_full_layout(folder: Path, *, shards: int) -> Tensors:
    """Every name of Qwen2.5-VL-7B, as on the hub, in bf16 shards, and VGGT-1B's 1,210 names beside it; tiny sizes."""
    values = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    values |= {"num_hidden_layers": 28, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    values["vision_config"] |= {"depth": 32, "out_hidden_size": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
    vggt = VggtConfig(embed_dim=16, depth=24, num_heads=2, dino_depth=24, dino_num_heads=2)
    values["vggt_config"] = vggt.to_dict()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    generator = torch.Generator().manual_seed(11)
    shapes = {name_on_disk(n): shape for n, shape in janus_shapes(values).items() if not n.startswith(OWN_PREFIXES)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    weight_map = {}
    for i in range(shards):
        file, names = f"model-{i + 1:05}-of-{shards:05}.safetensors", list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole = vggt_shapes(VggtConfig.from_dict(vggt.to_dict() | {"depth": 25}))
    torch.save({n: torch.randn(shape, generator=generator) for n, shape in whole.items()}, folder / "model.pt")
    return tensors


def test_every_tensor_of_a_checkpoint_in_the_hubs_full_layout_arrives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hub"
    tensors = write_full_layout(folder, shards=5)
    assert len(tensors) == 729
    keys = {"preset": "tiny", "path": str(folder), "vggt_path": str(folder / "model.pt")}
    output = "729 tensors taken, 11 newly initialised (merger., action_head.), 0 ignored"
    assert output in check_weights(Model(**keys))[0]
    model = build(folder, vggt_path=keys["vggt_path"])
    out = capsys.readouterr().out
    assert output in out
    assert "1174 tensors taken, 36 ignored (36 of the last blocks)" in out
    assert_holds(model, {name: tensor.float() for name, tensor in tensors.items()}, but=OWN_PREFIXES)
    stored = torch.load(folder / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in vggt_state_dict(model.vggt).items())


READER = """
import re, sys
from pathlib import Path
from janus_cluster.modelspec.vggt_source import read_tensor_index
from janus_cluster.janusvln.model.checkpoint_files import read_tensors
def counters():
    return [int(n) for n in re.findall(r"^(?:rchar|read_bytes): (\\d+)$", open("/proc/self/io").read(), re.M)]
print("ready", flush=True)
sys.stdin.readline()
before, path = counters(), Path(sys.argv[1])
index = read_tensor_index(path)
total = sum(float(t.sum()) for t in read_tensors(index, index).values())
print(total, *(b - a for a, b in zip(before, counters())), flush=True)
"""


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_two_processes_of_a_node_read_a_file_once(name: str, tmp_path: Path) -> None:
    file, tensors = tmp_path / name, {f"t{i}": torch.ones(1024, 1024) for i in range(16)}
    if name.endswith(".pt"):
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # out of the page cache again
    command = [sys.executable, "-c", READER, str(file)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    answers = [reader.communicate("go\n", timeout=600)[0].split() for reader in readers]
    size = file.stat().st_size
    assert [float(total) for total, _, _ in answers] == [16 * 1024.0**2] * 2
    assert all(int(copied) < size / 10 for _, copied, _ in answers)  # mapped, not read() into each process
    assert sum(int(from_disk) for _, _, from_disk in answers) < 1.5 * size


def most_allocated(profiled: torch.profiler.profile) -> int:
    """Most bytes of the host that tensors took at one time; a mapped file counts as a whole."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_on_their_way_to_a_device_are_held_one_tensor_at_a_time(
    suffix: str, stored: Tensors, tmp_path: Path
) -> None:
    """As published: Qwen in bf16, which is the job's precision, VGGT in fp32. meta serves as a second device."""
    qwen = {name: tensor.bfloat16() for name, tensor in qwen_only(stored).items()}
    folder, vggt = write_folder(tmp_path / "qwen", qwen), tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(vggt_only(stored), vggt)
    else:
        save_file(vggt_only(stored), vggt)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = build_model(
            Model(path=str(folder), preset="tiny", vggt_path=str(vggt)),
            EVERYTHING,
            tokenizer_ids=IDS,
            device="meta",
            dtype=torch.bfloat16,
            seed=0,
        )
    mapped = (folder / "model.safetensors").stat().st_size + vggt.stat().st_size
    new = sum(p.nbytes for name, p in model.named_parameters() if name.startswith(OWN_PREFIXES))
    largest = max(tensor.nbytes for tensor in stored.values())
    assert model.vggt.device.type == "meta"
    assert most_allocated(profiled) < mapped + new + 1.5 * largest


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_vggt_loads_from_a_file_or_its_folder(suffix: str, stored: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "qwen", qwen_only(stored))
    vggt = tmp_path / "vggt"
    vggt.mkdir()
    file = vggt / f"model{suffix}"
    if suffix == ".pt":
        torch.save(vggt_only(stored), file)
    else:
        save_file(vggt_only(stored), file)
    for path in (file, vggt):
        model = build(folder, vggt_path=str(path))
        assert torch.equal(
            model.vggt.global_blocks[2].mlp.fc2.weight, stored["vggt.aggregator.global_blocks.2.mlp.fc2.weight"]
        )


def test_tied_checkpoint_needs_no_lm_head(stored: Tensors, tmp_path: Path) -> None:
    tied = {name: t for name, t in stored.items() if name != "lm_head.weight"}
    model = build(write_folder(tmp_path / "tied", tied, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])
    assert "lm_head.weight" in refusal(write_folder(tmp_path / "untied", tied))


def test_missing_language_weights_are_named(stored: Tensors, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    folder = write_folder(tmp_path / "m", {name: t for name, t in stored.items() if name != lost})
    message = refusal(folder)
    assert lost in message
    assert str(folder) in message
    with pytest.raises(UsageError, match=r"1 weights of Qwen2.5-VL are missing: .*layers\.1\.mlp\.up_proj"):
        JanusModel.from_pretrained(folder)


def test_misshapen_weights_are_named(stored: Tensors, tmp_path: Path) -> None:
    changed = stored | {"model.norm.weight": torch.ones(65)}
    message = refusal(write_folder(tmp_path / "m", changed))
    assert "model.norm.weight in model.safetensors is [65], not [64]" in message


def test_half_an_action_head_is_refused(stored: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {k: t for k, t in stored.items() if k != "action_head.3.bias"})
    assert "action_head.3.bias" in refusal(folder)


def test_missing_aggregator_weights_are_named(stored: Tensors, tmp_path: Path) -> None:
    lost = "vggt.aggregator.frame_blocks.1.ls1.gamma"
    folder = write_folder(tmp_path / "m", {name: t for name, t in stored.items() if name != lost})
    assert lost in refusal(folder)
    spare = {name: t for name, t in stored.items() if "_blocks.3." not in name}
    build(write_folder(tmp_path / "spare", spare))


def test_a_folder_without_vggt_asks_for_it(stored: Tensors, tmp_path: Path) -> None:
    assert "model.vggt_path is not set" in refusal(write_folder(tmp_path / "m", qwen_only(stored)))


def test_another_family_or_size_is_refused(stored: Tensors, tmp_path: Path) -> None:
    assert "'llama'" in refusal(write_folder(tmp_path / "llama", stored, model_type="llama"))
    message = refusal(CHECKPOINT, preset="qwen2.5-vl-7b")
    assert "hidden_size is 64, preset qwen2.5-vl-7b has 3584" in message


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, stored: Tensors) -> None:
    folder = write_folder(tmp_path / "m", stored, image_token_id=3)
    assert "image_token_id is 3, in the tokenizer 595" in refusal(folder)


def test_a_preset_without_weights_asks_for_a_path() -> None:
    with pytest.raises(UsageError, match=r"model\.path"):
        build_model(
            Model(preset="qwen2.5-vl-7b"), EVERYTHING, tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=0
        )


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_broken_vggt_files_are_named(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(CHECKPOINT, vggt_path=str(tmp_path / name))
    assert message.startswith("model.vggt_path: ")
    assert name in message


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"aggregator.camera_token": Runs()}, tmp_path / "model.pt")
    assert "model.pt" in refusal(CHECKPOINT, vggt_path=str(tmp_path / "model.pt"))
    assert not (tmp_path / "ran").exists()


def test_folders_without_weights_or_configuration_are_named(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    assert "model.safetensors" in refusal(tmp_path)
    assert str(tmp_path / "nowhere") in refusal(CHECKPOINT, vggt_path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", "1e-6"), ("torch_dtype", "float99")])
def test_a_configuration_that_transformers_refuses_is_named(
    key: str, value: str, tmp_path: Path, stored: Tensors
) -> None:
    assert f"{tmp_path / 'q'}/config.json: " in refusal(write_folder(tmp_path / "q", stored, **{key: value}))


def wrapped(kind: str, tensors: Tensors) -> Any:
    return {
        "model": {"model": tensors, "epoch": 3},
        "state_dict": {"state_dict": tensors, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        "module": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "legacy": tensors,
    }[kind]


@pytest.mark.parametrize("kind", ["model", "state_dict", "module", "legacy"])
def test_vggt_is_unwrapped_from_what_training_scripts_save(kind: str, stored: Tensors, tmp_path: Path) -> None:
    folder, vggt = write_folder(tmp_path / "qwen", qwen_only(stored)), tmp_path / "vggt"
    vggt.mkdir()
    torch.save(wrapped(kind, vggt_only(stored)), vggt / "vggt_1B.pt", _use_new_zipfile_serialization=kind != "legacy")
    assert "146 tensors taken" in check_weights(Model(preset="tiny", path=str(folder), vggt_path=str(vggt)))[1]
    model = build(folder, vggt_path=str(vggt))
    assert torch.equal(model.vggt.camera_token, stored["vggt.aggregator.camera_token"])


@pytest.mark.parametrize("name", ["vggt.aggregator.camera_token", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_before_training(
    name: str, value: float, stored: Tensors, tmp_path: Path
) -> None:
    spoilt = stored[name].clone()
    spoilt.view(-1)[0] = value
    message = refusal(folder := write_folder(tmp_path / "m", stored | {name: spoilt}))
    assert f"model.path: {folder}: 1 tensors hold values that are not finite" in message
    assert ("camera_token" if "camera" in name else "norm.weight") in message
