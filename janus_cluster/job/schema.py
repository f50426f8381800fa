"""The job file, key by key: types, limits and defaults. No torch, no disk, no environment.

Field descriptions are what `janus-cluster config schema` shows in an editor.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# As many as the gate's rounds and the tests were thought through for; Slurm itself would take more.
MOST_NODES = 64
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
# The language model's linear layers, where an adapter may sit.
LANGUAGE_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _one_or_many(value: object) -> object:
    """One string means a list of one; an unset ${VAR:-} leaves nothing."""
    if isinstance(value, str):
        value = [value]
    return [item for item in value if item != ""] if isinstance(value, list) else value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


def _sbatch_value(value: object) -> object:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    if isinstance(value, int):
        return str(value)
    raise ValueError("an option of sbatch needs a value: text, a whole number, true, false or a list")


def _can_be_paths(value: str | list[str] | dict[str, str] | None) -> str | list[str] | dict[str, str] | None:
    """The same; a text that Linux would take for no path, wherever it is asked for, is refused here."""
    for path in (value,) if isinstance(value, str) else value.values() if isinstance(value, dict) else value or ():
        longest = max(len(os.fsencode(name)) for name in path.split("/"))
        if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
            raise ValueError(
                f"a path has at most {LONGEST_PATH} bytes and each name in it {LONGEST_NAME}, "
                f"here {len(os.fsencode(path))} and {longest}"
            )
    return value


OneOrMany = Annotated[list[str], BeforeValidator(_one_or_many)]
# Linux's NAME_MAX and PATH_MAX.
LONGEST_NAME = 255
LONGEST_PATH = 4095
# Marks the fields of paths on the submitting machine: a text, a list of them, or the values of a mapping.
IS_PATH = "path"
FITS = AfterValidator(_can_be_paths)
OptionalText = Annotated[str | None, BeforeValidator(_empty_is_none)]
OptionalPath = Annotated[OptionalText, FITS, IS_PATH]
SbatchValue = Annotated[str | bool | list[str] | None, BeforeValidator(_sbatch_value)]
Slot = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class Section(BaseModel):
    """A frozen part of the job file that refuses keys it does not know."""

    # Validators are built when a job is first read: built at import they cost a third of the command line's time.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Hardware(Section):
    """What one node is."""

    gpus_per_node: int = Field(8, ge=0, le=16, description="GPUs asked of Slurm per node (--gres=gpu:<type>:<n>)")
    gpu_type: Annotated[str, FITS] = Field(
        "h800",
        pattern=r"^([A-Za-z0-9_.-]*|(.*/)?[A-Za-z0-9_.-]+\.yaml)$",
        description="Kind of GPU (templates/gpu/<name>.yaml, $JANUS_HOME/site/gpu/<name>.yaml, or a path) and type of "
        "the gres: a path's is its name without .yaml; empty for an untyped gres",
    )
    processes_per_node: int | None = Field(
        None, ge=1, le=64, description="Ranks per node; default: gpus_per_node (device cuda) or 1 (device cpu)"
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="Where training computes; cpu trains over gloo")
    gpu_memory_gb: float | None = Field(
        None,
        gt=0,
        description="Memory of one GPU (device cpu: of one rank) that plan and training.memory: auto reckon with, in "
        "GB (1e9 bytes); default: what is known of gpu_type",
    )


class Environment(Section):
    """How a node is prepared before anything runs."""

    profile: Annotated[str, FITS] = Field(
        "h800-ib",
        min_length=1,
        description="Which NCCL/torch variables are exported: a name (templates/env/<name>.yaml, "
        "$JANUS_HOME/site/env/<name>.yaml) or a path, in a job file from its folder",
    )
    setup: OneOrMany = Field(
        [],
        description="Shell lines run first, once, on the first node: module load, conda activate, …; every node gets "
        "the variables that they export",
    )
    setup_each_node: OneOrMany = Field(
        [],
        description="Shell lines run on every node before each step of the job (the gate has up to three, training is "
        "one): folders on the node's own disk, …",
    )
    python: OptionalText = Field(None, description="Interpreter on the nodes; default: the one that submits")
    code: Literal["snapshot", "installed"] = Field(
        "snapshot",
        description="snapshot: every attempt runs a copy of janus_cluster, made at submission; installed: what is "
        "installed on the nodes when it starts",
    )
    on_code_change: Literal["warn", "fail"] = Field(
        "warn", description="What an attempt does that finds other code than was submitted"
    )
    variables: dict[str, str] = Field(
        default_factory=dict,
        description="Own variables; they override the profile's. $${NAME} is expanded on each node",
    )
    forward: OneOrMany = Field(
        [], description="Names of variables carried from the submitter's environment (secrets go to a 0600 file)"
    )

    @field_validator("variables")
    @classmethod
    def _variable_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.match(VARIABLE_PATTERN, name):
                raise ValueError(f"{name!r} is no shell variable name")
            if "\n" in text or "\0" in text:
                raise ValueError(f"{name}: a value may not hold a line break")
        return value


class Preflight(Section):
    """The gate that runs in the same allocation, before training."""

    enabled: bool = Field(True, description="false trains without the gate (the same as --no-preflight)")
    profile: Annotated[str, FITS] = Field(
        "auto",
        min_length=1,
        description="What a sound node is: a name (templates/preflight/<name>.yaml, "
        "$JANUS_HOME/site/preflight/<name>.yaml) or a path, in a job file from its folder; auto: the one that goes "
        "with environment.profile",
    )
    thresholds: dict[str, Any] = Field(
        {},
        description="Values of the profile that this site replaces, such as thresholds.hca.ports_min: 4; each must be "
        "one that the profile has",
    )
    on_fail: Literal["stop", "exclude-and-retry"] = Field(
        "stop", description="exclude-and-retry: when one node is to blame, submit once more without it"
    )
    sysfs_root: OptionalPath = Field(
        None,
        description="A folder that replaces / when /sys, /proc, /dev/shm and the versions of installed packages "
        "(in its site-packages) are read (rehearsals); default: /",
    )
    command_timeout_s: float = Field(
        20, gt=0, le=600, description="How long nvidia-smi, ibstat, … may take; one that hangs is never a pass"
    )
    use_node_memory: bool = Field(
        True, description="Keep away from nodes that failed the gate, broke or were lost (janus-cluster nodes)"
    )
    forget_nodes_after_days: float = Field(7, ge=0, le=90, description="A remembered node is used again after this")
    require_paths: Annotated[OneOrMany, FITS, IS_PATH] = Field(
        [], description="More paths that must exist on every node"
    )
    min_free_gb: float = Field(1.0, ge=0, description="Free space required where the run folder is, in GB (1e9 bytes)")
    all_reduce_mb: float | None = Field(
        None, gt=0, description="All-reduce payload in MB (1e6 bytes); default: profile's"
    )
    timeout_s: int = Field(600, ge=10, le=7200, description="The gate's own limit; a node that has not reported fails")


class Model(Section):
    """Which network, and the paths of its weights."""

    preset: Literal["tiny", "qwen2.5-vl-3b", "qwen2.5-vl-7b"] = Field(
        "qwen2.5-vl-7b", description="tiny: random weights made on the spot, for rehearsals on CPU"
    )
    path: OptionalPath = Field(None, description="Qwen2.5-VL folder in the hub's layout, or a JanusVLN checkpoint")
    vggt_path: OptionalPath = Field(None, description="VGGT-1B: model.safetensors, model.pt or their folder")
    lam: float = Field(0.2, ge=0, le=10, description="λ: weight of the spatial memory added to the image embeddings")
    reference_frame: Literal["first", "last"] = Field(
        "first", description="first: the current frame supplies the memory; last: the predecessor's default"
    )


ActionName = Literal["STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT"]


def _one_meaning_each(value: dict[str, ActionName]) -> dict[str, ActionName]:
    meanings: dict[str, ActionName] = {}
    for spelling, action in value.items():
        if meanings.setdefault(spelling.strip().upper(), action) != action:
            raise ValueError(f"{spelling!r} is given two meanings: the case of letters does not count")
    return meanings


Actions = Annotated[dict[str, ActionName], AfterValidator(_one_meaning_each)]


def _roots(value: object) -> object:
    """A path alone means a root of weight 1; an unset ${VAR:-} leaves nothing."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"path": item} if isinstance(item, str) else item for item in value if item is not None and item != ""]


