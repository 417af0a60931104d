"""What a user, a disk or a stranger's file does wrong, a row each; and the one way in which every row is tried.

A row (`Attack`) says what is done, how it is made, and what must come of it: the exit code, key words of the one
sentence, and that every file that was there is as it was. The rows stand in `test_lost*.py`, `test_foreign.py` and
`test_sentences.py`; a row more is a line more. `python -m tests.attacks.table` writes them into docs/faults.md.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import logging
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from tests.attacks.given import Given
from tests.quick_compile import QUICK_COMPILE

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = {"gspn_jax.train": "gspn-train", "gspn_jax.sample": "gspn-sample"}
GOES_ON = "goes on"
"""In place of an exit code: the command takes the input and comes to the devices, or ends well."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A command in this process: `main` of the arguments."""

    main: Callable[[list[str]], object]
    arguments: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Process:
    """A command in a process of its own, for rows with a limit, a signal, or an environment of another kind."""

    arguments: Sequence[str]
    """Of Python: a script or "-m module", and its flags."""
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Variables of the process; None takes one away."""
    shell: str = '"$@"'
    """How the shell starts it, such as '"$@" >&-' with stdout closed."""
    memory: int | None = None
    """Bytes that it may hold (RLIMIT_DATA), for what must not allocate much."""
    interrupt: str | float | None = None
    """Ctrl-C: at this text of stderr, or after so many seconds."""
    seconds: float = 120
    """After so long it hangs."""


Make = Callable[[Given, pathlib.Path], Call | Process]
"""(what was made once a session, an empty folder of this row) -> what to run. It may write into the folder only."""


@dataclasses.dataclass(frozen=True)
class Attack:
    """A row of the table."""

    kind: str
    """The point of the list that it belongs to, such as "A3"."""
    done: str
    """What is done, in one line of plain words."""
    make: Make
    says: str | tuple[str, ...]
    """Key words of the sentence, all of which it holds; {names} as in `flags`."""
    code: int | str = 2
    """The exit code, or GOES_ON: then the key words stand in a line of the log."""
    writes: tuple[str, ...] = ()
    """Glob patterns, within the row's folder, of files that may appear or change; all others are as they were."""
    devices: bool = False
    """Whether device work comes before the end. Without it the row fails when parameters are made, read or used."""
    memory: int | None = None
    """Bytes that this process may take more than it has (no limit by default)."""
    slow: bool = False
    """Rows with a process are slow, but for one of a kind that stands for the others."""


def flags(main: Callable, *arguments: str, before: Callable[[Given, pathlib.Path], object] | None = None) -> Make:
    """A row's `make`: `main` of `arguments`, in which {name} is that attribute of `Given`, {here} the row's folder.

    `before` fills the row's folder.
    """

    def make(given: Given, here: pathlib.Path) -> Call:
        if before:
            before(given, here)
        return Call(main, [named(argument, given, here) for argument in arguments])

    make.command = " ".join([PROGRAMS.get(main.__module__, f"python -m {main.__module__}"), *arguments])
    return make


def train(*arguments: str, config: str = "{digits}", before=None) -> Make:
    """train_dit.py with a config file; the run directory is {here}/run unless `config` or the arguments say."""
    from gspn_jax import train as command

    where = ("--run-dir", "{here}/run") if config == "{digits}" and "--run-dir" not in arguments else ()
    return flags(command.main, "--config", config, *where, *arguments, before=before)


def draw(*arguments: str, run: str = "{run}", before=None) -> Make:
    """sample.py of a run."""
    from gspn_jax import sample

    return flags(sample.main, "--run", run, *arguments, before=before)


def prepare(*arguments: str, before=None) -> Make:
    """python -m gspn_jax.prepare."""
    from gspn_jax import prepare

    return flags(prepare.main, *arguments, before=before)


def evaluate(*arguments: str, before=None) -> Make:
    """python -m gspn_jax.evaluate."""
    from gspn_jax import evaluate

    return flags(evaluate.main, *arguments, before=before)


def convert(*arguments: str, before=None) -> Make:
    """python -m gspn_jax.convert."""
    from gspn_jax import convert

    return flags(convert.main, *arguments, before=before)


def process(*arguments: str, before=None, **settings) -> Make:
    """A `Process`; {names} in the arguments and the environment as in `flags`."""

    def make(given: Given, here: pathlib.Path) -> Process:
        if before:
            before(given, here)
        environment = {
            name: value and named(value, given, here) for name, value in settings.get("environment", {}).items()
        }
        return Process([named(one, given, here) for one in arguments], **settings | {"environment": environment})

    return make


def rows(attacks: Iterable[Attack]):
    """Decorator of a test that takes each row as `attack`."""
    attacks = list(attacks)
    names = [f"{attack.kind}-{re.sub(r'[^A-Za-z0-9]+', '-', attack.done)[:70].strip('-')}" for attack in attacks]
    marks = [[pytest.mark.slow] if attack.slow else [] for attack in attacks]
    return pytest.mark.parametrize(
        "attack", [pytest.param(a, id=n, marks=m) for a, n, m in zip(attacks, names, marks, strict=True)]
    )


class DeviceWork(BaseException):
    """The devices were put to work; no handler of errors takes it for one."""


