"""nodes_min: each smaller number of nodes that keeps the effective batch has a bundle; an allocation takes its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_cluster.desk.submit import Request, Submission, submit
from janus_cluster.errors import JanusError, UsageError
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.node.slurm_launcher import SlurmLauncher
from janus_cluster.run.records.bundle import load_resolved
from tests.tiny_data import write_tiny_data


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    write_tiny_data(tmp_path / "data")
    return {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(tmp_path / "data")}


def dry_run(environ: dict[str, str], *sets: str, nodes: int = 4, job: str = "demo", **more: Any) -> Submission:
    request = Request(job=job, nodes=nodes, sets=sets, dry_run=True, **more)
    return submit(request, environ=environ, cwd=Path(environ["JANUS_HOME"]).parent)


def bundles(done: Submission) -> dict[int, ResolvedJob]:
    return {number: load_resolved(done.run.bundle(number)) for number in done.run.bundle_numbers()}


def test_each_number_of_nodes_that_keeps_the_batch_has_a_bundle_of_its_own(environ: dict[str, str]) -> None:
    """The demo's 4 samples on 4 ranks are 16: 8 or 4 accumulated on 1 or 2 ranks, and nothing on 3."""
    done = dry_run(environ, "nodes_min=1")
    found = bundles(done)
    assert {n: (r.job.nodes, r.world_size) for n, r in found.items()} == {1: (4, 4), 2: (2, 2), 3: (1, 1)}
    assert {r.effective_batch_size for r in found.values()} == {16}
    assert {n: r.job.training.gradient_accumulation_steps for n, r in found.items()} == {1: 1, 2: 2, 3: 4}
    assert {n: r.fewer_nodes for n, r in found.items()} == {1: {2: 2, 1: 3}, 2: {1: 3}, 3: {}}
    assert {n: r.sbatch_options["nodes"] for n, r in found.items()} == {1: "1-4", 2: "1-2", 3: "1"}
    assert "#SBATCH --nodes=1-4\n" in done.run.bundle(1).job_sbatch.read_text()
    assert "ntasks-per-node" not in found[1].sbatch_options, "with it Slurm gives the least and not the most"
    assert len({r.config_hash for r in found.values()}) == 3


def test_memory_auto_chooses_for_each_number_of_nodes(environ: dict[str, str]) -> None:
    sets = ("nodes_min=1", "training.memory=auto", "hardware.gpu_memory_gb=4", "training.effective_batch_size=16")
    found = bundles(dry_run(environ, *sets))
    heads = {number: found[1].fewer_nodes[number] for number in (1, 2)}
    assert found[heads[2]].memory is not None and found[heads[1]].memory is not None
    for head in (1, *heads.values()):
        chain, bundle = [found[head]], found[head].fallback_bundle
        while bundle is not None:
            chain.append(found[bundle])
            bundle = found[bundle].fallback_bundle
        assert {each.job.nodes for each in chain} == {found[head].job.nodes}
        assert {each.effective_batch_size for each in chain} == {16}


def test_without_the_key_or_without_a_queue_the_job_is_for_exactly_its_nodes(environ: dict[str, str]) -> None:
    assert list(bundles(dry_run(environ))) == [1]
    assert list(bundles(dry_run(environ, "nodes_min=4"))) == [1]
    assert list(bundles(dry_run(environ, "nodes_min=1", cluster="local"))) == [1]
    gate = dry_run(environ, "nodes_min=1", "kind=preflight")
    assert bundles(gate)[1].sbatch_options["nodes"] == "4"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("nodes_min=3",), ["nodes_min: 3", "batch of 16", "fewer than 4 that keep it: 1, 2", "--set nodes_min=2"]),
        (("nodes_min=5",), ["nodes_min: 5", "more than nodes (4)", "--nodes 5"]),
        (("nodes_min=2", "slurm.gpus=32"), ["slurm.gpus", "gpus-per-node"]),
        (
            ("nodes_min=2", "deepspeed.overrides.zero_optimization.elastic_checkpoint=true"),
            ["nodes_min: 2", "elastic_checkpoint"],
        ),
    ],
)
def test_what_cannot_run_on_fewer_nodes_is_refused(
    environ: dict[str, str], sets: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        dry_run(environ, *sets)
    text = f"{caught.value.message}\n{caught.value.hint}"
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("allocated", "used"), [("h800-[01-04]", 4), ("h800-[01-02,04]", 2), ("h800-[03-04]", 2), ("h800-04", 1)]
)
def test_of_an_allocation_as_many_nodes_are_used_as_keep_the_batch(allocated: str, used: int) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": allocated}
    launcher = SlurmLauncher.of_allocation(environ, cluster="slurm", numbers={4, 2, 1})
    assert (len(launcher.nodes), launcher.fewest) == (used, 1)


@pytest.mark.parametrize("allocated", ["h800-01", "h800-[01-05]"])
def test_an_allocation_of_another_size_is_refused(allocated: str) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": allocated}
    with pytest.raises(JanusError, match="the job is for 2 or 4 nodes"):
        SlurmLauncher.of_allocation(environ, cluster="slurm", numbers={4, 2})
