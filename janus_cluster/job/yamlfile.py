"""Parse YAML as job files need it: `1e-5` is a number, `12:00:00` and `007` are text, `on` and `no` are text.

PyYAML reads YAML 1.1, where these differ; the scalars are resolved here by YAML 1.2's core schema. Text is composed to
leaves, not to dicts, so that every value keeps its line for error messages. Unquoted scalars stay as written (`Plain`)
until the schema determines whether their key takes text: an account 2026_11 is no number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from janus_cluster.errors import UsageError

Key = tuple[str, ...]

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
# A leading zero is text: an account named 007 must not become 7.
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_MERGE = "tag:yaml.org,2002:merge"
_LEADING_ZERO = re.compile(r"^[-+]?0[0-9]")


class Plain(str):
    """An unquoted scalar as it was written; `resolve_scalar` gives its value where no text is wanted."""

    __slots__ = ()


@dataclass(frozen=True)
class Leaf:
    """One value of a document: `value` is Plain | str | int | bool | None | list | dict; `line` counts from 1."""

    value: Any
    line: int | None


def resolve_values(value: Any) -> Any:
    """`value` with every unquoted scalar in it resolved."""
    if isinstance(value, Plain):
        return resolve_scalar(value)
    if isinstance(value, list):
        return [resolve_values(item) for item in value]
    if isinstance(value, dict):
        return {key: resolve_values(item) for key, item in value.items()}
    return value


def resolve_scalar(text: str) -> Any:
    """The value of an unquoted scalar by YAML 1.2's core schema."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text) and not _LEADING_ZERO.match(text):
        return float(text)
    return text


def load_text(path: Path, *, label: str) -> str:
    """The file's text. Raises: UsageError when it is missing, a folder, binary or not UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"{label}: no such file", hint="ls jobs/, or name a shipped job: train_1node, train_2node, demo"
        ) from None
    except OSError as e:
        raise UsageError(f"{label}: cannot be read: {e.strerror}") from e
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{label}: not UTF-8 text (byte {e.start} is 0x{data[e.start]:02x}); is it really a job file?"
        ) from e
    if "\0" in text:
        raise UsageError(f"{label}: holds NUL bytes, so it is a binary file, not a job file")
    return text


def parse_leaves(text: str, *, label: str) -> dict[Key, Leaf]:
    """Every value of a YAML mapping by its path, in the order of the text; lists stay whole.

    Raises: UsageError naming file and line for bad syntax, tabs, duplicate keys and documents that are no mapping.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        raise _syntax_error(e, text, label) from e
    except yaml.YAMLError as e:
        raise UsageError(f"{label}: not readable as YAML: {e}") from e
    if node is None:
        raise UsageError(f"{label}: the file is empty", hint="start from a shipped job: janus-cluster config show demo")
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(
            f"{label}:{_line(node)}: a job file is a mapping (key: value), not a {node.tag.rsplit(':', 1)[-1]}"
        )
    return dict(_walk(node, (), label))


def parse_value(text: str) -> Any:
    """The value of one `--set` right-hand side: a scalar, a [list] or a {mapping}, unquoted scalars as `Plain`.

    Raises: yaml.YAMLError.
    """
    if not text.lstrip().startswith(("[", "{", '"', "'")):
        return Plain(text)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if node is None else _construct(node, "--set")


def _walk(node: yaml.MappingNode, prefix: Key, label: str) -> Iterator[tuple[Key, Leaf]]:
    for key, value in _items(node, prefix, label):
        path = (*prefix, key)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _walk(value, path, label)
        else:
            yield path, Leaf(_construct(value, label), _line(value))


def _items(node: yaml.MappingNode, prefix: Key, label: str) -> Iterator[tuple[str, yaml.Node]]:
    """(key, value) of a mapping, then of what it merges (`<<: *anchor`) that it does not give itself."""
    seen: dict[str, int] = {}
    merged: list[yaml.Node] = []
    for key_node, value in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{label}:{_line(key_node)}: a key must be a plain string")
        if key_node.tag == _MERGE:
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        key = key_node.value
        if key in seen:
            dotted = ".".join((*prefix, key))
            raise UsageError(
                f"{label}:{_line(key_node)}: {dotted}: duplicate key; first at line {seen[key]} already",
                hint="keep one of the two",
            )
        seen[key] = _line(key_node)
        yield key, value
    for other in merged:
        if not isinstance(other, yaml.MappingNode):
            dotted = ".".join((*prefix, "<<"))
            raise UsageError(f"{label}:{_line(other)}: {dotted}: a merge key takes a mapping, e.g. <<: *anchor")
        for key, value in _items(other, prefix, label):
            if key not in seen:
                seen[key] = _line(value)
                yield key, value


def _construct(node: yaml.Node, label: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, label) for child in node.value]
    if not isinstance(node, yaml.MappingNode):
        raise TypeError(f"{label}: a YAML node of an unknown kind: {type(node).__name__}")
    return {key: _construct(value, label) for key, value in _items(node, (), label)}


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_error(error: yaml.MarkedYAMLError, text: str, label: str) -> UsageError:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return UsageError(f"{label}: not readable as YAML: {error.problem}")
    lines = text.splitlines()
    shown = lines[mark.line] if mark.line < len(lines) else ""
    where = f"{label}:{mark.line + 1}"
    if "\t" in shown[: mark.column + 1] or "'\\t'" in str(error.problem):
        return UsageError(
            f"{where}: a tab where YAML wants spaces: {shown.strip()!r}", hint="replace the tabs by spaces"
        )
    return UsageError(f"{where}: not readable as YAML: {error.problem}\n    {shown}\n    {' ' * mark.column}^")
