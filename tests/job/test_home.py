from __future__ import annotations

from pathlib import Path

from janus_cluster.job.home import index_cache, runs_dir, sandbox_home, site_dir


def test_janus_home_holds_everything() -> None:
    env = {"JANUS_HOME": "/data/janus", "XDG_STATE_HOME": "/elsewhere", "HOME": "/home/u"}
    found = (runs_dir(env, Path("/work")), sandbox_home(env), site_dir(env))
    assert found == (Path("/data/janus/runs"), Path("/data/janus/sandbox"), Path("/data/janus/site"))


def test_without_janus_home_runs_are_here_and_the_rest_in_xdg_state() -> None:
    env = {"XDG_STATE_HOME": "/state", "HOME": "/home/u"}
    assert runs_dir(env, Path("/work")) == Path("/work/runs")
    assert sandbox_home(env) == Path("/state/janus-cluster/sandbox")
    assert site_dir(env) == Path("/state/janus-cluster/site")


def test_xdg_default_and_a_relative_xdg_value_are_below_the_user_home() -> None:
    wanted = Path("/home/u/.local/state/janus-cluster/sandbox")
    assert sandbox_home({"HOME": "/home/u"}) == wanted
    assert sandbox_home({"HOME": "/home/u", "XDG_STATE_HOME": "state"}) == wanted


def test_a_relative_janus_home_is_made_absolute() -> None:
    assert runs_dir({"JANUS_HOME": "x"}, Path("/work")) == Path("/work/x/runs")
    assert sandbox_home({"JANUS_HOME": "x"}) == Path.cwd() / "x" / "sandbox"


def test_indexes_of_data_that_no_run_keeps_are_in_the_users_cache() -> None:
    assert index_cache({"JANUS_HOME": "/data/janus", "XDG_CACHE_HOME": "/c"}) == Path("/data/janus/data_index")
    assert index_cache({"XDG_CACHE_HOME": "/c", "HOME": "/home/u"}) == Path("/c/janus-cluster/data_index")
    assert index_cache({"HOME": "/home/u"}) == Path("/home/u/.cache/janus-cluster/data_index")