class Root(Section):
    """One data set."""

    path: Annotated[str, FITS, IS_PATH] = Field(description="A folder of episodes, or a file of records")
    weight: float = Field(1.0, gt=0, le=1000, description="How often its samples are drawn, against the other roots'")
    format: Literal["auto", "episodes", "json", "annotation", "trajectories"] = Field(
        "auto", description="auto: recognised from the content"
    )
    images: OptionalPath = Field(None, description="Root of relative image paths; default: the data set's own folder")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of its samples that is used, drawn with training.seed")
    image_roots: Annotated[dict[str, str], FITS, IS_PATH] = Field(
        {}, description="As data.image_roots, for this data set alone; before that"
    )
    actions: Actions = Field({}, description="Spellings of actions in this data set alone; before data.actions")


class Data(Section):
    """Which episodes, and how a sample is made of them."""

    roots: Annotated[list[Root], BeforeValidator(_roots)] = Field(
        [], description="Data sets: paths, or {path, weight, …}"
    )
    image_roots: Annotated[dict[str, str], FITS, IS_PATH] = Field(
        {},
        description="Folders of another machine's frames → those here, {/theirs: /ours}; for paths in files of records",
    )
    actions: Actions = Field(
        {}, description='Other spellings of actions: {FORWARD: MOVE_FORWARD, "4": TURN_LEFT}; in any case of letters'
    )
    on_bad: Literal["fail", "skip"] = Field(
        "skip", description="A sample that cannot be used: fail ends the run, skip lists it and goes on"
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="With on_bad skip: more bad samples than this end the run"
    )
    max_absent_fraction: float = Field(
        0.5, ge=0, le=1, description="More trajectories of a root without a folder of frames than this end the run"
    )
    verify_images: Literal["header", "decode"] = Field(
        "header", description="How frames are checked once, for the index: first and last bytes, or every pixel"
    )
    index_dir: OptionalPath = Field(
        None,
        description="Where the index of the data is kept, on a disk that all nodes share; default: beside the runs",
    )
    on_too_long: Literal["fail", "shorten_history"] = Field(
        "fail", description="A sample of more than max_length tokens; image tokens are never cut"
    )
    group_by_length: bool = Field(True, description="Batches of samples with about the same number of tokens")
    history: int = Field(8, ge=0, le=64, description="History frames before the current one, at most")
    image_mode: Literal["crop", "pad"] = Field(
        "crop", description="crop: upstream's; pad: the predecessor's white bars"
    )
    image_width: int = Field(
        644, ge=56, le=2240, multiple_of=28, description="Frames are resized to this width, pixels"
    )
    max_pixels: int = Field(
        576 * 28 * 28, ge=784, le=2**26, description="Pixels per frame, at most; wider frames are made smaller"
    )
    min_pixels: int = Field(16 * 28 * 28, ge=784, le=2**26, description="Pixels per frame, at least")
    max_length: int = Field(8192, ge=64, description="Tokens per sample; a longer sample is refused, never cut")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="Share of episodes held out (split by episode)")
    num_workers: int = Field(4, ge=0, le=64, description="Loader processes per rank")


