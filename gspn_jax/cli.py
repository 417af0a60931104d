"""What the entry scripts share: reading a config file, overriding its fields, and errors as one sentence."""

import argparse
import contextlib
import importlib.util
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

from gspn_jax.config import Config, ConfigError

USAGE_ERROR = 2
"""Exit code for input that cannot be used."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns ConfigError, OSError and the given kinds into one line on stderr and exit code 2."""
    try:
        yield
    except (ConfigError, OSError, *kinds) as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def setup() -> None:
    """Log lines on stderr and JAX's compilation cache on disk (JAX_COMPILATION_CACHE_DIR moves it)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("gspn_jax", "kernels"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("absl", "asyncio"):  # orbax's tracebacks for each file it cannot write; what it raises is reported
        logging.getLogger(name).setLevel(logging.CRITICAL)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "gspn_jax" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def join_other_hosts() -> None:
    """Joins the processes of a job by jax.distributed: a Slurm step of several tasks, or JAX_COORDINATOR_ADDRESS
    (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment. Does nothing for a single process.

    Raises ConfigError when only some of the three variables are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if name not in os.environ]
    in_slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
    if len(missing) == 3 and not in_slurm:
        return
    if missing and not in_slurm:
        raise ConfigError(f"several processes need {', '.join(names)} in the environment, found no {missing[0]}")
    import jax

    if missing:
        jax.distributed.initialize()  # finds its place from Slurm's variables
    else:
        address, count, index = (os.environ[name] for name in names)
        jax.distributed.initialize(address, int(count), int(index))


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
    except (SyntaxError, NameError, TypeError, ImportError, AttributeError) as error:
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
