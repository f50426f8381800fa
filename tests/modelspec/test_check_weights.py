"""The dry check of checkpoints: headers only, without torch; what is wrong is named by file and key."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from weight_files import SEVEN_B, Shapes, config_values, qwen_shapes, write_qwen, write_safetensors, write_vggt

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.check_weights import check_weights, load_config_values
from janus_cluster.modelspec.networks import VggtConfig
from janus_cluster.modelspec.safetensors_header import CheckpointProblem, read_header
from janus_cluster.modelspec.weight_names import janus_shapes, name_on_disk, vggt_shapes
from tests.tiny_data import write_tiny_data


@pytest.fixture
def vggt(tmp_path: Path) -> Path:
    return write_vggt(tmp_path / "VGGT-1B")


def check(path: Path, vggt: Path | None, *, preset: str = SEVEN_B) -> list[str]:
    return check_weights(Model(preset=preset, path=str(path), vggt_path=None if vggt is None else str(vggt)))


def refusal(path: Path, vggt: Path | None, *, preset: str = SEVEN_B) -> str:
    with pytest.raises(UsageError) as caught:
        check(path, vggt, preset=preset)
    return str(caught.value)


def test_seven_b_from_the_hub_and_vggt_1b_are_reported_tensor_by_tensor(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    model_line, vggt_line = check(folder, vggt)
    assert model_line == f"model: {folder}: 729 tensors taken, 11 newly initialised (merger., action_head.), 0 ignored"
    assert vggt_line == f"vggt: {vggt}: 1174 tensors taken, 38 ignored (36 of the last blocks)"


def test_three_b_ties_its_embeddings_and_needs_no_lm_head(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen", preset="qwen2.5-vl-3b", shards=2)
    assert "824 tensors taken" in check(folder, vggt, preset="qwen2.5-vl-3b")[0]
    assert "lm_head.weight" not in read_header(folder / "model-00001-of-00002.safetensors")


def test_a_janusvln_checkpoint_brings_everything_and_its_other_heads_are_ignored(tmp_path: Path) -> None:
    values = config_values()
    everything = {name_on_disk(name): shape for name, shape in janus_shapes(values).items()}
    everything |= {"vggt." + name: shape for name, shape in vggt_shapes(VggtConfig(depth=25)).items()}
    everything["vggt.point_head.norm.weight"] = (2048,)
    folder = write_qwen(tmp_path / "janus", everything)
    model_line, vggt_line = check(folder, None)
    assert "740 tensors taken, 0 newly initialised (none), 1211 ignored (vggt.*)" in model_line
    assert "1174 tensors taken, 36 ignored (36 of the last blocks)" in vggt_line


def test_tiny_needs_no_weights_and_a_real_preset_does() -> None:
    assert check_weights(Model(preset="tiny")) == [
        "model: preset tiny: random weights, the same for the same training.seed"
    ]
    with pytest.raises(UsageError, match=r"model\.path"):
        check_weights(Model(preset=SEVEN_B))


@pytest.mark.parametrize(
    ("changed", "expected_text"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'qwen2_5_vl'"),
        ({"hidden_size": 2048}, f"hidden_size is 2048, preset {SEVEN_B} has 3584"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    ],
)
def test_another_family_or_size_is_named(
    changed: dict[str, Any], expected_text: str, tmp_path: Path, vggt: Path
) -> None:
    folder = write_qwen(tmp_path / "qwen", {"x": (1,)}, shards=1, **changed)
    message = refusal(folder, vggt)
    assert f"{folder}/config.json" in message
    assert expected_text in message


def test_missing_and_misshapen_weights_are_named(tmp_path: Path, vggt: Path) -> None:
    shapes = qwen_shapes(config_values())
    lost = {name: shape for name, shape in shapes.items() if name != "model.layers.27.mlp.up_proj.weight"}
    assert "model.layers.27.mlp.up_proj.weight" in refusal(write_qwen(tmp_path / "lost", lost), vggt)
    wrong = shapes | {"visual.merger.ln_q.weight": (1281,)}
    message = refusal(write_qwen(tmp_path / "wrong", wrong, shards=1), vggt)
    assert "visual.merger.ln_q.weight in model-00001-of-00001.safetensors is [1281], not [1280]" in message
    half = shapes | {"merger.ln_q.weight": (2048,)}
    assert "merger.mlp.0.weight" in refusal(write_qwen(tmp_path / "half", half), vggt)


def test_absent_cut_and_empty_shards_are_named(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    shard = folder / "model-00003-of-00004.safetensors"
    whole = shard.stat().st_size
    with shard.open("r+b") as out:
        out.truncate(whole - 1)
    assert f"{shard}: truncated: {whole - 1:,} bytes, its header promises {whole:,}" in refusal(folder, vggt)
    for size in (0, 7, 100):
        with shard.open("r+b") as out:
            out.truncate(size)
        assert f"{shard}: cannot be read: {size} bytes" in refusal(folder, vggt)
    shard.unlink()
    assert f"names files that are not there: {shard.name}" in refusal(folder, vggt)


def test_a_shard_without_what_the_index_promises_is_named(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen", shards=2)
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"other": (1,)})
    message = refusal(folder, vggt)
    assert "model.safetensors.index.json" in message
    assert "(model-00002-of-00002.safetensors)" in message


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(index: str, tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen", {"x": (1,)})
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json: not an index of shards" in refusal(folder, vggt)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 3}', b'{"a": {"shape": [1]}}'])
def test_a_broken_header_is_named(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(CheckpointProblem, match=r"model\.safetensors: cannot be read"):
        read_header(file)


def test_vggt_that_is_not_whole_is_named(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    assert "model.vggt_path is not set" in refusal(folder, None)
    assert "model.vggt_path: " in refusal(folder, tmp_path / "nowhere")
    lost = {name: shape for name, shape in vggt_shapes(VggtConfig()).items() if name != "aggregator.camera_token"}
    write_safetensors(vggt / "model.safetensors", lost)
    assert "1 of 1174 tensors are missing: aggregator.camera_token" in refusal(folder, vggt)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def whole(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in numbers) + b"t"


def pickled(shapes: Shapes, *wrapped: str, more: bytes = b"") -> bytes:
    """data.pkl as torch.save writes it for bf16 tensors that share storage 0, inside dictionaries of these keys."""
    storage = b"(" + text("storage") + b"ctorch\nBFloat16Storage\n" + text("0") + text("cpu") + b"J\x02\0\0\0tQ"
    rows = [
        text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + whole(shape) + whole(shape)
        + b"\x89ccollections\nOrderedDict\n)RtR"
        for name, shape in shapes.items()
    ]  # fmt: skip
    opened = b"".join(b"}(" + text(key) for key in wrapped)
    return b"\x80\x02" + opened + b"}(" + b"".join(rows) + b"u" + b"u" * len(wrapped) + more + b"."


def write_pt(file: Path, data: bytes, *, storage: bytes = b"\0" * 4) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
        out.writestr("model/data.pkl", data)
        out.writestr("model/data/0", storage)
    return file


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


VGGT_1B = vggt_shapes(VggtConfig())


@pytest.mark.parametrize(
    ("data", "prefix"),
    [
        (pickled(VGGT_1B), ""),
        (pickled(VGGT_1B, "model"), "model."),
        (pickled(VGGT_1B, "state_dict"), "state_dict."),
        (pickled(prefixed("module.", VGGT_1B)), "module."),
        (pickled(prefixed("module.", VGGT_1B), "checkpoint", "model"), "checkpoint.model.module."),
    ],
)
def test_names_in_a_pickle_are_read_and_unwrapped_at_the_desk(data: bytes, prefix: str, tmp_path: Path) -> None:
    file = write_pt(tmp_path / "model.pt", data)
    line = check(write_qwen(tmp_path / "qwen"), file)[1]
    assert line.startswith(f"vggt: {file}: 1174 tensors taken, 0 ignored")
    assert line.endswith(f"named {prefix}* there" if prefix else "last blocks)")


def test_what_a_pickle_lacks_or_holds_besides_is_named(tmp_path: Path) -> None:
    folder, file = write_qwen(tmp_path / "qwen"), tmp_path / "model.pt"
    lost = {name: shape for name, shape in VGGT_1B.items() if name != "aggregator.camera_token"}
    write_pt(file, pickled(prefixed("module.", lost)))
    assert "1 of 1174 tensors are missing: module.aggregator.camera_token" in refusal(folder, file)
    write_pt(file, pickled({"encoder.weight": (3, 2)}, "net"))
    assert f"{file}: holds no aggregator.* of VGGT's; its 1 tensors are: net.encoder.weight" in refusal(folder, file)
    write_pt(file, pickled(VGGT_1B | prefixed("ema.", VGGT_1B)))
    assert "more than one network of VGGT's (aggregator.*, ema.aggregator.*)" in refusal(folder, file)
    write_pt(file, b"\x80\x02cvggt.models.vggt\nVGGT\n)R.")
    assert "a whole pickled module (vggt.models.vggt.VGGT)" in refusal(folder, file)
    write_pt(file, b"\x80\x02cposix\nsystem\n(" + text(f"touch {tmp_path}/ran") + b"tR.")
    assert "posix.system" in refusal(folder, file)
    assert not list(tmp_path.glob("**/ran"))


def test_a_pt_file_that_is_cut_or_no_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    file = write_pt(tmp_path / "model.pt", pickled(VGGT_1B))
    complete = file.read_bytes()
    for broken in (b"", b"not weights", complete[:-30]):
        file.write_bytes(broken)
        assert f"model.vggt_path: {file}: cannot be read as weights" in refusal(folder, file)
    write_pt(file, pickled(VGGT_1B)[:-100])
    assert "cannot be read as weights" in refusal(folder, file)
    write_pt(file, pickled(VGGT_1B), storage=b"\0\0")
    assert "1 of 1 storages are missing or cut" in refusal(folder, file)


def test_a_folder_with_one_file_of_weights_under_another_name_is_taken(tmp_path: Path) -> None:
    folder, vggt = write_qwen(tmp_path / "qwen"), tmp_path / "VGGT-1B-Commercial"
    vggt.mkdir()
    (vggt / "README.md").write_text("license")
    assert "holds none of model.safetensors" in refusal(folder, vggt)
    write_pt(vggt / "vggt_1B_commercial.pt", pickled(VGGT_1B))
    assert f"vggt: {vggt}: 1174 tensors taken" in check(folder, vggt)[1]
    write_safetensors(vggt / "vggt-bf16.safetensors", prefixed("module.", VGGT_1B))
    assert "2 other files of weights (vggt-bf16.safetensors, vggt_1B_commercial.pt)" in refusal(folder, vggt)
    (vggt / "vggt_1B_commercial.pt").unlink()
    assert "named module.* there" in check(folder, vggt)[1]


def test_vggt_may_be_named_by_the_janusvln_checkpoint_that_holds_it(tmp_path: Path) -> None:
    folder, other = write_qwen(tmp_path / "qwen"), tmp_path / "other"
    write_qwen(other, prefixed("vggt.", VGGT_1B) | {"model.norm.weight": (3584,)})
    assert f"vggt: {other}: 1174 tensors taken" in check(folder, other)[1]
    write_safetensors(folder / "vggt.safetensors", VGGT_1B)
    assert f"vggt: {folder}/vggt.safetensors: 1174 tensors taken" in check(folder, None)[1]


def test_a_model_of_wrapped_names_is_refused_with_the_names_that_it_has(tmp_path: Path, vggt: Path) -> None:
    shapes = prefixed("module.", qwen_shapes(config_values()))
    assert "729 of 729 tensors are missing" in (message := refusal(write_qwen(tmp_path / "q", shapes), vggt))
    assert "its names are module." in message


def test_config_check_prints_the_lines_and_ends_with_2_where_weights_are_missing(tmp_path: Path, vggt: Path) -> None:
    folder, root = write_qwen(tmp_path / "qwen"), write_tiny_data(tmp_path / "data")

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        # As on a login node: an import of any of these fails.
        heavy = ["torch", "transformers", "deepspeed", "safetensors", "peft"]
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({heavy})); from janus_cluster.cli.main import main; main()"
        )
        command = [sys.executable, "-c", code, "config", "check", "train_1node", *argv]
        sets = [f"model.path={folder}", f"model.vggt_path={vggt}", f"data.roots=[{root}]"]
        command += [part for value in sets for part in ("--set", value)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)

    done = call()
    assert done.returncode == 0, done.stderr
    assert "729 tensors taken, 11 newly initialised (merger., action_head.)" in done.stdout
    (folder / "model-00001-of-00004.safetensors").unlink()
    done = call()
    assert done.returncode == 2
    assert "model-00001-of-00004.safetensors" in done.stderr
    assert list(tmp_path.glob("runs")) == []


def test_of_a_whole_file_and_an_index_the_file_is_judged_which_transformers_loads(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    write_safetensors(folder / "model.safetensors", {"model.norm.weight": (3584,)})
    assert "tensors are missing" in refusal(folder, vggt)
    write_safetensors(folder / "model.safetensors", qwen_shapes(config_values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    assert "729 tensors taken" in check(folder, vggt)[0]


def test_embeddings_are_tied_where_only_the_text_part_sets_it(tmp_path: Path, vggt: Path) -> None:
    three_b = config_values("qwen2.5-vl-3b")
    text = {"tie_word_embeddings": True}
    folder = write_qwen(
        tmp_path / "qwen", qwen_shapes(three_b), preset="qwen2.5-vl-3b", tie_word_embeddings=False, text_config=text
    )
    assert "tensors taken" in check(folder, vggt, preset="qwen2.5-vl-3b")[0]


def write_tied_with_a_head(folder: Path, *, is_another: bool, text_config: bool = False) -> Path:
    """A 3B folder with a tied flag in config.json and an lm_head.weight in its file, as its last tensor."""
    values = config_values("qwen2.5-vl-3b") | {"vocab_size": 600}
    shapes = qwen_shapes(values) | {"lm_head.weight": (600, 2048)}
    flag = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}} if text_config else {}
    write_qwen(folder, shapes, preset="qwen2.5-vl-3b", shards=2, vocab_size=600, **flag)
    if is_another:
        with next(p for p in folder.glob("*.safetensors") if "lm_head.weight" in read_header(p)).open("rb+") as file:
            file.seek(-1, 2)
            file.write(b"\1")
    return folder


@pytest.mark.parametrize("text_config", [False, True])
def test_a_head_of_other_numbers_beside_a_tied_flag_is_taken_and_reported(
    text_config: bool, tmp_path: Path, vggt: Path
) -> None:
    folder = write_tied_with_a_head(tmp_path / "qwen", is_another=True, text_config=text_config)
    model_line, note, _ = check(folder, vggt, preset="qwen2.5-vl-3b")
    assert "825 tensors taken" in model_line and model_line.endswith("0 ignored")
    assert "config.json has tie_word_embeddings: true, but lm_head.weight is not the embedding" in note
    assert janus_shapes(load_config_values(folder))["lm_head.weight"] == (600, 2048)


def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path, vggt: Path) -> None:
    folder = write_tied_with_a_head(tmp_path / "qwen", is_another=False)
    model_line, _ = check(folder, vggt, preset="qwen2.5-vl-3b")
    assert "824 tensors taken" in model_line and model_line.endswith("1 ignored (lm_head.*)")


def test_a_head_of_another_shape_beside_a_tied_flag_is_refused(tmp_path: Path, vggt: Path) -> None:
    shapes = qwen_shapes(config_values("qwen2.5-vl-3b")) | {"lm_head.weight": (599, 2048)}
    folder = write_qwen(tmp_path / "qwen", shapes, preset="qwen2.5-vl-3b", shards=2)
    assert "lm_head.weight in model-" in refusal(folder, vggt, preset="qwen2.5-vl-3b")


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "model.pt"])
def test_a_git_lfs_pointer_is_called_one(name: str, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000000\n"
    folder = write_qwen(tmp_path / "qwen")
    if name.endswith(".pt"):
        vggt = tmp_path / "vggt"
        vggt.mkdir()
        (vggt / name).write_text(pointer)
        assert "model.pt: is a Git LFS pointer" in refusal(folder, vggt)
    else:
        (folder / name).write_text(pointer)
        assert f"{name}: is a Git LFS pointer" in refusal(folder, None)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, vggt: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refusal(folder, vggt)
