"""docs/configuration.md from the schema: every key of a job file with its type, default, limits and meaning. Pure.

janus-cluster config schema --markdown > docs/configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

COMMAND = "janus-cluster config schema --markdown > docs/configuration.md"
_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}
_HEAD = f"""# Every key of a job file

Generated from `janus_cluster/job/schema.py`; do not edit it: `{COMMAND}`.
`janus-cluster config show` prints the values of one job, and the origin of each. A key is set in the job file, nested
as the headings show, or with `--set`, dotted: `--set training.seed=7`. A key that is not here is refused, but for those
below `slurm`, `environment.variables` and `deepspeed.overrides`.
"""


def render_reference(schema: Mapping[str, Any]) -> str:
    """The page for the JSON Schema of JobConfig."""
    definitions = schema["$defs"]
    parts = [_HEAD, "## Top level\n", *_rows(schema, definitions, "")]
    for key, name in _sections(schema, definitions, ""):
        section = definitions[name]
        parts += [f"\n## `{key}`\n", f"{section['description']}\n", *_rows(section, definitions, key)]
    return "\n".join(parts) + "\n"


def _sections(section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Every section below this one, depth first: its dotted key and its name in the definitions."""
    for key, value in section["properties"].items():
        in_list = "items" in value
        name = _reference(value["items"] if in_list else value)
        if name is not None:
            dotted = f"{prefix}{key}{'[]' if in_list else ''}"
            yield dotted, name
            yield from _sections(definitions[name], definitions, f"{dotted}.")


def _rows(section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> list[str]:
    required = section.get("required", ())
    rows = ["| key | type | default | limits | meaning |", "|---|---|---|---|---|"]
    for key, value in section["properties"].items():
        if (name := _reference(value)) is not None:
            dotted = f"{prefix}.{key}" if prefix else key
            text = definitions[name]["description"].split("\n")[0]
            rows.append(_row(f"`{key}`", "section", "", "", f"{text} See [`{dotted}`](#{_anchor(dotted)})."))
            continue
        default = "required" if key in required else f"`{_plain(value.get('default', {}))}`"
        rows.append(_row(f"`{key}`", _type(value), default, _limits(value), value["description"].replace("<", "&lt;")))
    return rows


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _anchor(heading: str) -> str:
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _reference(value: Mapping[str, Any]) -> str | None:
    return str(value["$ref"]).rpartition("/")[2] if "$ref" in value else None


def _alternatives(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(value.get("anyOf", [value]))


def _type(value: Mapping[str, Any]) -> str:
    return " or ".join(_one_type(v) for v in _alternatives(value))


def _one_type(value: Mapping[str, Any]) -> str:
    if "enum" in value:
        return ", ".join(f"`{item}`" for item in value["enum"])
    if value["type"] == "array":
        name = _reference(value["items"])
        return f"list of {'sections' if name else value['items']['type'] + 's'}"
    return {"object": "mapping", "boolean": "true, false"}.get(value["type"], str(value["type"]))


def _limits(value: Mapping[str, Any]) -> str:
    found = []
    for one in _alternatives(value):
        found += [f"{sign} {_plain(one[name])}" for name, sign in _LIMITS.items() if name in one]
        if "pattern" in one:
            found.append(f"`{one['pattern']}`")
    return ", ".join(found)


def _plain(value: Any) -> str:
    # 1.0 is how JSON Schema writes a whole number; 2e-05 is how Python does.
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return json.dumps(value, ensure_ascii=False) if value != "" else '""'
