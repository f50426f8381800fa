"""TensorBoard's event file of a run, from its metrics: nothing is written while training runs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from janus_cluster.errors import JanusError
from janus_cluster.report.history import SEGMENTS, History
from janus_cluster.report.table import Table

_STEP_TAGS = {
    "loss": "loss/total",
    "loss_text": "loss/text",
    "loss_action": "loss/action_head",
    **{f"segment.{name}": f"loss_segment/{name}" for name in SEGMENTS},
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "step_time_s": "speed/step_time_s",
    "samples_per_s": "speed/samples_per_s",
}
_EVALUATION_TAGS = {
    "action_accuracy": "eval/action_accuracy",
    "majority_accuracy": "eval/majority_accuracy",
    "macro_f1": "eval/macro_f1",
}
_PATTERN = "events.out.tfevents.*"


def require_tensorboard() -> None:
    """The package tensorboard can be imported; tensorflow is not needed. Raises: JanusError with what to install."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as e:
        raise JanusError(
            f"event files need the package tensorboard: {e}", hint="pip install 'janus-cluster[report]'"
        ) from e


def write_events(history: History, folder: Path) -> Path:
    """Write one event file with every value of the history into `folder`, in place of an older one.

    Raises: JanusError if the package is missing.
    """
    require_tensorboard()
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A reader of the folder never sees half a file.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as tmp:
        writer = EventFileWriter(tmp)
        for step, time_s, tag, value in _values(history):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=time_s, summary=summary))
        writer.close()
        (made,) = Path(tmp).glob(_PATTERN)
        older = list(folder.glob(_PATTERN))
        made.chmod(0o600)
        written = made.replace(folder / made.name)
    for path in older:
        if path != written:
            path.unlink(missing_ok=True)
    return written


def _values(history: History) -> Iterator[tuple[int, float, str, float]]:
    for table, tags in ((history.steps, _STEP_TAGS), (history.evaluations, _EVALUATION_TAGS)):
        ranks = {n: f"rank/{n.replace('.', '/')}" for n in table.names if n.rpartition(".")[2].isdigit()}
        yield from _values_of(table, {name: tag for name, tag in (tags | ranks).items() if table.has(name)})


def _values_of(table: Table, tags: dict[str, str]) -> Iterator[tuple[int, float, str, float]]:
    columns = {tag: table.column(name) for name, tag in tags.items()}
    for row, (step, time_s) in enumerate(zip(table.column("step"), table.column("time"), strict=True)):
        if not math.isfinite(step):
            continue
        for tag, column in columns.items():
            if math.isfinite(column[row]):
                yield int(step), time_s if math.isfinite(time_s) else 0.0, tag, column[row]
