from __future__ import annotations

import json
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.load import LoadedJob, find_job_file, known_keys, load_job
from janus_cluster.job.resources import jobs_dir
from janus_cluster.job.schema import JobConfig

ENVIRON = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}


def load(tmp_path: Path, text: str, *sets: str, **environ: str) -> LoadedJob:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path, sets=sets, environ=environ)


def problem(tmp_path: Path, text: str, *sets: str, **environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *sets, **environ)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(jobs_dir().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_job_loads(path: Path) -> None:
    job = load_job(path, environ=ENVIRON).config
    assert job.name


def test_shipped_training_jobs_hold_the_predecessors_hyper_parameters() -> None:
    for nodes, batch in ((1, 64), (2, 128)):
        job = load_job(jobs_dir() / f"train_{nodes}node.yaml", environ=ENVIRON).config
        t = job.training
        assert (job.nodes, t.effective_batch_size) == (nodes, batch)
        assert (t.per_device_batch_size, t.gradient_accumulation_steps) == (1, 8)
        assert (t.learning_rate, t.projector_learning_rate, t.vision_learning_rate) == (2e-5, 1e-5, 1e-6)
        assert (t.lr_scheduler, t.warmup_ratio, t.precision) == ("cosine", 0.03, "bf16")
        assert (t.memory, t.ddp_timeout_s) == ("auto", 7200)
        assert (job.data.history, job.data.max_pixels, job.data.min_pixels) == (8, 576 * 28 * 28, 16 * 28 * 28)


def test_the_predecessors_variables_are_taken_from_the_environment() -> None:
    environ = ENVIRON | {
        "PER_DEVICE_BATCH": "2",
        "GRAD_ACCUM_STEPS": "4",
        "MAX_HISTORY_IMAGES": "6",
        "LEARNING_RATE": "3e-5",
        "NUM_EPOCHS": "2",
        "OUTPUT_DIR": "/out",
    }
    loaded = load_job(jobs_dir() / "train_2node.yaml", environ=environ)
    job = loaded.config
    assert (job.model.path, job.model.vggt_path, job.data.roots[0].path, job.runs_dir) == ("/m", "/v", "/d", "/out")
    t = job.training
    assert (t.per_device_batch_size, t.gradient_accumulation_steps, t.learning_rate, t.num_epochs) == (2, 4, 3e-5, 2)
    assert job.data.history == 6
    assert loaded.origins["training.learning_rate"].startswith("$LEARNING_RATE (")


def test_an_unset_variable_names_file_line_key_and_what_to_type(tmp_path: Path) -> None:
    output = problem(tmp_path, "name: x\nmodel:\n  path: ${MODEL_PATH}\n")
    for word in ("job.yaml:3", "model.path", "${MODEL_PATH} is not set", "export MODEL_PATH=", "--set model.path="):
        assert word in output


def test_set_makes_an_unset_variable_unnecessary(tmp_path: Path) -> None:
    loaded = load(tmp_path, "name: x\nmodel:\n  path: ${MODEL_PATH}\n", "model.path=/w")
    assert loaded.config.model.path == "/w"
    assert loaded.origins["model.path"] == "--set"


def test_a_dollar_can_be_kept_for_the_node(tmp_path: Path) -> None:
    loaded = load(tmp_path, "name: x\nenvironment:\n  setup: ['source $${HOME}/env.sh']\n")
    assert loaded.config.environment.setup == ["source ${HOME}/env.sh"]


def test_a_quoted_variable_stays_text(tmp_path: Path) -> None:
    loaded = load(tmp_path, 'name: x\nmodel:\n  path: "${P}"\n', P="123")
    assert loaded.config.model.path == "123"


def test_a_secret_is_never_put_into_a_value(tmp_path: Path) -> None:
    output = problem(tmp_path, "name: x\nslurm:\n  comment: ${HF_TOKEN}\n", HF_TOKEN="hunter2")
    assert "environment.forward" in output
    assert "hunter2" not in output


def test_unknown_keys_are_named_with_file_line_and_a_guess(tmp_path: Path) -> None:
    output = problem(tmp_path, "name: x\ntraining:\n  lerning_rate: 1e-5\n")
    assert "job.yaml:3: training.lerning_rate: unknown key; did you mean training.learning_rate?" in output
    assert "per_device_batch_size" in output


def test_a_key_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    assert "did you mean training.learning_rate?" in problem(tmp_path, "name: x\nlearning_rate: 1\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nnodes: 65\n", ["job.yaml:2: nodes: 65", "less than or equal to 64"]),
        ("name: x\nnodes: 0\n", ["nodes: 0", "greater than or equal to 1"]),
        ("name: x\ntraining: {num_epochs: yes}\n", ["training.num_epochs", '"yes"', "number"]),
        ("name: x\ntraining: {gradient_checkpointing: on}\n", ["gradient_checkpointing", '"on"', "boolean"]),
        ("name: x\ntraining: {per_device_batch_size: 1.5}\n", ["per_device_batch_size", "1.5", "integer"]),
        ("name: x\ntraining: {per_device_batch_size: 0}\n", ["per_device_batch_size", "greater than or equal to 1"]),
        # The size of a frame is found in steps of 28 pixels: such a number would take too long.
        ("name: x\ndata: {min_pixels: 999999999999999999999}\n", ["min_pixels", "less than or equal to 67108864"]),
        ("name: x\ntraining: 3\n", ["training: 3"]),
        ("name: x\nslurm: {partition: {a: 1}}\n", ["slurm.partition", '{"a": 1}', "needs a value: text"]),
        ("name: ../x\n", ["name", "../x"]),
        ("name: 'a b'\n", ["name", "a b"]),
        ("nodes: 1\n", ["name: must be given"]),
        ("name: x\ndata: {image_width: 100}\n", ["data.image_width", "100", "multiple of 28"]),
        ("name: x\nenvironment: {variables: {'A B': 1}}\n", ["environment.variables", "A B"]),
        ('name: x\nenvironment: {variables: {A: "1\\n2"}}\n', ["environment.variables", "line break"]),
    ],
)
def test_wrong_values_name_key_value_and_what_is_allowed(tmp_path: Path, text: str, words: list[str]) -> None:
    output = problem(tmp_path, text)
    for word in ["job.yaml", *words]:
        assert word in output


