"""Logs of the predecessor: bars and losses of transformers' Trainer, and the lines between them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.report.history import History
from janus_cluster.report.old_log import load_old_log
from janus_cluster.report.summary import summarize


def bar(step: int, elapsed_s: int, *, total: int = 1000, rate: str = "54.70s/it") -> str:
    hours, rest = divmod(elapsed_s, 3600)
    elapsed = f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
    return f"\r{100 * step // total:3d}%|█▏        | {step}/{total} [{elapsed}<13:24:10, {rate}]"


def loss(value: float | str, epoch: float) -> str:
    return f"\n{{'loss': {value}, 'grad_norm': 2.1, 'learning_rate': 9.9e-06, 'epoch': {epoch}}}\n"


START = "\r  0%|          | 0/1000 [00:00<?, ?it/s]"


def read(tmp_path: Path, text: str | bytes) -> History:
    path = tmp_path / "train.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_old_log(path)


def rows(history: History) -> list[tuple[float, float, float]]:
    columns = (history.steps.column(name) for name in ("step", "loss", "step_time_s"))
    return list(zip(*columns, strict=True))


def test_a_loss_belongs_to_the_bar_before_it_and_seconds_are_of_the_clock(tmp_path: Path) -> None:
    text = START + bar(1, 60) + loss(6.5, 0.001) + bar(1, 60) + bar(2, 110) + loss(6.25, 0.002) + bar(2, 110)
    assert rows(read(tmp_path, text)) == [(1, 6.5, 60), (2, 6.25, 50)]


def test_steps_faster_than_the_clock_take_the_rate_of_the_bar(tmp_path: Path) -> None:
    text = START + bar(1, 1, rate="2.00it/s") + bar(2, 1, rate="0.25s/it") + loss(1.0, 0.1)
    assert [t for _, _, t in rows(read(tmp_path, text))] == [0.5, 0.25]


def test_the_first_step_after_a_resume_has_no_time_and_begins_an_attempt(tmp_path: Path) -> None:
    text = START + "".join(bar(s, 50 * s) + loss(5.0, s / 1000) for s in range(1, 6))
    text += START + bar(4, 90) + loss(4.5, 0.004) + bar(5, 140) + loss(4.0, 0.005)
    history = read(tmp_path, text)
    assert list(history.steps.column("attempt")) == [1, 1, 1, 1, 1, 2, 2]
    assert math.isnan(rows(history)[5][2])
    assert rows(history)[6] == (5, 4.0, 50)
    assert (summarize(history).attempts, summarize(history).total_steps) == (2, 1000)


def test_other_bars_ranks_colours_and_broken_bytes_change_nothing(tmp_path: Path) -> None:
    clean = START + bar(1, 60) + loss(6.5, 0.001) + bar(2, 110) + loss(6.25, 0.002)
    noise = (
        "\rLoading checkpoint shards: 100%|██████████| 5/5 [00:07<00:00,  1.50s/it]\n"
        "\rMap (num_proc=8):  50%|█████     | 3/6 [00:10<00:10,  3.00s/it]\n"
    )
    dirty = noise + START + bar(1, 60) + " \x1b[31m[rank3]: UserWarning\x1b[0m" + loss(6.5, 0.001) + loss(6.5, 0.001)
    dirty += "[rank1]: " + bar(1, 60).strip() + bar(2, 110) + loss(6.5, 0.001) + loss(6.25, 0.002)
    dirty += "\r 40%|████      | 20/50 [00:20<00:30,  1.00s/it]\n{'eval_loss': 3.0, 'epoch': 0.002}\n"
    dirty += "{'train_runtime': 10.0, 'train_loss': 1.0, 'epoch': 1.0}\n"
    data = b"\xff\xfe \xe2\x96\n" + dirty.encode() + b"\n\xe2"
    assert rows(read(tmp_path, data)) == rows(read(tmp_path, clean))


@pytest.mark.parametrize(
    ("written", "value"), [("'1.25'", 1.25), ("1e-05", 1e-5), ("nan", math.nan), ("inf", math.inf)]
)
def test_losses_are_read_as_every_version_writes_them(tmp_path: Path, written: str, value: float) -> None:
    ((_, read_loss, _),) = rows(read(tmp_path, START + bar(1, 60) + loss(written, 0.1)))
    assert read_loss == value or (math.isnan(read_loss) and math.isnan(value))


def test_losses_without_bars_are_counted_and_that_is_noted(tmp_path: Path) -> None:
    history = read(tmp_path, loss(3.0, 0.1) + loss(2.0, 0.2))
    assert list(history.steps.column("step")) == [1, 2]
    assert any("counted" in note for note in history.notes)


@pytest.mark.parametrize("text", ["", "hello\n", "%|%|%|'loss'\n"])
def test_a_log_without_training_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="no bars"):
        read(tmp_path, text)


def test_a_line_without_end_is_passed_over(tmp_path: Path) -> None:
    text = START + bar(1, 60) + loss(6.5, 0.001) + "x" * 3_000_000 + "\n" + bar(2, 110) + loss(6.25, 0.002)
    assert rows(read(tmp_path, text)) == [(1, 6.5, 60), (2, 6.25, 50)]


@pytest.mark.slow
def test_a_log_of_a_gigabyte_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    block = "".join(f"[rank{i % 8}]: a line of a log without information, {i}\n" for i in range(22_000)).encode()
    with path.open("wb") as f:
        for step in range(1, 1001):
            f.write((bar(step, 50 * step) + loss(5.0, step / 1000)).encode() + block)
    assert path.stat().st_size > 1_000_000_000
    code = (
        "import re, sys; from pathlib import Path; from janus_cluster.report.old_log import load_old_log\n"
        "num_steps = len(load_old_log(Path(sys.argv[1])).steps)\n"
        # Not ru_maxrss: that of a forked process begins with its parent's.
        "print(num_steps, re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    # pytest keeps the folders of its last sessions.
    path.unlink()
    num_steps, peak_kb = map(int, done.stdout.split())
    assert num_steps == 1000
    assert peak_kb < 150_000
