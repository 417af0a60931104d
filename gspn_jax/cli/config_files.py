"""Config files, and the command line that overrides their fields."""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from gspn_jax import extras
from gspn_jax.cli import streams, visitors
from gspn_jax.config import C, Config, ConfigError
from gspn_jax.tables import Choice

T = TypeVar("T")

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load_config(name: str | pathlib.Path, cls: type[C] = Config) -> C:
    """The `config` of class `cls` that a config file defines; a bare name, such as "digits", is that of a file of
    `gspn_jax/configs`.

    Raises ConfigError for a file that is missing or defines none.
    """
    path = pathlib.Path(name)
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS.glob("[!_]*.py"))
        if str(name) not in known:
            raise ConfigError(
                f"--config must be a config file or one of {', '.join(known)}, found {str(name)!r}, which is no file"
            )
        path = CONFIGS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config must be a Python file, found {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    found = None
    try:
        with streams.kept(), visitors.held():
            spec.loader.exec_module(module)
            config = getattr(module, "config", None)
            if isinstance(config, cls):
                return config
            found = type(config).__name__
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # it is a program of its own: it may raise anything, or leave
        found = f"{type(error).__name__}: {_said_by(error)}"
        raise ConfigError(f"{path} must define `config = {cls.__name__}(...)`, found {found}") from error
    raise ConfigError(f"{path} must define `config = {cls.__name__}(...)`, found {found}")


def _said_by(error: BaseException) -> str:
    """The first line of an error's message, whose `__str__` may fail as the rest of its file does."""
    try:
        lines = str(error).strip().splitlines()
    except BaseException:
        lines = []
    return lines[0][:300] if lines else "no message"


def parse_config(argv: Sequence[str] | None, *, program: str, description: str, cls: type[C] = Config) -> C:
    """--config FILE, of class `cls` or one made of it, then any field of it by its dotted name. A wrong flag or value
    exits with code 2 (tyro)."""
    extras.require("train", "tyro", by=program)
    first = argparse.ArgumentParser(prog=program, description=description, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(argv)
    if chosen.config is None:
        if "-h" in rest or "--help" in rest:
            print(
                f"usage: {program} --config NAME_OR_FILE [--FIELD VALUE ...]\n\n{description}\n\n"
                f"`{program} --config NAME_OR_FILE --help` lists every field with its value in that config."
            )
            sys.exit(0)
        raise ConfigError(f"{program} needs --config NAME_OR_FILE")
    config = load_config(chosen.config, cls)
    return parse(
        type(config), args=rest, default=config, prog=f"{program} --config {chosen.config}", description=description
    )


def parse(cls: type[T], **settings: Any) -> T:
    """`tyro.cli`, where fields that name a line of a table (`tables.Choice`) offer the names that it has now."""
    import tyro  # here, so that training itself needs no command-line package

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: Any) -> Any:
        if not (isinstance(info.type, type) and issubclass(info.type, Choice)):
            return None
        names = tuple(info.type.table)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(names) + "}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
            choices=names,
        )

    return tyro.cli(cls, registry=registry, **settings)
