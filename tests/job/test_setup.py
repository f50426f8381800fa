from __future__ import annotations

import pytest

from janus_cluster.job.setup import advise_on_setup, warn_of_interpreter

LOGIN = "/home/u/venv/bin/python"


@pytest.mark.parametrize(
    "line",
    [
        "source /shared/janus/bin/activate",
        ". '/shared/janus/bin/activate'",
        "module load cuda; source /shared/janus/bin/activate",
        "conda activate janus",
        "source /opt/conda/bin/activate janus",
        "micromamba activate janus",
        "module load python/3.11",
        "ml Miniforge3",
        "pyenv activate janus",
        "spack load py-torch",
    ],
)
def test_a_setup_that_activates_another_environment_is_named(line: str) -> None:
    (warning,) = warn_of_interpreter(["module load cuda", line], python=LOGIN, is_own=False)
    assert line in warning and LOGIN in warning and "--set environment.python=python" in warning
    assert warn_of_interpreter([line], python="python", is_own=True) == []


@pytest.mark.parametrize(
    ("line", "python"),
    [
        ("source /home/u/venv/bin/activate", LOGIN),
        ("conda activate janus", "/opt/conda/envs/janus/bin/python"),
        ("module load cuda/12.8", LOGIN),
        ("export PATH=/opt/activate:$PATH", LOGIN),
    ],
)
def test_a_setup_that_brings_the_interpreter_that_submits_is_none(line: str, python: str) -> None:
    assert warn_of_interpreter([line], python=python, is_own=False) == []


@pytest.mark.parametrize(
    ("failed", "advice"),
    [
        ("environment.setup: exit code 127 of: module load cuda", "source /etc/profile.d/modules.sh"),
        ("environment.setup: exit code 127 of: conda activate janus", "etc/profile.d/conda.sh"),
        (
            "setup on n1: environment.setup_each_node: exit code 127 of: module load y",
            "in environment.setup_each_node: source",
        ),
        ("environment.setup: exit code 1 of: conda activate janus", "etc/profile.d/conda.sh"),
        ("environment.setup: exit code 127 of: modul load cuda", "modul is no command"),
        ("environment.setup: exit code 1 of: module load no-such", "correct the line: module load no-such"),
    ],
)
def test_a_failed_line_has_its_remedy(failed: str, advice: str) -> None:
    assert advice in str(advise_on_setup(failed))


def test_another_reason_has_none() -> None:
    assert advise_on_setup("environment.python: there is no python here") is None
