"""Load a job file, --set and the submitter's environment into one checked JobConfig; every value keeps its origin."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from janus_cluster.errors import UsageError
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.profiles import is_path
from janus_cluster.job.resources import jobs_dir
from janus_cluster.job.schema import JobConfig, Section
from janus_cluster.job.secrets import is_secret
from janus_cluster.job.yamlfile import Key, Leaf, Plain, load_text, parse_leaves, parse_value, resolve_values

# ${NAME} and ${NAME:-default}; $${ is a literal ${.
_REFERENCE = re.compile(r"\$(\$\{)|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
# Profiles that may be given as a path, which is relative to the file that gives it.
_PROFILE_KEYS: tuple[Key, ...] = (("environment", "profile"), ("preflight", "profile"), ("hardware", "gpu_type"))
# A site's file has defaults; these make a job.
_NOT_OF_SITES = ("name", "kind")
SITE_FILE = "site.yaml"
# Below this key the dots belong to DeepSpeed's own names.
_DOTTED_BELOW: Key = ("deepspeed", "overrides")
_SECTIONS: frozenset[Key] = frozenset((n,) for n, f in JobConfig.model_fields.items() if isinstance(f.default, Section))


@dataclass(frozen=True)
class LoadedJob:
    """A checked job; `origins` maps each dotted key to its value's origin; `source` is the file's name in messages."""

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
    folders: dict[Key, Path] = field(default_factory=dict)
    # What the job replaces of the site's file; it counts again where the job's variable is not set.
    of_site: dict[Key, tuple[Leaf, str, Path]] = field(default_factory=dict)

    def put(self, key: Key, leaf: Leaf, origin: str, folder: Path) -> None:
        """`folder`: what a relative path of a profile is relative to."""
        for old in [k for k in self.leaves if k[: len(key)] == key or key[: len(k)] == k]:
            del self.leaves[old], self.origins[old], self.folders[old]
        self.leaves[key] = leaf
        self.origins[key] = origin
        self.folders[key] = folder

    def put_file(self, path: Path, label: str) -> None:
        for key, leaf in parse_leaves(load_text(path, label=label), label=label).items():
            # `training:` with nothing below it leaves what is there.
            if not (key in _SECTIONS and _is_null(leaf.value)):
                self.put(_join_dotted(key), leaf, f"{label}:{leaf.line}", path.resolve().parent)


def find_job_file(job: str | None, *, nodes: int | None) -> Path:
    """The file that `submit JOB` means: a path or a shipped job's name; without JOB the one for one node, or several.

    Raises: UsageError listing the shipped jobs.
    """
    if job is None:
        job = "train_1node" if nodes == 1 else "train_2node"
    path = Path(job)
    if path.is_file():
        return path
    shipped = sorted(p.stem for p in jobs_dir().glob("*.yaml"))
    if job.removesuffix(".yaml") in shipped and path.parent == Path():
        return jobs_dir() / f"{job.removesuffix('.yaml')}.yaml"
    what = "is a folder, not a job file" if path.is_dir() else "no such job file"
    raise UsageError(
        f"{job}: {what}{did_you_mean(path.stem, shipped)}",
        hint=f"give a path, or one of the shipped jobs: {', '.join(shipped)}",
    )


def load_job(
    path: Path,
    *,
    sets: Sequence[str] = (),
    environ: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    site: Path | None = None,
) -> LoadedJob:
    """The job of `path` over the site's defaults, with --set values and command-line options over it, checked whole.

    `options` maps a dotted key to a command-line option's value, e.g. {"nodes": 2}; None values are left out.
    `site`: the folder that may hold a site.yaml.
    Raises: UsageError listing every problem with file, key, value and what is allowed.
    """
    label, here = _label(path), Path.cwd()
    draft = _Draft(label)
    if site is not None and (site / SITE_FILE).is_file():
        _put_site(draft, site / SITE_FILE)
    draft.put_file(path, label)
    for text in sets:
        key, leaf = _parse_set(text)
        draft.put(key, leaf, "--set", here)
    for dotted, value in (options or {}).items():
        if value is not None:
            origin = f"--{dotted.rsplit('.', 1)[-1].replace('_', '-')}"
            draft.put(tuple(dotted.split(".")), Leaf(value, None), origin, here)
    _substitute(draft, environ)
    _anchor_profiles(draft)
    config = _validate(draft)
    return LoadedJob(config, _all_origins(config, draft), label, path)


def _put_site(draft: _Draft, path: Path) -> None:
    """The site's defaults, before anything of the job. Raises: UsageError for a key that only a job can have."""
    label = _label(path)
    draft.put_file(path, label)
    wrong = [
        f"{draft.origins[(key,)]}: {key}: belongs in a job file" for key in _NOT_OF_SITES if (key,) in draft.leaves
    ]
    if wrong:
        raise UsageError.of_many(wrong, hint=f"take it out of {label}: what is there applies to every job")
    draft.of_site = {key: (leaf, draft.origins[key], draft.folders[key]) for key, leaf in draft.leaves.items()}


def _anchor_profiles(draft: _Draft) -> None:
    """A profile that is given as a path is absolute from here on."""
    for key in _PROFILE_KEYS:
        leaf = draft.leaves.get(key)
        if leaf is not None and isinstance(leaf.value, str) and is_path(leaf.value):
            path = draft.folders[key] / Path(os.path.expanduser(leaf.value))
            draft.leaves[key] = Leaf(os.path.normpath(path), leaf.line)


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
    try:
        return key, Leaf(parse_value(value), None)
    except yaml.YAMLError as e:
        raise UsageError(
            f"--set {dotted}: {value!r} is not readable as a YAML value: {getattr(e, 'problem', e)}",
            hint='within [ ] and { } quote what holds ${…}: ["${NAME}"]' if "${" in value else None,
        ) from e


