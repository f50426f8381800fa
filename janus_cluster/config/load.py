"""A job file, --set and the submitter's environment become one checked JobConfig, and every value keeps its origin."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from janus_cluster.config.schema import JobConfig, Section
from janus_cluster.config.secrets import is_secret
from janus_cluster.config.yamlfile import Key, Leaf, load_text, parse_leaves, parse_value, resolve_scalar
from janus_cluster.errors import UsageError
from janus_cluster.resources import jobs_dir

# ${NAME} and ${NAME:-default}; $${ is a literal ${.
_REFERENCE = re.compile(r"\$(\$\{)|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
# Below this key the dots belong to DeepSpeed's own names.
_DOTTED_BELOW: Key = ("deepspeed", "overrides")


@dataclass(frozen=True)
class LoadedJob:
    """A checked job; `origins` maps each dotted key to where its value came from; `source` is how to name the file."""

    config: JobConfig
    origins: dict[str, str]
    source: str
    path: Path


@dataclass
class _Draft:
    """Leaves by key while they are being overlaid, with the origin of each."""

    label: str
    leaves: dict[Key, Leaf] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def put(self, key: Key, leaf: Leaf, origin: str) -> None:
        for old in [k for k in self.leaves if k[: len(key)] == key or key[: len(k)] == k]:
            del self.leaves[old], self.origins[old]
        self.leaves[key] = leaf
        self.origins[key] = origin


def find_job_file(job: str | None, *, nodes: int | None) -> Path:
    """The file that `submit JOB` means: a path, or the name of a shipped job; without JOB the one for `nodes`.

    Raises: UsageError listing the shipped jobs.
    """
    if job is None:
        job = f"train_{nodes or 2}node"
    path = Path(job)
    if path.is_file():
        return path
    shipped = sorted(p.stem for p in jobs_dir().glob("*.yaml"))
    if job.removesuffix(".yaml") in shipped and path.parent == Path():
        return jobs_dir() / f"{job.removesuffix('.yaml')}.yaml"
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    what = "is a folder, not a job file" if path.is_dir() else "no such job file"
    raise UsageError(f"{job}: {what}.{guess}", hint=f"give a path, or one of the shipped jobs: {', '.join(shipped)}")


def load_job(
    path: Path, *, sets: Sequence[str] = (), environ: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> LoadedJob:
    """The job of `path` with --set values and command-line options over it, checked whole.

    `options` maps a dotted key to a command-line option's value, e.g. {"nodes": 2}; None values are left out.
    Raises: UsageError listing every problem with file, key, value and what is allowed.
    """
    label = _label(path)
    draft = _Draft(label)
    for key, leaf in parse_leaves(load_text(path, label=label), label=label).items():
        draft.put(_join_dotted(key), leaf, f"{label}:{leaf.line}")
    for text in sets:
        key, leaf = _parse_set(text)
        draft.put(key, leaf, "--set")
    for dotted, value in (options or {}).items():
        if value is not None:
            draft.put(
                tuple(dotted.split(".")), Leaf(value, None, False), f"--{dotted.rsplit('.', 1)[-1].replace('_', '-')}"
            )
    _substitute(draft, environ)
    _drop_empty_sections(draft)
    config = _validate(draft)
    return LoadedJob(config, _all_origins(config, draft), label, path)


def _label(path: Path) -> str:
    """How messages name the file: relative where that is shorter, because people read it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _join_dotted(key: Key) -> Key:
    depth = len(_DOTTED_BELOW)
    if key[:depth] == _DOTTED_BELOW and len(key) > depth:
        return (*_DOTTED_BELOW, ".".join(key[depth:]))
    return key


def _parse_set(text: str) -> tuple[Key, Leaf]:
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise UsageError(f"--set {text!r}: not of the form key=value", hint="e.g. --set training.learning_rate=3e-5")
    key = _join_dotted(tuple(part.strip() for part in dotted.split(".")))
    if "${" in value:
        return key, Leaf(value, None, True)
    try:
        return key, Leaf(parse_value(value), None, False)
    except yaml.YAMLError as e:
        raise UsageError(
            f"--set {dotted}: {value!r} is not readable as a YAML value: {getattr(e, 'problem', e)}"
        ) from e


