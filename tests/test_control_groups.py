"""Memory that control groups leave, in trees as Docker, Slurm, Kubernetes and systemd make them."""

import pathlib

import pytest

from gspn_jax import control_groups, machine

TWO = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
ONE = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
UNLIMITED = "9223372036854771712"


def make(folder: pathlib.Path, *, mounts: list[str], own: str, files: dict[str, str]) -> pathlib.Path:
    """A root with /proc/self, and files of groups by their paths."""
    files = files | {"proc/self/mountinfo": "\n".join([*mounts, ""]), "proc/self/cgroup": own}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


def two(path: str, limit: str, used: str = "0", **more: str) -> dict[str, str]:
    """Files of a group of version 2."""
    values = {"max": limit, "current": used} | more
    return {f"sys/fs/cgroup{path}/memory.{name}": value for name, value in values.items()}


def one(path: str, limit: str, used: str = "0", cached: str = "0") -> dict[str, str]:
    """Files of a group of version 1."""
    values = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": f"cache 9\ntotal_inactive_file {cached}"}
    return {f"sys/fs/cgroup/memory{path}/memory.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("mounts", "own", "files", "left", "path"),
    [
        ([TWO], "0::/", two("", "1000", "700", stat="anon 600\ninactive_file 90"), 390, "cgroup/memory.max"),
        ([TWO], "0::/", two("", "max", "700"), None, ""),
        ([TWO], "0::/job/step", two("/job", "800", "100") | two("/job/step", "1000", "50"), 700, "job/memory.max"),
        ([TWO], "0::/job/step", two("/job", "max", "100") | two("/job/step", "600", "50"), 550, "step/memory.max"),
        ([TWO], "0::/a", two("/a", "max", "100", high="300"), 200, "a/memory.high"),
        ([TWO], "0::/a", two("/a", "100", "300"), 0, "a/memory.max"),
        ([TWO], "0::/../../outside", two("", "1000"), 1000, "cgroup/memory.max"),
        ([TWO], "0::/gone", {}, None, ""),
        ([TWO], "nonsense", two("", "1000"), 1000, "cgroup/memory.max"),
        (
            [CPU, ONE.format(root="/")],
            "4:memory:/a/b\n1:cpu:/",
            one("/a", "90", "20", "5") | one("/a/b", UNLIMITED),
            75,
            "a",
        ),
        ([CPU, ONE.format(root="/docker/1")], "4:memory:/docker/1", one("", "90"), 90, "memory/memory.limit_in_bytes"),
        ([CPU, ONE.format(root="/docker/1")], "4:memory:/docker/1/a", one("/a", "90"), 90, "a/memory.limit_in_bytes"),
        ([CPU, ONE.format(root="/docker/1")], "4:memory:/other", one("", "90"), 90, "memory/memory.limit_in_bytes"),
        ([CPU, ONE.format(root="/")], "4:cpu,memory:/a\n0::/x", one("/a", UNLIMITED), None, ""),
        ([CPU], "1:cpu:/", {}, None, ""),
    ],
    ids=str,
)
def test_the_group_that_leaves_least_counts(tmp_path, mounts, own, files, left, path):
    found = control_groups.tightest(make(tmp_path, mounts=mounts, own=own, files=files))
    assert (found and found.left) == left
    assert left is None or path in str(found.path)


def test_a_mount_point_with_a_space_is_found(tmp_path):
    mount = "30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw"
    root = make(
        tmp_path, mounts=[mount], own="0::/", files={"my groups/memory.max": "7", "my groups/memory.current": "2"}
    )
    assert control_groups.tightest(root).left == 5


def test_no_control_groups_are_no_limit(tmp_path, monkeypatch):
    assert control_groups.tightest(tmp_path) is None
    monkeypatch.setattr(control_groups, "tightest", lambda: control_groups.Limit(tmp_path, 9, 4))
    assert machine._of_container() == 4
