"""Memory in pages of 2 MB for JAX on a CPU.

XLA:CPU allocates the temporary memory of a program at every call and frees it after it, and Linux hands it out anew in
pages of 4 KB that it clears one by one: a quarter of the processor's time of a training step. glibc (2.35 or newer)
asks for large pages if an environment variable says so when the process starts, so a command starts itself once more.
No call within the process does the same: `mallopt` keeps no block of this size for the next call, and where the system
gives large pages only to who asks (the default of most distributions), it is glibc that must ask.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping

from gspn_jax.cli import interrupts
from gspn_jax.cli.command import is_command

TUNABLE = "glibc.malloc.hugetlb"
OLDEST_GLIBC = (2, 35)
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio")


def restart_with_them() -> None:
    """Replaces this process by the same command with GLIBC_TUNABLES set, if that is one of this project's commands and
    the variable can help (`tunables`); returns otherwise. Must be called before anything is done.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 in the environment keeps a command as it is.
    """
    if not sys.platform.startswith("linux") or not is_command():
        return
    if "jax" in sys.modules or sys.gettrace():  # too late, or under a debugger
        return
    setting = SETTING.read_text() if SETTING.exists() else ""
    value = tunables(os.environ, setting, _glibc(), [path for path in ACCELERATORS if os.path.exists(path)])
    if value is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError), interrupts.waiting():  # then it goes on as it is
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": value})


def tunables(
    environment: Mapping[str, str], setting: str, glibc: tuple[int, ...], accelerators: Iterable[str]
) -> str | None:
    """GLIBC_TUNABLES to start with, or None if it is not to be touched: JAX will not compute on a CPU, somebody has
    chosen already, glibc does not know it, or the system's `setting` gives large pages to all or to none."""
    on_cpu = (environment.get("JAX_PLATFORMS") or ("" if any(accelerators) else "cpu")) == "cpu"
    given = environment.get("GLIBC_TUNABLES", "")
    if not on_cpu or TUNABLE in given or glibc < OLDEST_GLIBC or "[madvise]" not in setting:
        return None
    return f"{given}:{TUNABLE}=1" if given else f"{TUNABLE}=1"


def _glibc() -> tuple[int, ...]:
    """(2, 36); () where the C library is another one."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (ValueError, OSError, AttributeError):
        return ()
    return tuple(map(int, version.split("."))) if name == "glibc" else ()