def _substitute(draft: _Draft, environ: Mapping[str, str]) -> None:
    """Put ${VAR} and ${VAR:-default} in; an unquoted scalar stays one."""
    problems: list[str] = []
    _return_to_site(draft, environ)
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
            f"{where}: {dotted}: ${{{name}}} is a secret and would be written to files that others can read. "
            f"Name it under environment.forward instead"
            for name in used
            if is_secret(name)
        ]
        draft.leaves[key] = Leaf(value, leaf.line)
        if used:
            draft.origins[key] = f"{' '.join(f'${name}' for name in used)} ({where})"
    if problems:
        raise UsageError.of_many(problems)


def _return_to_site(draft: _Draft, environ: Mapping[str, str]) -> None:
    """`${OUTPUT_DIR:-}` of a job gives nothing where the variable is not set: then the site's value counts."""
    for key, (leaf, origin, folder) in draft.of_site.items():
        own = draft.leaves.get(key)
        if own is None or own is leaf or not isinstance(own.value, str) or own.value == "":
            continue
        if _substituted(own.value, environ, [], []) == "":
            draft.put(key, leaf, origin, folder)


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

    return type(value)(_REFERENCE.sub(replace, value))


def _validate(draft: _Draft) -> JobConfig:
    tree: dict[str, Any] = {}
    for key, leaf in draft.leaves.items():
        at = tree
        for part in key[:-1]:
            at = at.setdefault(part, {})
        at[key[-1]] = typed(leaf.value, _annotation_of(key))
    try:
        # Through JSON, because there strict mode takes lists for tuples and mappings for sections, and nothing else.
        return JobConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as e:
        problems = [_explain(dict(error), draft) for error in e.errors(include_url=False)]
        raise UsageError.of_many(problems, hint="every key with its type: janus-cluster config schema") from None


def _is_null(value: Any) -> bool:
    return resolve_values(value) is None


def _annotation_of(key: Key) -> Any:
    """The type that the schema gives a key; Any where it has none for it, and for a section."""
    annotation: Any = JobConfig
    for part in key:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            info = annotation.model_fields.get(part)
            annotation = info.annotation if info else Any
        else:
            annotation = _inner(annotation, dict)
    return Any if isinstance(annotation, type) and issubclass(annotation, Section) else annotation


def _inner(annotation: Any, kind: type) -> Any:
    """The type of what the list or the dict (`kind`) among an annotation's types holds; Any where there is none."""
    containers = [a for a in _alternatives(annotation) if get_origin(a) is kind]
    return get_args(containers[0])[-1] if containers else Any


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union, or the one type."""
    wanted = _without_extras(annotation)
    is_union = get_origin(wanted) in (Union, UnionType)
    return [_without_extras(a) for a in get_args(wanted)] if is_union else [wanted]


def _without_extras(annotation: Any) -> Any:
    """`list[Root]` of `Annotated[list[Root], …]`; a union of one type and None is that type."""
    if get_origin(annotation) is Annotated:
        return _without_extras(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        types = [a for a in get_args(annotation) if a is not type(None)]
        return _without_extras(types[0]) if len(types) == 1 else annotation
    return annotation


def typed(value: Any, annotation: Any) -> Any:
    """`value` with every unquoted scalar as `annotation` wants it: as written for text, else by YAML's rules."""
    wanted = _without_extras(annotation)
    if isinstance(value, list):
        return [typed(item, _inner(wanted, list)) for item in value]
    if isinstance(value, dict):
        of = wanted.model_fields if isinstance(wanted, type) and issubclass(wanted, Section) else {}
        return {k: typed(item, of[k].annotation if k in of else _inner(wanted, dict)) for k, item in value.items()}
    if not isinstance(value, Plain):
        return value
    resolved = resolve_values(value)
    allowed = _alternatives(wanted)
    if resolved is None or type(resolved) in allowed:
        return resolved
    return str(value) if any(_is_text(a) for a in allowed) else resolved


def _is_text(wanted: Any) -> bool:
    """Whether an unquoted scalar is text here: the key is text, or a list or section that one text abbreviates."""
    if get_origin(wanted) is list:
        return _is_text(_without_extras(_inner(wanted, list)))
    return wanted is str or (isinstance(wanted, type) and issubclass(wanted, Section))


def _explain(error: dict[str, Any], draft: _Draft) -> str:
    """One line: where, key, value, what is wrong, what is allowed."""
    loc = tuple(str(part) for part in error["loc"])
    dotted = ".".join(loc)
    where = _where(loc, draft)
    if error["type"] == "extra_forbidden":
        return f"{where}: {dotted}: unknown key{_guess(loc)}"
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


def _guess(loc: Key) -> str:
    every = known_keys()
    section = ".".join(loc[:-1])
    siblings = sorted({k.rsplit(".", 1)[-1] for k in every if k.rpartition(".")[0] == section})
    elsewhere = [k for k in every if k.rsplit(".", 1)[-1] == loc[-1]]
    guess = did_you_mean(loc[-1], siblings, prefix=f"{section}." if section else "")
    if not guess and elsewhere:
        guess = f"; did you mean {elsewhere[0]}?"
    return f"{guess or '.'} Allowed {'in ' + section if section else 'here'}: {', '.join(siblings)}"


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
    """`job` with other values under dotted keys; unset keys stay unset."""
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