class SegmentWeights(Section):
    """Weight of each part of the target text in the loss; 0 means 0."""

    subinstruction: float = Field(1.0, ge=0, description="SUBINSTRUCTION")
    description_2d: float = Field(1.0, ge=0, description="2D_DESCRIPTION")
    description_3d: float = Field(1.0, ge=0, description="3D_DESCRIPTION")
    action: float = Field(3.0, ge=0, description="ACTION")


class Tune(Section):
    """Which parts learn; the rest is frozen, outside DeepSpeed and not saved again."""

    llm: bool = Field(True, description="The language model and lm_head")
    projector: bool = Field(True, description="visual.merger")
    vision: bool = Field(False, description="the ViT blocks")
    vggt_merger: bool = Field(True, description="The layers that bring VGGT's memory to the embeddings")
    action_head: bool = Field(True, description="The head that predicts the action")


class Lora(Section):
    """Low-rank adapters on the language model instead of its own weights (peft)."""

    enabled: bool = Field(False, description="true: adapters learn, the language model's own weights do not")
    rank: int = Field(16, ge=1, le=1024, description="Inner width of an adapter")
    alpha: int = Field(32, ge=1, description="An adapter's output is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before an adapter")
    target_modules: OneOrMany = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], description="Linear layers of the language model that get an adapter"
    )