def test_where_text_is_wanted_an_unquoted_value_arrives_as_written(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: 2026_11\n"
        "slurm: {account: 2026_11, qos: 1_2, constraint: [rack1|rack2], nodelist: [07, 1e3], time: 90, requeue: true}\n"
        "environment: {setup: 1_000, variables: {V: 2.20, W: 1e3, X: true, Y: 0123}}\n"
        "data: {roots: [2026_11, {path: 1_0, weight: 1_0}]}\n"
        "model: {path: null}\n"
    )
    job = load_job(path, sets=["slurm.comment=1_0", "slurm.licenses=[1_0, 2_0]"], environ={}).config
    assert job.name == "2026_11"
    assert job.slurm == {
        "account": "2026_11", "qos": "1_2", "constraint": ["rack1|rack2"], "nodelist": ["07", "1e3"], "time": "90",
        "requeue": True, "comment": "1_0", "licenses": ["1_0", "2_0"],
    }  # fmt: skip
    assert job.environment.setup == ["1_000"]
    assert job.environment.variables == {"V": "2.20", "W": "1e3", "X": "true", "Y": "0123"}
    assert [(root.path, root.weight) for root in job.data.roots] == [("2026_11", 1.0), ("1_0", 10.0)]
    assert job.model.path is None


def test_a_list_is_parsed_before_variables_are_put_in(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\n")
    environ = {"A": "/a, b", "B": "/2026_11"}
    job = load_job(path, sets=['data.roots=["${A}", "${B}", {path: "${B}/c"}]'], environ=environ).config
    assert [root.path for root in job.data.roots] == ["/a, b", "/2026_11", "/2026_11/c"]


def test_a_reference_that_yaml_cannot_read_in_a_list_is_refused_with_the_quoted_form(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\n")
    with pytest.raises(UsageError) as caught:
        load_job(path, sets=["data.roots=[${A}]"], environ={"A": "/a"})
    assert "--set data.roots" in str(caught.value)
    assert '["${NAME}"]' in str(caught.value.hint)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    output = problem(tmp_path, "name: x\nfoo: 1\nmodel: {preset: huge}\n")
    assert "2 problems" in output
    assert "foo" in output
    assert "huge" in output


def test_set_works_for_every_key() -> None:
    job = load_job(jobs_dir() / "demo.yaml", environ={}).config
    values = job.model_dump(mode="json")
    for key in known_keys():
        value: object = values
        for part in key.split("."):
            value = value[part]  # type: ignore[index]
        if isinstance(value, (dict, type(None))):
            continue
        again = load_job(jobs_dir() / "demo.yaml", sets=[f"{key}={json.dumps(value)}"], environ={})
        assert again.config == job, key
        assert again.origins[key] == "--set"


def test_set_of_a_deepspeed_key_keeps_its_dots(tmp_path: Path) -> None:
    loaded = load(tmp_path, "name: x\n", "deepspeed.overrides.zero_optimization.reduce_bucket_size=5e8")
    assert loaded.config.deepspeed.overrides == {"zero_optimization.reduce_bucket_size": 5e8}


@pytest.mark.parametrize("text", ["nokey", "=3", "a.b=[1"])
def test_a_malformed_set_is_refused(tmp_path: Path, text: str) -> None:
    assert "--set" in problem(tmp_path, "name: x\n", text)


def test_an_unknown_key_in_set_gets_a_guess(tmp_path: Path) -> None:
    output = problem(tmp_path, "name: x\n", "training.lr=1")
    assert "--set: training.lr: unknown key" in output


def test_every_value_has_an_origin(tmp_path: Path) -> None:
    loaded = load(tmp_path, "name: x\ntraining:\n  seed: 7\n")
    assert loaded.origins["training.seed"].endswith("job.yaml:3")
    assert loaded.origins["training.weight_decay"] == "default"
    assert {k for k in known_keys() if k not in loaded.origins} == {
        k for k in known_keys() if any(o.startswith(k + ".") for o in loaded.origins)
    }


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "name: x\ntraining:\n").config.training == JobConfig(name="x").training


def test_a_missing_job_lists_the_shipped_ones() -> None:
    with pytest.raises(UsageError) as caught:
        find_job_file("dmeo", nodes=None)
    assert "did you mean demo?" in caught.value.message
    assert "train_2node" in str(caught.value.hint)


def test_shipped_jobs_are_found_by_name() -> None:
    assert find_job_file("demo", nodes=None) == jobs_dir() / "demo.yaml"
    assert find_job_file(None, nodes=1) == jobs_dir() / "train_1node.yaml"
    assert find_job_file(None, nodes=4) == find_job_file(None, nodes=2)
    assert find_job_file(None, nodes=None) == jobs_dir() / "train_2node.yaml"
