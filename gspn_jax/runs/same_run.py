"""Check that a run that goes on is the run that was started: its settings and its data."""

import json
import logging
from typing import Any

from gspn_jax.config import CHANGEABLE, RunConfig, from_dict, to_dict
from gspn_jax.runs.checkpoints import CheckpointError

log = logging.getLogger(__name__)


def check_same_run(meta: dict[str, Any], config: RunConfig, fingerprint: str) -> None:
    """Raises CheckpointError when `config` and the data's `fingerprint` are of another run than a checkpoint's `meta`.

    Saved settings are compared as today's code reads them: a field that was added since has its default, and one that
    was renamed or removed is migrated (`RunConfig.MIGRATIONS`); which may change the config's class says. Raises
    ConfigError for a config that cannot be read.
    """
    allowed = config.train.allow_change
    old = from_dict(meta["config"], type(config))
    saved, now = (flat(json.loads(json.dumps(to_dict(one)))) for one in (old, config))
    changes = {name: f"{name} {saved[name]!r}, found {now[name]!r}" for name in sorted(now) if saved[name] != now[name]}
    for name, change in changes.items():
        if not name.startswith(config.FIXED) or name in config.FREE:
            continue
        if name in config.MOVABLE and None not in (saved[name], now[name]):
            continue
        asked = next((a for a in CHANGEABLE if name not in config.SHAPES and f"{name}.".startswith(f"{a}.")), None)
        if asked is None or asked not in allowed:
            raise CheckpointError(
                f"the run in {config.run_dir} was started with {change}; choose another run_dir to "
                "start a new run" + (f", or go on all the same with --train.allow-change {asked}" if asked else "")
            )
    if changes:
        log.info("going on with other settings than before: was %s", "; was ".join(changes.values()))
    if meta["fingerprint"] != fingerprint:
        said = (
            f"the run in {config.run_dir} was started on data with fingerprint {meta['fingerprint']}, found "
            f"{fingerprint}: the data set has changed"
        )
        if "data" not in allowed:
            raise CheckpointError(
                f"{said}; choose another run_dir to start a new run, or go on all the same with "
                "--train.allow-change data"
            )
        log.warning("%s, as --train.allow-change asks", said)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
