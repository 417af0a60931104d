"""A config as it is saved with every checkpoint, and read again by this version or a later one."""

import dataclasses
from typing import Any, TypeVar

from gspn_jax.config.checks import ConfigError, require
from gspn_jax.config.run import Config, RunConfig, Values

C = TypeVar("C", bound=RunConfig)


def to_dict(config: RunConfig) -> Values:
    """The config as plain JSON values, as it is saved with every checkpoint; without what belongs to the machine."""
    values: Values = dataclasses.asdict(config)
    for name in config.MACHINE:
        section, field = name.split(".")
        del values[section][field]
    return {"task": config.TASK, "version": config.VERSION} | values


def task_of(values: Values) -> str:
    """The task of a saved config; those of before there was a second one say none."""
    return values.get("task", Config.TASK)


def from_dict(values: Values, cls: type[C] = Config) -> C:
    """The inverse of `to_dict` for configs of the class `cls`, also after a trip through JSON (lists become tuples
    again), and of what versions before this one saved. A field that is not there has its default.

    Raises ConfigError for the config of another task, for a field that does not exist, such as one written by a later
    version, and for other damage.
    """
    try:
        task = task_of(values)
        require(task == cls.TASK, "the task of the run", repr(cls.TASK), task)
        version = values.get("version", 1)
        require(
            isinstance(version, int) and 1 <= version <= cls.VERSION,
            "the version of the saved config",
            f"1 to {cls.VERSION}, which this program reads",
            version,
        )
        for old in range(version, cls.VERSION):
            values = cls.MIGRATIONS[old](values)
        return _build(cls, {name: value for name, value in values.items() if name not in ("task", "version")}, "config")
    except ConfigError:
        raise
    except (TypeError, AttributeError, ValueError) as error:  # values of another type do not compare
        raise ConfigError(f"the saved config must be one that to_dict gives, found other values ({error})") from error


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    require(isinstance(values, dict), where, "a group of fields", values)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        require(name in fields, f"{where}.{name}", "one of " + ", ".join(fields), name)
    built = {}
    for name, value in values.items():
        kind = fields[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            value = _build(kind, value, name)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