class Training(Section):
    """Optimisation. Effective batch = per_device_batch_size × gradient_accumulation_steps × ranks."""

    memory: Literal["manual", "auto"] = Field(
        "manual",
        description="auto: deepspeed.profile, per_device_batch_size, gradient_accumulation_steps and "
        "gradient_checkpointing follow from what a GPU holds, the effective batch stays; those given with --set stay, "
        "too. manual: all as written",
    )
    per_device_batch_size: int = Field(1, ge=1, le=1024, description="Samples of a rank in one micro-step")
    gradient_accumulation_steps: int = Field(8, ge=1, le=4096, description="Micro-steps per optimizer step")
    effective_batch_size: int | None = Field(
        None, ge=1, description="The intended value; the job is refused when the arithmetic gives another"
    )
    num_epochs: float = Field(1.0, gt=0, description="Passes over the data")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; wins over num_epochs")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="Of all parts that have none of their own")
    projector_learning_rate: float = Field(1e-5, gt=0, le=1, description="visual.merger and the VGGT merger")
    vision_learning_rate: float = Field(1e-6, gt=0, le=1, description="ViT blocks, where tune.vision is true")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="The course of the learning rates after the warm-up"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which learning rates rise")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's β1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's β2")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients of a larger norm are scaled down to it")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Numbers that training computes in")
    gradient_checkpointing: bool = Field(True, description="Recompute activations of the language layers")
    gradient_checkpointing_every: int = Field(
        1, ge=1, description="Of the language layers every n-th is recomputed; 1: all"
    )
    compile: Literal["none", "vggt"] = Field(
        "none",
        description="vggt: torch.compile of VGGT's blocks, which are frozen. The first step takes minutes longer, and "
        "a node needs a C++ compiler; not yet measured on a GPU",
    )
    lora: Lora = Lora()
    action_loss_weight: float = Field(1.0, ge=0, description="d: weight of the action head's cross-entropy")
    action_loss_ramp_steps: int = Field(0, ge=0, description="Steps over which d grows from 0 to action_loss_weight")
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="Held-out evaluation during training; null: at the end"
    )
    segment_weights: SegmentWeights = SegmentWeights()
    tune: Tune = Tune()
    seed: int = Field(42, ge=0, description="Decides held-out episodes, order of samples, new weights")
    logging_steps: int = Field(1, ge=1, description="Optimizer steps between two lines of metrics.jsonl")
    ddp_timeout_s: int = Field(7200, ge=30, description="How long a collective may hang before the job is ended")
    hang_timeout_s: int = Field(
        1800, ge=5, description="Without progress of any rank for this long, after the first step, the attempt is ended"
    )


