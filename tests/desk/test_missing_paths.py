"""A path that this machine does not have is mended where it was given: a variable, an option, the job file."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_cluster.desk.submit import check_paths
from janus_cluster.errors import UsageError
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job

ENVIRON = {"MODEL_PATH": "/no/m", "DATA_ROOT": "/no/d"}
JOB = """\
name: x
nodes: 1
model: {path: "${MODEL_PATH}", vggt_path: /no/v}
data: {roots: ["${DATA_ROOT}"]}
"""
OF_FILE = "mend model.vggt_path in the job file, or add --set model.vggt_path=PATH"


@pytest.mark.parametrize(
    ("sets", "hint"),
    [
        ((), f"export MODEL_PATH=PATH DATA_ROOT=PATH; {OF_FILE}"),
        (("model.vggt_path=/",), "export MODEL_PATH=PATH DATA_ROOT=PATH"),
        (("model.vggt_path=/", "model.path=/no/x", "data.roots=[/]"), "--set model.path=PATH"),
    ],
)
def test_a_missing_path_is_mended_where_it_was_given(sets: tuple[str, ...], hint: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    loaded = load_job(tmp_path / "job.yaml", sets=sets, environ=ENVIRON)
    resolved = resolve_job(
        loaded, run_dir=tmp_path, cluster="slurm", environ=ENVIRON, cwd=tmp_path, python="/env/bin/python"
    )
    with pytest.raises(UsageError) as raised:
        check_paths(resolved, source=loaded.source, origins=loaded.origins)
    assert raised.value.hint == hint
    assert "no such file or folder" in raised.value.message