def withstand(attack: Attack, given: Given, here: pathlib.Path, capsys, caplog, monkeypatch) -> None:
    """Does what the row says in `here`; raises AssertionError unless what must come of it does."""
    made = attack.make(given, here)
    before, session = contents(here), given.listing()
    if isinstance(made, Process):
        code, shown, log = in_a_process(made)
    else:
        code, shown, log = in_this_process(made, attack, capsys, caplog, monkeypatch)
    everything = f"{shown}\n{log}"
    assert code == (0 if attack.code == GOES_ON else attack.code), f"exit code {code}\n{everything}"
    assert "Traceback" not in everything, everything
    said = plain(everything)
    for words in (attack.says,) if isinstance(attack.says, str) else attack.says:
        words = named(words, given, here)
        assert words in said, f"expected {words!r} in:\n{everything}"
    if attack.code != GOES_ON and not isinstance(made, Process):
        assert sentences(shown) == 1, f"expected one sentence, found:\n{shown}"
    after = contents(here)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    wrong = [name for name in sorted(changed) if not any(fnmatch.fnmatch(name, one) for one in attack.writes)]
    assert not wrong, f"these files appeared, changed or went: {wrong}"
    assert given.listing() == session, "files that other rows use were changed"


def in_this_process(call: Call, attack: Attack, capsys, caplog, monkeypatch) -> tuple[int, str, str]:
    """(exit code, stderr, log lines) of `call`; coming to the devices ends it, as 0 where the row goes on."""
    if not attack.devices:
        forbid_device_work(monkeypatch)
    caplog.set_level(logging.INFO)
    code, said = 0, ""
    try:
        with memory_limit(attack.memory):
            call.main(list(call.arguments))
    except SystemExit as stopped:
        code = stopped.code or 0
        if isinstance(code, str):
            code, said = 1, code
    except DeviceWork:
        assert attack.code == GOES_ON, "the devices were put to work before the sentence"
    return code, capsys.readouterr().err + said, caplog.text


def forbid_device_work(monkeypatch) -> None:
    """Parameters cannot be made, read or used: whoever tries raises DeviceWork."""
    from gspn_jax import autoencoder
    from gspn_jax.metrics.extractor import Extractor
    from gspn_jax.runs import checkpoints
    from gspn_jax.sampling import sampler
    from gspn_jax.text_to_image.drawing import Drawing
    from gspn_jax.training import train as page

    def device_work(*_, **__):
        raise DeviceWork

    for owner, name in (
        (page, "create_state"),
        (page, "make_step"),
        (checkpoints, "read_items"),
        (sampler.Sampler, "__call__"),
        (autoencoder.Autoencoder, "encode"),
        (Extractor, "__call__"),
        (Drawing, "_everywhere"),
    ):
        monkeypatch.setattr(owner, name, device_work)


@contextlib.contextmanager
def memory_limit(extra: int | None) -> Iterator[None]:
    """Lets this process hold `extra` bytes more than it does; what asks for more gets MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if extra is not None:
        held = int(re.search(r"VmData:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def in_a_process(process: Process) -> tuple[int, str, str]:
    """(exit code, stderr, "") of `process`, which is killed with all that it started when it hangs."""
    environment = os.environ | {"XLA_FLAGS": QUICK_COMPILE, "PYTHONPATH": str(ROOT)} | process.environment
    limit = f"ulimit -d {process.memory // 1024} || exit 99; " if process.memory else ""
    with subprocess.Popen(
        ["bash", "-c", limit + process.shell, "bash", sys.executable, *process.arguments],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            shown = ""
            if isinstance(process.interrupt, str):
                for line in running.stderr:
                    shown += line
                    if process.interrupt in line:
                        break
            elif process.interrupt is not None:
                time.sleep(process.interrupt)
            if process.interrupt is not None:
                os.killpg(running.pid, signal.SIGINT)
            shown += running.communicate(timeout=process.seconds)[1]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs for {process.seconds} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    return running.returncode, shown, ""


def contents(folder: pathlib.Path) -> dict[str, str]:
    """{path within `folder`: SHA-256 of its bytes, or what it is instead of a file}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            about = f"link to {os.readlink(path)}"
        elif path.is_file():
            about = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            about = "folder" if path.is_dir() else "no file"
        found[path.relative_to(folder).as_posix()] = about
    return found


def sentences(shown: str) -> int:
    """How many sentences stderr has, beside progress bars and lines of the log; a box of tyro's is one."""
    if "For full helptext" in shown:
        return shown.count("For full helptext")
    lines = [line.rpartition("\r")[2].strip() for line in shown.splitlines()]
    lines = [line for line in lines if "%|" not in line]  # a bar that did not end its line
    return sum(bool(line) and not line.startswith(("INFO ", "WARNING ", "ERROR ", "usage: ", "[")) for line in lines)


def plain(shown: str) -> str:
    """The words alone, with no line ends and none of tyro's boxes."""
    return " ".join(shown.replace("│", " ").split())


def named(text: str, given: Given, here: pathlib.Path) -> str:
    """`text` with {here}, and with every {name} of `Given`, which is made when it is asked for."""

    class Names(dict):
        def __missing__(self, name):
            return getattr(given, name)

    return text.format_map(Names(here=here))
