"""An export in the layout in which JanusVLN was published, for the field's own evaluator (transformers 4.5x).

    python -m janus_cluster.training.published MODEL --out DIR [--vggt-path PATH]

VGGT is in model.safetensors under `vggt.`; config.json is flat, with rope_theta and rope_scaling; the tokenizer's
special tokens are where transformers 4 looks for them. `janus-cluster export` starts this.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from janus_cluster.errors import JanusError, UsageError, print_error
from janus_cluster.janusvln.data.tokenizer import build_image_processor, load_tokenizer
from janus_cluster.janusvln.model.checkpoint_files import read_tensors
from janus_cluster.janusvln.model.janus import JanusConfig
from janus_cluster.janusvln.model.write import require_readable, write_weights
from janus_cluster.job.schema import Data
from janus_cluster.modelspec.check_weights import find_new_modules, judge_vggt_weights
from janus_cluster.modelspec.safetensors_header import render_names
from janus_cluster.modelspec.vggt_source import VGGT_IN_JANUS_PREFIX, VggtSource, find_vggt, read_tensor_index
from janus_cluster.modelspec.weight_names import (
    ACTION_HEAD_PREFIX,
    VGGT_PREFIX,
    janus_shapes,
    name_in_model,
    name_on_disk,
)
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.streams import run_program
from janus_cluster.training.new_folder import new_folder
from janus_cluster.training.subject import PREPARATION_NAME, choose_vggt, load_preparation

ARCHITECTURE, PROCESSOR = "Qwen2_5_VLForConditionalGenerationForJanusVLN", "Qwen2_5_VLProcessor"
# The release whose form the files have: the evaluator's requirements pin it.
TRANSFORMERS = "4.50.0"
# What transformers 5 writes and 4.50 would take for a setting of its own, or for a mapping.
_NEW_IN_TOKENIZER = ("backend", "extra_special_tokens", "is_local", "local_files_only")
_NEW_IN_CONFIG = {"layer_types", "model_type", "rope_parameters", "tie_word_embeddings"}


def write_published(model: Path, out: Path, *, vggt_path: str | None = None) -> None:
    """`out` holds the model in the folder `model` (our export, or any model.path) in the published layout.

    Raises: UsageError if `model` is no whole model, or VGGT's weights are nowhere named; TrainingFailed if what was
    written cannot be read back.
    """
    preparation = load_preparation(model)
    vggt = find_vggt(choose_vggt(model, vggt_path, preparation.vggt_path), key="VGGT")
    config = JanusConfig.from_pretrained(model, local_files_only=True)
    tensors = _model_tensors(model, config) | _vggt_tensors(vggt, config)
    has_head = any(name.startswith(ACTION_HEAD_PREFIX) for name in tensors)
    with new_folder(out) as new:
        write_weights(new, tensors)
        write_json_atomically(new / "config.json", flat_config(config))
        require_readable(new, tensors, without=() if has_head else (ACTION_HEAD_PREFIX,))
        GenerationConfig.from_pretrained(model).save_pretrained(new)
        _write_tokenizer(load_tokenizer(model), new)
        _write_image_processor(Data.model_validate(preparation.data), new)
        replace(preparation, vggt_path=None).write(new / PREPARATION_NAME)


def flat_config(config: JanusConfig) -> dict[str, Any]:
    """config.json as transformers 4.50 reads it: the language model's numbers at the top, rope in two keys of it."""
    whole = config.to_dict()
    text, vision = whole.pop("text_config"), whole.pop("vision_config")
    rope = dict(text["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    # Settings of every configuration, none of the network; what transformers 5 leaves out as its default stays in.
    left_out = _NEW_IN_CONFIG | PreTrainedConfig().to_dict().keys()
    own, text, vision = ({k: v for k, v in part.items() if k not in left_out} for part in (whole, text, vision))
    return {
        **own,
        **text,
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2_5_vl",
        "rope_theta": theta,
        "rope_scaling": rope | {"type": kind, "rope_type": kind},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "transformers_version": TRANSFORMERS,
        # Without it the evaluator hands no frame to VGGT.
        "use_vggt_feature": True,
        "vision_config": vision | {"model_type": "qwen2_5_vl"},
    }


def old_tokenizer_config(
    values: Mapping[str, Any], added_tokens: Sequence[Mapping[str, Any]], chat_template: str
) -> dict[str, Any]:
    """tokenizer_config.json for transformers 4.50, where `extra_special_tokens` is a mapping and not a list."""
    extra = values.get("extra_special_tokens") or []
    named = dict(extra) if isinstance(extra, Mapping) else {}
    kept = {key: value for key, value in values.items() if key not in _NEW_IN_TOKENIZER and value is not None}
    return {
        **kept,
        **named,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added_tokens
        },
        "additional_special_tokens": list(
            dict.fromkeys([*(values.get("additional_special_tokens") or []), *(() if named else extra)])
        ),
        "extra_special_tokens": named,
        "chat_template": chat_template,
        "processor_class": PROCESSOR,
        "tokenizer_class": "Qwen2Tokenizer",
    }


def _model_tensors(model: Path, config: JanusConfig) -> dict[str, Tensor]:
    """Every weight of the network but VGGT's, under the hub's names; the action head's where the model has one."""
    index = read_tensor_index(model)
    names = {name_in_model(name): name for name in index}
    absent = ACTION_HEAD_PREFIX if ACTION_HEAD_PREFIX in find_new_modules(index) else "\0"
    wanted = [name for name in janus_shapes(config.to_dict()) if not name.startswith(absent)]
    if missing := [name_on_disk(name) for name in wanted if name not in names]:
        raise UsageError(
            f"{model}: {len(missing)} of {len(wanted)} weights are not there: {render_names(missing)}",
            hint="name a trained model: a run, its export, or a folder like it",
        )
    read = read_tensors(index, [names[name] for name in wanted])
    return {name_on_disk(name): read[names[name]] for name in wanted}


def _vggt_tensors(source: VggtSource, config: JanusConfig) -> dict[str, Tensor]:
    """All of VGGT's aggregator that its file holds, in the model's type, as training had it."""
    judge_vggt_weights(source, config.vggt)
    names = [name for name in source.tensors if name.startswith(VGGT_PREFIX)]
    on_disk = {source.prefix + name: source.tensors[name] for name in names}
    return {
        VGGT_IN_JANUS_PREFIX + name.removeprefix(source.prefix): tensor.to(config.dtype or tensor.dtype)
        for name, tensor in read_tensors(on_disk, on_disk).items()
    }


def _write_tokenizer(tokenizer: Any, out: Path) -> None:
    tokenizer.save_pretrained(str(out))
    added = read_json(out / "tokenizer.json")["added_tokens"]
    values = old_tokenizer_config(read_json(out / "tokenizer_config.json"), added, tokenizer.chat_template)
    write_json_atomically(out / "tokenizer_config.json", values)
    # Transformers 4's processors look here.
    write_json_atomically(out / "chat_template.json", {"chat_template": tokenizer.chat_template})
    (out / "chat_template.jinja").unlink(missing_ok=True)


def _write_image_processor(data: Data, out: Path) -> None:
    build_image_processor(data).save_pretrained(str(out))
    path = out / "preprocessor_config.json"
    # 4.50 takes the limits from these two keys and passes over `size`.
    limits = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    write_json_atomically(path, read_json(path) | limits | {"processor_class": PROCESSOR})


def main(argv: Sequence[str] | None = None) -> int:
    """The published layout is in --out. Returns: the exit code; errors are printed on stderr."""
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.published", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vggt-path")
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        write_published(arguments.model, arguments.out, vggt_path=arguments.vggt_path)
    except JanusError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    run_program(main)
