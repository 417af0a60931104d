"""Config files, and the command line that overrides their fields."""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from gspn_jax.config import C, Config, ConfigError


def load_config(path: str | pathlib.Path, cls: type[C] = Config) -> C:
    """The `config` of class `cls` that a config file defines. Raises ConfigError for a file that is missing or defines
    none."""
    path = pathlib.Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py") if p.name != "__init__.py")
        raise ConfigError(
            f"--config must be a config file such as {', '.join(known) or 'configs/digits.py'}, "
            f"found {str(path)!r}, which is no file"
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config must be a Python file, found {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except (
        SyntaxError,
        NameError,
        TypeError,
        ImportError,
        AttributeError,
        LookupError,
        ValueError,
        ArithmeticError,
    ) as error:
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} must define `config = {cls.__name__}(...)`, found {found}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, cls):
        raise ConfigError(f"{path} must define `config = {cls.__name__}(...)`, found {type(config).__name__}")
    return config


def parse_config(argv: Sequence[str] | None, *, program: str, description: str, cls: type[C] = Config) -> C:
    """--config FILE, then any field of it by its dotted name. A wrong flag or value exits with code 2 (tyro)."""
    import tyro  # here, so that training itself needs no command-line package

    first = argparse.ArgumentParser(prog=program, description=description, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(argv)
    if chosen.config is None:
        if "-h" in rest or "--help" in rest:
            print(
                f"usage: {program} --config configs/NAME.py [--FIELD VALUE ...]\n\n{description}\n\n"
                f"`{program} --config configs/digits.py --help` lists every field with its value in that file."
            )
            sys.exit(0)
        raise ConfigError(f"{program} needs --config configs/NAME.py")
    return tyro.cli(
        cls,
        args=rest,
        default=load_config(chosen.config, cls),
        prog=f"{program} --config {chosen.config}",
        description=description,
    )