def _substitute(draft: _Draft, environ: Mapping[str, str]) -> None:
    """Put ${VAR} and ${VAR:-default} in, and type the unquoted scalars."""
    problems: list[str] = []
    for key, leaf in list(draft.leaves.items()):
        used: list[str] = []
        missing: list[str] = []
        value = _substituted(leaf.value, environ, used, missing)
        where, dotted = draft.origins[key], ".".join(key)
        problems += [
            f"{where}: {dotted}: ${{{name}}} is not set in your environment. "
            f"Type `export {name}=…` or `--set {dotted}=…`, or give a default: ${{{name}:-…}}"
            for name in missing
        ]
        problems += [
            f"{where}: {dotted}: ${{{name}}} is a secret and would stand in files that others can read. "
            f"Name it under environment.forward instead"
            for name in used
            if is_secret(name)
        ]
        if leaf.plain and isinstance(value, str):
            value = resolve_scalar(value)
        draft.leaves[key] = Leaf(value, leaf.line, False)
        if used:
            draft.origins[key] = f"{' '.join(f'${name}' for name in used)} ({where})"
    if problems:
        raise UsageError.of_many(problems)


def _substituted(value: Any, environ: Mapping[str, str], used: list[str], missing: list[str]) -> Any:
    if isinstance(value, list):
        return [_substituted(item, environ, used, missing) for item in value]
    if isinstance(value, dict):
        return {k: _substituted(item, environ, used, missing) for k, item in value.items()}
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        literal, name, default = match.groups()
        if literal:
            return "${"
        if environ.get(name):
            used.append(name)
            return environ[name]
        if default is None:
            missing.append(name)
            return ""
        return default

    return _REFERENCE.sub(replace, value)


def _drop_empty_sections(draft: _Draft) -> None:
    """`training:` with nothing below it means the section's defaults."""
    sections = {n for n, f in JobConfig.model_fields.items() if isinstance(f.default, Section)}
    for key in [k for k, leaf in draft.leaves.items() if len(k) == 1 and k[0] in sections and leaf.value is None]:
        del draft.leaves[key], draft.origins[key]


def _validate(draft: _Draft) -> JobConfig:
    tree: dict[str, Any] = {}
    for key, leaf in draft.leaves.items():
        at = tree
        for part in key[:-1]:
            at = at.setdefault(part, {})
        at[key[-1]] = leaf.value
    try:
        # Through JSON, because there strict mode takes lists for tuples and mappings for sections, and nothing else.
        return JobConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as e:
        problems = [_explain(dict(error), draft) for error in e.errors(include_url=False)]
        raise UsageError.of_many(problems, hint="every key with its type: janus-cluster config schema") from None


def _explain(error: dict[str, Any], draft: _Draft) -> str:
    """One line: where, key, value, what is wrong, what is allowed."""
    loc = tuple(str(part) for part in error["loc"])
    dotted = ".".join(loc)
    where = _where(loc, draft)
    if error["type"] == "extra_forbidden":
        return f"{where}: {dotted}: unknown key.{_did_you_mean(loc)}"
    if error["type"] == "missing":
        return f"{draft.label}: {dotted}: must be given"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = json.dumps(error["input"], ensure_ascii=False)
    shown = value if len(value) <= 80 else value[:77] + "…"
    return f"{where}: {dotted}: {shown}: {message}"


def _where(loc: Key, draft: _Draft) -> str:
    for end in range(len(loc), 0, -1):
        for key, origin in draft.origins.items():
            if key[:end] == loc[:end]:
                return origin
    return draft.label


def _did_you_mean(loc: Key) -> str:
    every = known_keys()
    section = ".".join(loc[:-1])
    siblings = sorted({k.rsplit(".", 1)[-1] for k in every if k.rpartition(".")[0] == section})
    near = [".".join((*loc[:-1], n)) for n in difflib.get_close_matches(loc[-1], siblings, n=1)]
    near += [k for k in every if k.rsplit(".", 1)[-1] == loc[-1]]
    guess = f" Did you mean {near[0]}?" if near else ""
    return f"{guess} Allowed {'in ' + section if section else 'here'}: {', '.join(siblings)}"


def known_keys(model: type[BaseModel] = JobConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections included."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
    return keys


def _all_origins(config: JobConfig, draft: _Draft) -> dict[str, str]:
    origins = {".".join(key): origin for key, origin in draft.origins.items()}
    for dotted, value in flatten(config.model_dump(mode="json")):
        if dotted not in origins:
            parents = (o for k, o in origins.items() if dotted.startswith(k + "."))
            origins[dotted] = next(parents, "default") if value != {} else origins.get(dotted, "default")
    return dict(sorted(origins.items()))


def with_values(job: JobConfig, values: Mapping[str, Any]) -> JobConfig:
    """`job` with other values under dotted keys; what nobody gave stays not given."""
    for key, value in values.items():
        job = _put_value(job, key.split("."), value)
    return job


def _put_value(section: Any, parts: Sequence[str], value: Any) -> Any:
    name, *below = parts
    inner = getattr(section, name)
    return section.model_copy(update={name: _put_value(inner, below, value) if isinstance(inner, Section) else value})


def value_of(job: JobConfig, key: str) -> Any:
    """The value under a dotted key."""
    value: Any = job
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty mapping is a leaf."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows
