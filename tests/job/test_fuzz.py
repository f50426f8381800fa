"""Damaged job files and names too long for a file: each ends in a message or in a run folder, never in a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given

from janus_cluster.desk.submit import Request, submit
from janus_cluster.errors import UsageError
from janus_cluster.job.load import known_keys
from janus_cluster.job.resources import jobs_dir
from tests.drawing import RANDOM, drawn

NUM_FILES = 2_500  # of each shipped job
ENVIRON = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d", "HF_TOKEN": "hunter2", "USER": "me"}
WORDS = (
    *("{", "}", "[", "]", "&a ", "*a", "!!python/object:os.system x", "!!binary x", "<<: *a", "%YAML 1.1", "---\n"),
    *("...", "? ", "'", '"', "|", ">", "\t", "\n", "\0", "\x1b[31m", "\ud7ff", "\u202e", "é", "\U0001f4a5"),
    *("${HF_TOKEN}", "${", "${MODEL_PATH}", "$(id)", "`id`", ";", "../../..", "/", "~", "null", "true", "-1"),
    *("1e999", ".nan", ".inf", "0x10", "999999999999999999999", "no", "slurm:", "name:", "training:"),
    *("{a: {b: {c: {}}}}", "- ", ":", ": ", "#", "a" * 5000, "[" * 300),
)


def damage(text: str, rng: random.Random) -> bytes:
    """`text` after a few random cuts, insertions, swaps and flipped bytes."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(WORDS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 40) :]
        elif kind == 2:
            lines = text.split("\n")
            rng.shuffle(lines)
            text = "\n".join(lines)
        elif kind == 3:
            text = text[:at]
        elif kind == 4:
            lines = text.split("\n")
            i = rng.randrange(len(lines))
            key, colon, _ = lines[i].partition(":")
            lines[i] = f"{key}{colon} {rng.choice(WORDS)}"
            text = "\n".join(lines)
        else:
            text = text[:at] + chr(rng.randrange(1, 0x300)) + text[at + 1 :]
        text = text or "x"
    data = bytearray(text.encode("utf-8", errors="surrogatepass"))
    if rng.random() < 0.1 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("text", ["a" * 5000, "a/" * 3000, "/" + "a" * 256, "~nobody-of-this-name/x", "é" * 200])
def test_no_key_of_a_job_file_takes_a_path_that_no_file_can_have(tmp_path: Path, text: str) -> None:
    environ = ENVIRON | {"JANUS_HOME": str(tmp_path / "home")}
    for key in sorted(known_keys()):
        try:
            submit(Request(job="demo", dry_run=True, sets=(f"{key}={text}",)), environ=environ, cwd=tmp_path)
        except UsageError as e:
            assert key.split(".")[0] in str(e) or "data.roots" in str(e), key


@pytest.mark.slow
@pytest.mark.parametrize("original", sorted(p.stem for p in jobs_dir().glob("*.yaml")))
def test_damaged_job_files_end_in_a_message_and_write_nothing_elsewhere(tmp_path: Path, original: str) -> None:
    text = (jobs_dir() / f"{original}.yaml").read_text(encoding="utf-8")
    job = tmp_path / "job.yaml"
    environ = ENVIRON | {"JANUS_HOME": str(tmp_path / "home")}
    accepted = []

    @drawn(NUM_FILES)
    @given(rng=RANDOM)
    def submit_damaged(rng: random.Random) -> None:
        job.write_bytes(damage(text, rng))
        try:
            done = submit(Request(job=str(job), dry_run=True), environ=environ, cwd=tmp_path)
        except UsageError as e:
            assert e.exit_code == 2
            assert str(e).strip(), "an empty message"
            assert "hunter2" not in str(e)
        else:
            accepted.append(done.run.path)
            assert done.run.path.is_relative_to(tmp_path / "home") or done.resolved.job.runs_dir is not None

    submit_damaged()
    written = {p.name for p in tmp_path.iterdir()}
    assert written <= {"job.yaml", "home"}
    assert len(accepted) < NUM_FILES // 2, "the damage does too little to prove anything"
