"""Exported variables: from a profile and the job's own values to EnvVar, and from EnvVar to env.sh. Pure functions."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import EnvVar
from janus_cluster.job.secrets import is_secret

# A proxy or package-index address with user:password@ is as secret as a token.
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_ASSIGNMENT = re.compile(r"(?<![\w$])([A-Za-z_]\w*)=([^\s;&|]*)")
_COMMENT_WIDTH = 110
# $${NAME} of the job file: the node's own value.
_NODE_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}", re.ASCII)


def split_secrets(forwarded: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(plain, secret): forwarded variables that env.sh may show, and those that only secrets.env may hold.

    A value that holds a password inside a URL counts as secret under any name.
    """
    secret = {n: v for n, v in forwarded.items() if is_secret(n) or _PASSWORD_IN_URL.search(v)}
    return {n: v for n, v in forwarded.items() if n not in secret}, secret


def resolve_env(
    profile: Sequence[Mapping[str, Any]],
    user_variables: Mapping[str, str],
    forwarded: Mapping[str, str],
    *,
    cpus_per_process: int | None = None,
) -> tuple[EnvVar, ...]:
    """Every variable to export, once each: the profile's, over them the forwarded ones, over all the job's own.

    `forwarded` may hold secrets; they are left out here and belong into secrets.env (split_secrets).
    `cpus_per_process` lowers the profile's values that are limited by it (OMP_NUM_THREADS); None: not known.
    Raises: UsageError for a secret in environment.variables, or a name given twice.
    """
    _refuse_secret_variables(user_variables)
    both = sorted(set(user_variables) & set(forwarded))
    if both:
        raise UsageError(
            f"{both[0]} is in environment.variables and in environment.forward; only one of them can win",
            hint=f"remove {both[0]} from one of the two",
        )
    entries = {str(entry["name"]): entry for entry in profile}
    resolved: dict[str, EnvVar] = {}
    for name, entry in entries.items():
        if entry["value"] is not None:
            resolved[name] = _from_profile(entry, cpus_per_process)
    for name, value in split_secrets(forwarded)[0].items():
        reason = "Carried from the shell that submitted." + _instead_of(entries.get(name))
        resolved[name] = EnvVar(name=name, value=value, reason=reason, origin="environment.forward")
    for name, value in user_variables.items():
        reason = "Set in the job." + _instead_of(entries.get(name))
        resolved[name] = EnvVar(name=name, value=value, reason=reason, origin="environment.variables")
    return tuple(resolved.values())


def node_references(var: EnvVar) -> list[str]:
    """The names of the node's variables that the value refers to as ${NAME}; only environment.variables may."""
    return _NODE_REFERENCE.findall(var.value) if var.origin == "environment.variables" else []


def expand_on_node(env: Sequence[EnvVar], environ: Mapping[str, str]) -> tuple[dict[str, str | None], list[str]]:
    """The variables that refer to the node's own, with this node's values; None where one of those is not set.

    One that refers to itself (PATH: /x:${PATH}) is left as env.sh has expanded it: here it would grow with every step.
    Returns: also a line for each name that is not set.
    """
    found: dict[str, str | None] = {}
    problems = []
    for var in env:
        names = node_references(var)
        if not names or var.name in names:
            continue
        values = {name: found.get(name, environ.get(name)) for name in names}
        absent = [name for name, value in values.items() if value is None]
        problems += [f"environment.variables.{var.name}: ${{{name}}} is not set on this node" for name in absent]
        known = {name: value or "" for name, value in values.items()}
        found[var.name] = None if absent else _expanded(var.value, known)
    return found, problems


def _expanded(value: str, known: Mapping[str, str]) -> str:
    return _NODE_REFERENCE.sub(lambda m: known[m[1]], value)


