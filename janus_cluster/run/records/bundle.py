"""Files of a bundle that the desk and the nodes read back: resolved.json and manifest.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from janus_cluster.run.paths import BundleDir
from janus_cluster.run.records.base import Record
from janus_cluster.run.records.submission import Cluster

if TYPE_CHECKING:
    from janus_cluster.job.resolved import ResolvedJob


@dataclass(frozen=True, kw_only=True)
class ResolvedRecord(Record):
    """resolved.json as far as it can be shown without the schema, whichever version wrote it.

    `job` and `origins` as in ResolvedJob; `memory` is its MemoryPlan, None where training.memory is manual.
    """

    cluster: Cluster | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    preflight_profile: str | None = None
    preflight_thresholds: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] | None = None

    def value(self, key: str) -> Any:
        """The job's value under the dotted key; None where it has none."""
        found: Any = self.job
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def load_resolved(bundle: BundleDir) -> ResolvedJob:
    """The job of that bundle, checked by this version's schema. Raises: OSError, ValueError."""
    # The schema takes longer to import than everything else here, and the desk mostly does without.
    from janus_cluster.job.resolved import ResolvedJob

    return ResolvedJob.model_validate_json(bundle.resolved_json.read_bytes())


@dataclass(frozen=True, kw_only=True)
class GitRecord(Record):
    """The checkout that the code was taken from. `dirty_sha256`: of its uncommitted changes, None for none."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    commit: str | None = None
    dirty_sha256: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PythonRecord(Record):
    """The interpreter that submitted."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    version: str
    executable: str


@dataclass(frozen=True, kw_only=True)
class JobFileRecord(Record):
    """The job file that was submitted."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CodeRecord(Record):
    """The package that submitted: its folder, and the sha256 of the whole and of each file."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    path: str
    sha256: str
    files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PlannedMemoryRecord(Record):
    """The option of training.memory: auto that the bundle trains with. Units: GB of 1e9 bytes."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    option: str
    planned_gb: float


@dataclass(frozen=True, kw_only=True)
class ManifestRecord(Record):
    """manifest.json: what a run was made from.

    created_at: ISO 8601, UTC. packages: version, None where it is not installed. templates: sha256 of each file.
    git: None for an installed wheel. memory: None where training.memory is manual.
    """

    created_at: str
    janus_version: str
    git: GitRecord | None = None
    host: str
    user: str
    python: PythonRecord
    packages: Mapping[str, str | None]
    job_file: JobFileRecord
    templates: Mapping[str, str]
    code: CodeRecord
    memory: PlannedMemoryRecord | None = None
