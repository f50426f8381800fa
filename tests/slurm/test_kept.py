"""How often Slurm is asked by who looks again and again: a squeue that counts, and the commands as users type them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.config.home import slurm_answers_json
from janus_cluster.observe.cancel import cancel_run
from janus_cluster.rundir import RunDir, write_json_atomically
from janus_cluster.slurm.state import JobState, load_job_states

KEEP_S = 15.0


class Site:
    """A Slurm on PATH that counts its questions: `jobs` maps a job id to its state, `others` are other programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[str, str] = {}
        (folder / "bin").mkdir(parents=True)
        (folder / "calls").touch()
        program = f"#!{sys.executable}\n" + (
            "import json, sys, time\nfrom pathlib import Path\n"
            f"folder = Path({str(folder)!r})\nname = Path(sys.argv[0]).name\n"
            "with (folder / 'calls').open('a') as f: f.write(name + '\\n')\n"
            "jobs = json.loads((folder / 'jobs').read_text())\ntime.sleep(float(jobs.get('delay', 0)))\n"
            "asked = next((a[7:].split(',') for a in sys.argv if a.startswith('--jobs=')), [])\n"
            "if name == 'squeue':\n"
            "    for i in asked:\n"
            "        if i in jobs: print('\\x1f'.join([i, jobs[i], '0', '0', '', 'N/A', str(int(time.time())),"
            " 'Resources', '', 'j', '']))\n"
        )
        for name in ("squeue", "scancel"):
            (folder / "bin" / name).write_text(program)
            (folder / "bin" / name).chmod(0o755)
        self.set()

    def set(self, **jobs: str) -> None:
        self.jobs |= {name.removeprefix("j"): state for name, state in jobs.items()}
        (self.folder / "jobs").write_text(json.dumps(self.jobs))

    @property
    def questions(self) -> int:
        return (self.folder / "calls").read_text().split().count("squeue")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path / "site")
    monkeypatch.setenv("PATH", str(made.folder / "bin"))
    monkeypatch.setenv("JANUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return made


def make_run(home: Path, job_id: str, **sent: Any) -> RunDir:
    run = RunDir(home / "runs" / f"r{job_id}-1-1")
    run.logs.mkdir(parents=True, exist_ok=True)
    value = {"cluster": "slurm", "job_id": job_id, "submitted_at": time.time() - 60} | sent
    write_json_atomically(run.submission_json, value)
    return run


def say(run: RunDir, state: str, **changes: Any) -> None:
    word = {"cluster": "slurm", "job_id": run.name[1:2], "attempt": 1, "nodes": ["n1"], "state": state}
    times = {"started_at": time.time(), "updated_at": time.time()}
    write_json_atomically(run.status_json, word | times | changes)


def look(runs: Sequence[RunDir], *, now: float | None = None) -> list[JobState]:
    return load_job_states(runs, now=now, max_age_s=KEEP_S)


def type_in(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "janus_cluster.cli", *argv]
    env = os.environ | {"JANUS_HOME": str(home), "COLUMNS": "200"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)


def test_a_loop_around_status_and_list_asks_slurm_once(site: Site, tmp_path: Path) -> None:
    for job_id in "123":
        make_run(tmp_path / "home", job_id)
    site.set(j1="PENDING", j2="PENDING", j3="RUNNING")
    first = json.loads(type_in(tmp_path / "home", "status", "--json").stdout)
    assert {v["job_id"]: (v["state"], v["age_s"]) for v in first}["1"] == ("PENDING", 0.0)
    assert type_in(tmp_path / "home", "list").returncode == 0
    again = type_in(tmp_path / "home", "status", "1").stdout
    assert site.questions == 1
    assert "1: PENDING (says squeue, " in again
    assert "(says squeue, 0 s ago)" not in again or time.time() - slurm_answers_json().stat().st_mtime < 1


@pytest.mark.slow
def test_a_watch_and_a_loop_beside_it_ask_slurm_once_in_15_seconds(site: Site, tmp_path: Path) -> None:
    for job_id in "123":
        make_run(tmp_path / "home", job_id)
    site.set(j1="PENDING", j2="PENDING", j3="PENDING")
    env = os.environ | {"JANUS_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "janus_cluster.cli", "status", "--watch"]
    shown = tmp_path / "shown"
    begun = time.monotonic()
    with shown.open("w") as out, subprocess.Popen(command, env=env, stdout=out) as watch:
        try:
            while (screens := shown.read_text().count("2: PENDING (says squeue, ")) < 2:
                assert time.monotonic() - begun < 120, shown.read_text()
                # Of a job that nobody has looked at yet nothing is kept: the watch comes first.
                if screens > 0:
                    type_in(tmp_path / "home", "status", "2")
                time.sleep(0.5)
        finally:
            watch.send_signal(signal.SIGINT)
            watch.wait(timeout=600)
    assert 2 <= site.questions <= 1 + (time.monotonic() - begun) // 15


def test_an_answer_is_shown_with_its_age_and_asked_anew_when_it_is_old(site: Site, tmp_path: Path) -> None:
    run = make_run(tmp_path / "home", "1")
    site.set(j1="PENDING")
    now = time.time()
    assert look([run], now=now)[0].age_s == 0.0
    site.set(j1="TIMEOUT")
    assert (look([run], now=now + 7)[0].state, look([run], now=now + 7)[0].age_s) == ("PENDING", 7.0)
    assert (look([run], now=now + 15)[0].state, site.questions) == ("TIMEOUT", 2)


def test_who_acts_asks_anew(site: Site, tmp_path: Path) -> None:
    run = make_run(tmp_path / "home", "1")
    site.set(j1="PENDING")
    look([run])
    site.set(j1="RUNNING")
    assert load_job_states([run])[0].state == "RUNNING"
    assert look([run])[0].state == "PENDING"


def test_a_job_that_the_answer_does_not_hold_is_asked_for(site: Site, tmp_path: Path) -> None:
    site.set(j1="PENDING", j2="RUNNING")
    first = make_run(tmp_path / "home", "1")
    look([first])
    second = make_run(tmp_path / "home", "2")
    assert [s.state for s in look([first, second])] == ["PENDING", "RUNNING"]
    assert site.questions == 2
    assert look([first])[0].age_s is not None
    assert site.questions == 2


def test_who_asks_asks_for_what_others_look_at_too(site: Site, tmp_path: Path) -> None:
    site.set(j1="PENDING", j2="PENDING", j3="PENDING")
    runs = {job_id: make_run(tmp_path / "home", job_id, submitted_at=0.0) for job_id in "123"}
    begun = time.time()
    look(list(runs.values()), now=begun)
    for round_ in range(1, 6):
        now = begun + 16 * round_
        look([runs["2"]], now=now)
        assert len(look(list(runs.values()), now=now + 5)) == 3
        assert site.questions == 1 + round_


def test_what_nobody_looks_at_any_more_is_not_asked_for(site: Site, tmp_path: Path) -> None:
    site.set(j1="PENDING", j2="PENDING")
    first, second = (make_run(tmp_path / "home", job_id, submitted_at=0.0) for job_id in "12")
    begun = time.time()
    look([first, second], now=begun)
    for round_ in range(1, 6):
        look([second], now=begun + 16 * round_)
    (name,) = json.loads(slurm_answers_json().read_text())["answers"]
    assert name.endswith("\n2")


def test_a_job_sent_after_the_answer_is_asked_for_whatever_its_number(site: Site, tmp_path: Path) -> None:
    site.set(j1="PENDING")
    run = make_run(tmp_path / "home", "1")
    look([run])
    site.set(j1="RUNNING")
    make_run(tmp_path / "home", "1", submitted_at=time.time())
    assert look([run])[0].state == "RUNNING"


def test_after_cancel_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    run = make_run(tmp_path / "home", "1")
    site.set(j1="PENDING")
    look([run])
    cancel_run(run)
    site.set(j1="CANCELLED")
    assert look([run])[0].state == "CANCELLED"


@pytest.mark.slow
def test_of_many_who_look_at_the_same_moment_one_asks(site: Site, tmp_path: Path) -> None:
    make_run(tmp_path / "home", "1")
    site.set(j1="PENDING", delay="0.5")
    env = os.environ | {"JANUS_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "janus_cluster.cli", "list", "--json"]
    asking = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [json.loads(process.communicate(timeout=600)[0])[0] for process in asking]
    assert [value["state"] for value in said] == ["PENDING"] * 4
    assert site.questions == 1


def test_what_the_job_itself_says_meanwhile_is_believed_at_once(site: Site, tmp_path: Path) -> None:
    run = make_run(tmp_path / "home", "1")
    site.set(j1="PENDING")
    look([run])
    say(run, "RUNNING")
    site.set(j1="RUNNING")
    now = time.time() + 1
    assert (look([run], now=now)[0].state, site.questions) == ("RUNNING", 2)
    say(run, "RUNNING", updated_at=now)
    state = look([run], now=now + 4)[0]
    assert (state.source, state.slurm_age_s, site.questions) == ("status.json", 4.0, 2)
    say(run, "FAILED", exit_code=12)
    site.set(j1="FAILED")
    assert (look([run], now=now + 5)[0].state, site.questions) == ("FAILED", 3)


def test_the_file_is_private_and_a_damaged_one_is_passed_over(site: Site, tmp_path: Path) -> None:
    run = make_run(tmp_path / "home", "1")
    site.set(j1="PENDING")
    look([run])
    path = slurm_answers_json()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = json.loads(path.read_text())
    (name,) = whole["answers"]
    damaged = ["", "{", "[]", '{"answers": 3}', *(
        json.dumps({"answers": {name: whole["answers"][name] | change}})
        for change in (
            {"job": 7}, {"asked_at": "x"}, {"wanted_at": None}, {"job": {"state": "RUNNING"}},
            {"asked_at": 9e99}, {"asked_at": 0}
        )
    )]  # fmt: skip
    for number, text in enumerate(damaged, 2):
        path.write_text(text)
        assert (look([run])[0].state, site.questions) == ("PENDING", number), text


def test_a_folder_that_cannot_be_written_and_a_slurm_that_is_gone_do_no_harm(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "home", "1")
    site.set(j1="PENDING")
    monkeypatch.setenv("JANUS_HOME", "/proc/nowhere")
    assert look([run])[0].state == "PENDING"
    monkeypatch.setenv("JANUS_HOME", str(tmp_path / "home"))
    (site.folder / "bin" / "squeue").unlink()
    assert look([run])[0].state == "UNKNOWN"
    assert not slurm_answers_json().exists()
