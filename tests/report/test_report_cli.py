"""report and compare as users meet them; the pictures themselves are drawn in the slow tests."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import append_metric_line, read_metric_lines

from janus_cluster.report.history import load_history
from janus_cluster.report.pictures import _draw_ranks, draw_pictures
from janus_cluster.run.paths import RunDir

PNG = b"\x89PNG\r\n\x1a\n"


def call(run: RunDir, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JANUS_HOME": str(run.path.parent.parent)} | environ
    command = [sys.executable, "-m", "janus_cluster.cli", *argv]
    return subprocess.run(command, env=env, cwd=run.path.parent, capture_output=True, text=True, check=False)


def blocker(tmp_path: Path, package: str) -> str:
    """A folder for PYTHONPATH in which importing the package fails, as where it is not installed."""
    folder = tmp_path / "blocked" / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"raise ImportError('No module named {package}')\n")
    return str(folder.parent)


def test_compare_prints_figures_and_differences(make_run) -> None:
    run = make_run("a-1-1")
    make_run("b-1-1", seed=7)
    done = call(run, "compare", "a-1-1", "b-1-1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["training.seed", "0", "7"] in lines
    assert ["s/step,", "median", "2.500", "2.500"] in lines
    value = json.loads(call(run, "compare", "a-1-1", "b-1-1", "--json").stdout)
    assert value["differences"] == [{"key": "training.seed", "a": "0", "b": "7"}]


def test_without_matplotlib_the_line_to_type_is_reported_and_nothing_is_written(make_run, tmp_path: Path) -> None:
    run = make_run()
    done = call(run, "report", run.name, PYTHONPATH=blocker(tmp_path, "matplotlib"))
    assert done.returncode == 1
    assert "pip install 'janus-cluster[report]'" in done.stderr
    assert not run.report.exists()


@pytest.mark.parametrize("argv", [[], ["demo", "demo", "demo"]])
def test_one_or_two_things_can_be_reported(make_run, argv: list[str]) -> None:
    done = call(make_run(), "report", *argv)
    assert done.returncode == 2
    assert "one or two" in done.stderr


@pytest.mark.slow
def test_a_run_becomes_a_private_page_with_its_pictures_inside(make_run) -> None:
    run = make_run()
    done = call(run, "report", run.name, "--no-tensorboard", "--json")
    assert done.returncode == 0, done.stderr
    pictures = sorted(str(p) for p in run.report.glob("*.png"))
    assert json.loads(done.stdout) == {
        "page": str(run.report / "index.html"),
        "pictures": pictures,
        "tensorboard": None,
    }
    names = {p.name for p in run.report.iterdir()}
    assert names == {"index.html", "loss.png", "accuracy.png", "speed.png", "ranks.png", "timeline.png"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in run.report.iterdir()} == {0o600}
    for path in run.report.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(PNG)
        width, height = struct.unpack(">II", data[16:24])
        assert width > 900
        assert height > 300
    assert (run.report / "index.html").read_text().count("data:image/png;base64,") == 5


@pytest.mark.slow
def test_what_a_run_does_not_tell_has_no_picture(make_run) -> None:
    run = make_run()
    call(run, "report", run.name)
    kept = [r for r in read_metric_lines(run) if r["kind"] == "train"]
    run.metrics_jsonl.unlink()
    for record in kept:
        append_metric_line(run, record | {"ranks": {}})
    assert call(run, "report", run.name).returncode == 0
    assert {p.stem for p in run.report.glob("*.png")} == {"loss", "speed", "timeline"}


@pytest.mark.slow
def test_a_run_that_never_trained_has_its_attempts_alone_in_its_timeline(make_run) -> None:
    run = make_run()
    trained = {p.name: p.png for p in draw_pictures(load_history(run))}
    run.metrics_jsonl.unlink()
    (picture,) = draw_pictures(load_history(run))
    heights = [struct.unpack(">I", png[20:24])[0] for png in (trained["timeline"], picture.png)]
    assert picture.name == "timeline"
    assert heights[1] < 0.6 * heights[0], "no empty panel of steps above them"


@pytest.mark.slow
def test_of_sixteen_ranks_the_outlier_is_named(make_run) -> None:
    run = make_run()
    run.metrics_jsonl.unlink()
    waits = [0.02] * 7 + [0.5] + [0.02] * 8
    for step in (1, 2, 3):
        append_metric_line(
            run, {"kind": "train", "step": step, "attempt": 1, "time": 1000.0 + step, "ranks": {"data_wait_s": waits}}
        )
    figure = _draw_ranks(load_history(run))
    assert figure is not None
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["rank 0", "rank 7", "rank 15"]


@pytest.mark.slow
def test_a_name_that_no_font_here_can_draw_is_no_complaint(make_run) -> None:
    run, other = make_run(), make_run("导航-20261121-bbbb")
    done = call(run, "report", run.name, other.name, "--no-tensorboard")
    assert (done.returncode, done.stderr) == (0, "")
    assert "导航-20261121-bbbb" in (run.report / "with_导航-20261121-bbbb" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_and_an_old_log_stand_in_one_picture(make_run, tmp_path: Path) -> None:
    run = make_run()
    log = tmp_path / "train.log"
    log.write_text("".join(f"\r{s}%|█ | {s}/100 [00:{50 + s}<10:00, 54.70s/it]\n{{'loss': 2.0}}\n" for s in (1, 2, 3)))
    done = call(run, "report", run.name, "--from-log", str(log), "--out", str(tmp_path / "both"))
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "both").iterdir()}
    assert {"index.html", "comparison.png", "1.loss.png", "2.loss.png", "2.speed.png"} <= names
    assert "2.ranks.png" not in names
    assert "train.log has no configuration" in (tmp_path / "both" / "index.html").read_text()


@pytest.mark.slow
def test_tensorboard_reads_back_what_was_logged(make_run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    run = make_run()
    for options in (["--tensorboard"], []):
        done = call(run, "report", run.name, *options)
        assert done.returncode == 0, done.stderr
        assert f"tensorboard --logdir {run.report / 'tensorboard'}\n" in done.stdout
    (path,) = (run.report / "tensorboard" / run.name).iterdir()
    events = [e for e in EventFileLoader(str(path)).Load() if e.summary.value]
    losses = {e.step: e.summary.value[0].tensor.float_val[0] for e in events if e.summary.value[0].tag == "loss/total"}
    assert losses == dict(zip(range(1, 7), load_history(run).steps.column("loss"), strict=True))


@pytest.mark.slow
def test_without_tensorboard_the_page_is_written_and_shows_how_to_get_it(make_run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run()
    done = call(run, "report", run.name, PYTHONPATH=blocker(tmp_path, "tensorboard"))
    assert done.returncode == 0, done.stderr
    assert (run.report / "index.html").exists()
    assert not (run.report / "tensorboard").exists()
    assert [line for line in done.stdout.splitlines() if "pip install 'janus-cluster[report]'" in line] == [
        "tensorboard: no event files were written; to get them: pip install 'janus-cluster[report]'"
    ]


def test_event_files_that_were_asked_for_and_cannot_be_written_are_an_error(make_run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run()
    done = call(run, "report", run.name, "--tensorboard", PYTHONPATH=blocker(tmp_path, "tensorboard"))
    assert done.returncode == 1
    assert "pip install 'janus-cluster[report]'" in done.stderr
    assert not run.report.exists()