def render_env_sh(env: Sequence[EnvVar], *, secret_names: Sequence[str], secrets_path: Path | str) -> str:
    """The text of env.sh: one export per variable under its reason; secrets by sourcing a file, never by value.

    Raises: ValueError if `env` holds a secret, because then it was resolved wrongly.
    """
    lines = [
        "# Every variable that janus-cluster exports on the nodes, and why. job.sbatch sources this file.",
        "# Made from the job file; to change a value, set it under environment.variables there and submit again.",
        "# shellcheck shell=sh",
    ]
    for var in env:
        if is_secret(var.name):
            raise ValueError(f"{var.name} is a secret and may not be written to env.sh")
        value = _quote_references(var.value) if node_references(var) else shlex.quote(var.value)
        lines += ["", *_comment(f"{var.reason} [{var.origin}]"), f"export {var.name}={value}"]
    if secret_names:
        names = ", ".join(secret_names)
        lines += [
            "",
            *_comment(f"{names}: only in this file, readable by you alone."),
            "# shellcheck source=/dev/null",
            f". {shlex.quote(str(secrets_path))}",
        ]
    return "\n".join(lines) + "\n"


def _quote_references(value: str) -> str:
    """The value in double quotes, in which only its ${NAME} are expanded; one that is not set is empty."""
    texts = _NODE_REFERENCE.split(value)
    plain = [re.sub(r'([\\"$`])', r"\\\1", text) if i % 2 == 0 else f"${{{text}-}}" for i, text in enumerate(texts)]
    return '"' + "".join(plain) + '"'


def render_secrets_env(secrets: Mapping[str, str]) -> str:
    """The text of secrets.env: exports only, for a file of mode 0600."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in secrets.items()]
    return "\n".join(
        ["# Mode 0600. Do not copy this file anywhere; nothing else in the run folder holds these.", *lines, ""]
    )


def parse_secrets_env(text: str) -> dict[str, str]:
    """The variables of a secrets.env as render_secrets_env writes it, for a launcher that is not a shell."""
    tokens = shlex.split(text, comments=True)
    pairs = (word.partition("=") for word in tokens if word != "export")
    return {name: value for name, _, value in pairs}


def check_setup(lines: Iterable[str], *, key: str) -> None:
    """Nothing, if the lines of `key` may be written into a script of the run folder.

    Raises: UsageError for a control character, or a secret given by value (job.sbatch is readable by others).
    """
    for number, line in enumerate(lines, 1):
        where = f"{key}, line {number}"
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line):
            raise UsageError(f"{where}: a control character in {line!r}", hint="write the line in plain text")
        for name, value in _ASSIGNMENT.findall(line):
            if is_secret(name) and value.strip("\"'") and not value.lstrip("\"'").startswith("$"):
                raise UsageError(
                    f"{where}: {name} is given by value; job.sbatch may not hold a secret",
                    hint=f"export {name} in your shell and add it to environment.forward",
                )


def _refuse_secret_variables(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if is_secret(name) or _PASSWORD_IN_URL.search(value):
            raise UsageError(
                f"environment.variables.{name}: a secret may not be in a job file (its value is not shown here)",
                hint=f"export {name} in your shell and list it: environment: {{forward: [{name}]}}",
            )


def _from_profile(entry: Mapping[str, Any], cpus_per_process: int | None) -> EnvVar:
    name, value, reason = str(entry["name"]), str(entry["value"]), str(entry["reason"])
    if entry.get("limit") == "cpus_per_process" and cpus_per_process is not None and cpus_per_process < int(value):
        reason += f" Lowered from {value}: Slurm gives each rank {cpus_per_process} CPUs."
        value = str(max(1, cpus_per_process))
    return EnvVar(name=name, value=value, reason=reason, origin=str(entry["origin"]))


def _instead_of(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["value"] is None:
        return f" {entry['origin']} leaves it unset: {entry['reason']}"
    return f" {entry['origin']} has {entry['value']!r}: {entry['reason']}"


def _comment(text: str) -> list[str]:
    flat = " ".join(text.split())
    return [f"# {line}" for line in textwrap.wrap(flat, _COMMENT_WIDTH, break_long_words=False)]
