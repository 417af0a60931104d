"""What the entry scripts share: reading a config file, overriding its fields, and errors as one sentence."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from gspn_jax import huge_pages
from gspn_jax.config import Config, ConfigError

USAGE_ERROR = 2
"""Exit code for input that cannot be used."""
INTERRUPTED = 75
"""Exit code of a run that the same command goes on with: EX_TEMPFAIL of sysexits.h."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns ConfigError, OSError and the given kinds into one line on stderr and exit code 2, and the loss of another
    host into one with code 75."""
    try:
        yield
    except (ConfigError, OSError, *kinds) as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {text}", file=sys.stderr)
        _leave(USAGE_ERROR)
    except RuntimeError as error:
        if not _lost_host(error):
            raise
        print(LOST.format(str(error).splitlines()[0]), file=sys.stderr)
        _leave(INTERRUPTED)


LOST = ("another host, or the connection to it, was lost ({}); the same command on all hosts goes on from the newest "
        "checkpoint")


def _leave(code: int) -> NoReturn:
    """Ends a process that others may be waiting for: an orderly end would wait for them in turn."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _lost_host(error: RuntimeError) -> bool:
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)
                and "RESOURCE_EXHAUSTED" not in str(error))


def setup() -> None:
    """Log lines on stderr and JAX's compilation cache on disk (JAX_COMPILATION_CACHE_DIR moves it).

    Called first, before JAX is imported: on a CPU a command starts again with large pages (see `huge_pages`), and one
    of several hosts goes on in a child process (see `_watch_over_child`).
    """
    huge_pages.restart_with_them()
    named = any(argument.split("=")[0] in HOSTS for argument in sys.argv) or any(map(os.environ.get, HOSTS.values()))
    if (named or _in_slurm()) and "jax" not in sys.modules:
        _watch_over_child()
    set_xla_flags()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("gspn_jax", "kernels"):
        logging.getLogger(name).setLevel(logging.INFO)
    _quiet_failed_saves()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "gspn_jax" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


SLICE_FUSION = "--xla_gpu_enable_dynamic_slice_fusion"


def set_xla_flags() -> None:
    """Switches off what JAX 0.11.2 for CUDA does wrong: a product that is saved for the backward pass it computes
    twice. 0.10.2 and 0.12 do not, and gain by it. Has no effect once JAX is imported, or on a choice of one's own."""
    flags = os.environ.get("XLA_FLAGS", "")
    cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if cuda and importlib.metadata.version("jax") == "0.11.2" and SLICE_FUSION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {SLICE_FUSION}=false".strip()


def _quiet_failed_saves() -> None:
    """Of a checkpoint that could not be written one sentence is enough: orbax and tensorstore would add a traceback for
    each file, and another for each that they go on writing after orbax has given up."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(what) -> None:
        if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
            report(what)

    sys.unraisablehook = report_others


def _watch_over_child() -> None:
    """Returns in a child process; this one waits for it and has the last word.

    JAX ends a process that has lost another host by abort(), whose exit code (134) is that of any crash and which no
    handler in the process survives. From here it gets the code and the sentence of every other way to lose a host.
    SIGTERM is passed on, Ctrl-C reaches both by itself, and the child does not outlive its parent.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()
        return

    def pass_on(number: int, _frame) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        print(LOST.format("JAX ended this process, see above"), file=sys.stderr, flush=True)
        code = INTERRUPTED
    if code < 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _end_with_parent(reader: int) -> None:
    os.read(reader, 1)  # nothing is ever written: it returns when the other end is closed
    os._exit(1)


HOSTS = {"--coordinator": "JAX_COORDINATOR_ADDRESS", "--num-processes": "JAX_NUM_PROCESSES",
         "--process-id": "JAX_PROCESS_ID"}
"""The flags by which a process finds the others, and the variables that say the same."""
HEARTBEAT_SECONDS = 60
"""A host that has not been heard of for so long is lost, and the others stop. GSPN_HEARTBEAT_SECONDS changes it."""


def join_other_hosts(argv: Sequence[str] | None = None) -> list[str]:
    """Joins the processes of a job by jax.distributed; returns `argv` (of the process by default) without our flags.

    The place of this process comes from --coordinator HOST:PORT --num-processes N --process-id I, from the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from Slurm if the step has several tasks. Does
    nothing for a single process. Raises ConfigError when only some of the three are given, or one is no number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, variable in HOSTS.items():
        parser.add_argument(flag, dest=variable, default=os.environ.get(variable))
    chosen, rest = parser.parse_known_args(argv)
    place = vars(chosen)
    missing = [name for name in place if place[name] is None]
    if len(missing) == 3 and not _in_slurm():
        return rest
    if missing and not _in_slurm():
        flag = next(flag for flag, name in HOSTS.items() if name == missing[0])
        raise ConfigError(f"several processes need {', '.join(HOSTS)} or {', '.join(HOSTS.values())} in the "
                          f"environment, found no {flag} or {missing[0]}")
    arguments = {}
    if not missing:
        address, count, index = place.values()
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise ConfigError(f"--process-id must be a number below --num-processes, found {index!r} of {count!r}")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--coordinator must be HOST:PORT, found {address!r}")
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    seconds = os.environ.get("GSPN_HEARTBEAT_SECONDS", str(HEARTBEAT_SECONDS))
    if not (seconds.isdigit() and int(seconds)):
        raise ConfigError(f"GSPN_HEARTBEAT_SECONDS must be a number of seconds greater than 0, found {seconds!r}")
    import jax

    jax.distributed.initialize(**arguments, local_device_ids=_local_device_ids(),
                               heartbeat_timeout_seconds=int(seconds))  # without a place it asks Slurm's variables
    return rest


def _local_device_ids() -> list[int] | None:
    """[], all that this process sees, where it is alone on its host: left to itself (None) JAX takes one GPU for every
    task of Slurm, which is right where a host has several."""
    hosts = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    alone = hosts is None or hosts == os.environ.get("SLURM_NTASKS")
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def _in_slurm() -> bool:
    """Whether this is one of several tasks of a Slurm step."""
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ


def load_config(path: str | pathlib.Path) -> Config:
    """The `config` that a config file defines. Raises ConfigError for a file that is missing or defines none."""
    path = pathlib.Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py") if p.name != "__init__.py")
        raise ConfigError(f"--config must be a config file such as {', '.join(known) or 'configs/digits.py'}, "
                          f"found {str(path)!r}, which is no file")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config must be a Python file, found {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except (SyntaxError, NameError, TypeError, ImportError, AttributeError, LookupError, ValueError,
            ArithmeticError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} must define `config = Config(...)`, found {found}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ConfigError(f"{path} must define `config = Config(...)`, found {type(config).__name__}")
    return config


def parse_config(argv: Sequence[str] | None, *, program: str, description: str) -> Config:
    """--config FILE, then any field of it by its dotted name. A wrong flag or value exits with code 2 (tyro)."""
    import tyro  # here, so that training itself needs no command-line package

    first = argparse.ArgumentParser(prog=program, description=description, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(argv)
    if chosen.config is None:
        if "-h" in rest or "--help" in rest:
            print(f"usage: {program} --config configs/NAME.py [--FIELD VALUE ...]\n\n{description}\n\n"
                  f"`{program} --config configs/digits.py --help` lists every field with its value in that file.")
            sys.exit(0)
        raise ConfigError(f"{program} needs --config configs/NAME.py")
    return tyro.cli(Config, args=rest, default=load_config(chosen.config), prog=f"{program} --config {chosen.config}",
                    description=description)
