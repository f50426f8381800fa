from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.desk.encoding import require_same_bytes
from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import ResolvedJob

Resolve = Callable[..., ResolvedJob]


def test_a_path_that_the_shell_decodes_otherwise_is_refused(resolve: Resolve) -> None:
    # What a shell under GB18030 makes of a folder whose name is UTF-8 on the disk.
    seen = "实验".encode().decode("gb18030", "surrogateescape")
    resolved = resolve("demo", run_dir=Path("/shared", seen, "r"))
    with pytest.raises(UsageError, match=r"run folder.*gb18030") as caught:
        require_same_bytes(resolved, encoding="gb18030")
    assert "LC_ALL=C.UTF-8" in (caught.value.hint or "")


@pytest.mark.parametrize(("folder", "encoding"), [("实验", "utf-8"), ("plain", "gb18030"), ("plain", "ascii")])
def test_a_path_of_the_same_bytes_is_taken(folder: str, encoding: str, resolve: Resolve) -> None:
    resolved = resolve("demo", run_dir=Path("/shared", folder, "r"))
    require_same_bytes(resolved, encoding=encoding)
    assert resolved.run_dir.encode(encoding) == resolved.run_dir.encode()


def test_a_name_of_the_data_counts_too(resolve: Resolve) -> None:
    resolved = resolve("demo", sets=["data.roots=[/data/数据]"])
    with pytest.raises(UsageError, match=r"data\.roots"):
        require_same_bytes(resolved, encoding="gb18030")
