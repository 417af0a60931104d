"""A command on a CPU runs with large pages, once restarted; nothing else is."""

import os
import pathlib
import subprocess
import sys

import pytest

from gspn_jax.cli import huge_pages

MADVISE = "always [madvise] never\n"
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environment", "accelerators", "value"),
    [
        ({}, [], "glibc.malloc.hugetlb=1"),
        ({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidiactl"], "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, [], "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ({}, ["/dev/nvidiactl"], None),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], None),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, [], None),
    ],
)
def test_the_variable_is_set_for_a_cpu_and_never_against_somebodys_choice(environment, accelerators, value):
    assert huge_pages.tunables(environment, MADVISE, (2, 36), accelerators) == value


@pytest.mark.parametrize(
    ("setting", "glibc"),
    [
        ("[always] madvise never\n", (2, 36)),
        ("always madvise [never]\n", (2, 36)),
        ("", (2, 36)),
        (MADVISE, (2, 31)),
        (MADVISE, ()),
    ],
)
def test_it_is_left_alone_where_it_would_not_help(setting, glibc):
    assert huge_pages.tunables({}, setting, glibc, []) is None


def run(tmp_path, folder, *argv):
    """What a script in `folder` prints that sets itself up on a machine where large pages are for those who ask."""
    (tmp_path / "setting").write_text(MADVISE)
    script = tmp_path / "command.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from gspn_jax.cli import command, huge_pages\n"
        f"huge_pages.SETTING = pathlib.Path({str(tmp_path / 'setting')!r})\n"
        f"command.PACKAGE = {str(folder)!r}\n"
        "huge_pages._glibc, huge_pages.ACCELERATORS = (lambda: (2, 36)), ()\n"
        "print('started', flush=True)\n"
        "huge_pages.restart_with_them()\n"
        "print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script), *argv], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of Linux")
def test_a_command_starts_again_once_with_the_same_arguments(tmp_path):
    assert run(tmp_path, tmp_path, "--a", "b c") == ["started", "started", "['--a', 'b c'] glibc.malloc.hugetlb=1"]


def test_a_script_of_somebody_else_does_not(tmp_path):
    assert run(tmp_path, tmp_path / "elsewhere" / "package") == ["started", "[] None"]