class DeepSpeed(Section):
    """The ZeRO JSON: a shipped profile, and single values over it."""

    profile: Literal["zero0", "zero1", "zero2", "zero2_offload", "zero3"] = Field(
        "zero3", description="templates/deepspeed/<profile>.json"
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Dotted DeepSpeed keys, e.g. zero_optimization.reduce_bucket_size: 5e8"
    )


class Checkpoint(Section):
    """What is saved, and from where a run goes on."""

    every_steps: int = Field(500, ge=1, description="Optimizer steps between two checkpoints")
    keep_last: int = Field(2, ge=1, description="So many of the newest checkpoints stay")
    keep_every: int | None = Field(
        None, ge=1, description="A checkpoint whose step is a multiple of it is never removed"
    )
    export: bool = Field(True, description="Write a folder at the end that from_pretrained loads")
    export_layout: Literal["own", "janusvln"] = Field(
        "own",
        description="janusvln: beside export/ also export-janusvln/, which JanusVLN's own evaluator reads "
        "(transformers 4.5x, VGGT inside), as `janus-cluster export` writes it",
    )
    confirm_cancel_min: float = Field(
        10, ge=0, description="`cancel` asks first when more minutes of work than this would be lost"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: the newest complete checkpoint of this run folder"
    )


class Restart(Section):
    """What happens to a job whose attempt ended before its work was done."""

    on_stop: Literal["requeue", "end"] = Field(
        "requeue",
        description="After a stop signal (walltime, preemption) and a checkpoint: back into the queue, or over",
    )
    on_failure: Literal["transient", "always", "never"] = Field(
        "transient",
        description="One more attempt in the same allocation: after faults that need not come again (a rank killed, "
        "a hang, network, GPU), after every failure of training, or never",
    )
    max_without_progress: int = Field(
        3,
        ge=1,
        le=100,
        description="So many attempts in a row without progress end the job: less than a tenth of their time was steps "
        "that a checkpoint kept",
    )
    accept_changed_data: bool = Field(
        False, description="Go on without a warning where the samples are no longer those that the run began with"
    )
    stop_timeout_s: int = Field(
        240, ge=1, description="How long the ranks may take from a stop signal to their checkpoint"
    )


class JobConfig(Section):
    """One job file."""

    name: Slot = Field(description="Run folders, Slurm's job name and `tail NAME` use it")
    kind: Literal["train", "preflight", "index"] = Field(
        "train", description="preflight: the gate alone; index: the index of the data alone, nothing is trained"
    )
    nodes: int = Field(1, ge=1, le=MOST_NODES, description="Number of nodes; --nodes wins over it")
    nodes_min: int | None = Field(
        None,
        ge=1,
        le=MOST_NODES,
        description="Slurm may run the job on fewer nodes, but on no fewer than this (sbatch --nodes=MIN-MAX): when a "
        "node is lost, or bad, and none takes its place, the run goes on with what is left. The effective batch is "
        "kept. null: exactly `nodes`",
    )
    compat: Literal["none", "predecessor"] = Field(
        "none", description="predecessor: pad, reference_frame last and padded history, for comparison only"
    )
    runs_dir: OptionalPath = Field(None, description="Where run folders are made; default: $JANUS_HOME/runs or ./runs")
    slurm: dict[str, SbatchValue] = Field(default_factory=dict, description="Any sbatch option under its own long name")
    slurm_extra: OneOrMany = Field(
        [],
        description="Options of the site's Slurm plugins for #SBATCH lines, as written: --container-image=…, --uenv=…",
    )
    srun_extra: OneOrMany = Field(
        [], description="Options for every srun of the job, as written, such as --container-mounts=…"
    )
    hardware: Hardware = Hardware()
    environment: Environment = Environment()
    preflight: Preflight = Preflight()
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpoint = Checkpoint()
    restart: Restart = Restart()
