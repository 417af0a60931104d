"""The weights that a denoiser begins with: of a run, of an import, or of a file."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gspn_jax import models
from gspn_jax.config import Config, ConfigError, from_dict
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints, weight_files
from gspn_jax.training.given import Given, Rows

WEIGHTS = "model.safetensors"
"""The file in a folder that `export` wrote."""
_LABELS = "label_embed/embedding"
_INPUT, _OUTPUT, _MIXERS = "patch_embed/proj/", "final/linear/", r"trunk/\w+/mixer/"
_TIME, _MLPS = "time_embed/", r"trunk/\w+/mlp/"
_SHOWN = 5
"""Names of classes in a line of the table."""


def denoiser_of(path: str, config: Config, class_names: Sequence[str], *, labels: bool) -> Given:
    """The denoiser that `path` names, for a run of `config` on classes of these names; `labels` tells whether its
    condition is a table of them. Of a run it is the first average of the newest whole checkpoint.

    Raises ConfigError, CheckpointError or WeightsError for what cannot be used.
    """
    where = pathlib.Path(path)
    where = where / WEIGHTS if (where / WEIGHTS).is_file() else where
    if where.is_file():
        theirs, rows, said, read = _of_file(where, config, class_names)
    elif where.is_dir():
        theirs, rows, said, read = _of_run(path, class_names)
    else:
        raise ConfigError(f"init_from must be a run directory or a file of weights, found nothing at {path!r}")
    anew = _anew(theirs, config) | ({} if labels else {"label_embed/": "another condition"})
    return Given(
        said, models.abstract(theirs)[1], read, loose=(_INPUT, _OUTPUT, _MIXERS), anew=anew, rows={_LABELS: rows}
    )


def _of_run(path: str, class_names: Sequence[str]) -> tuple[Config, Rows, str, Any]:
    step, meta = checkpoints.read_meta(path)
    try:
        theirs = from_dict(meta["config"])
    except ConfigError as error:
        raise ConfigError(f"init_from {path}: {error}") from error
    decay = theirs.train.ema_decays[0]
    said = f"{path}, step {step}, {f'EMA {decay:g}' if decay else 'the parameters themselves'}"
    said += "; without the projector of its alignment" if theirs.align.features else ""
    rows = class_rows(meta, class_names)
    return theirs, rows, said, lambda mesh: checkpoints.restore_params(path, step, theirs, mesh)


def _of_file(path: pathlib.Path, config: Config, class_names: Sequence[str]) -> tuple[Config, Rows, str, Any]:
    try:
        found = weight_files.read(str(path), weight_files.Origin())
        theirs, wanted = found.config.diffusion.objective, config.diffusion.objective
        if not found.ours and theirs != wanted:
            raise ConfigError(f"it was taken for a model of {theirs}, and a SiT has a DiT's names; found {wanted} here")
    except ConfigError as error:
        raise ConfigError(
            f"init_from {path}: {error} (python -m gspn_jax.convert import takes flags that say it, and makes a run)"
        ) from error
    shapes = models.abstract(found.config)[1]
    said = str(path) + (f", step {found.step}" if found.step else "")
    rows = class_rows(found._asdict(), class_names)
    return found.config, rows, said, lambda mesh: sharding.put(found.params, shapes, mesh)


def _anew(theirs: Config, ours: Config) -> dict[str, str]:
    """Parts whose parameters would mean something else here, whatever their shapes."""
    there, here = models.resolve(theirs.model), models.resolve(ours.model)
    found = {}
    if there.mixer != here.mixer:
        found[_MIXERS] = f"mixer {here.mixer}, {there.mixer} there"
    elif getattr(there.options, "heads", None) != getattr(here.options, "heads", None):
        found[_MIXERS] = f"{here.options.heads} heads, {there.options.heads} there"
    if theirs.diffusion.objective != ours.diffusion.objective:
        found[_OUTPUT] = f"objective {ours.diffusion.objective}, {theirs.diffusion.objective} there"
    if models.spans(theirs) != models.spans(ours):
        found[_TIME] = "times in another unit"
    if there.mlp != here.mlp:
        found[_MLPS] = f"mlp {here.mlp}, {there.mlp} there"
    if there.bottleneck != here.bottleneck:
        found[_INPUT] = f"bottleneck {here.bottleneck}, {there.bottleneck} there"
    return found


def class_rows(about: Mapping[str, Any], ours: Sequence[str]) -> Rows:
    """Rows of a table of classes and the null class, which always goes on; `about` has "class_names" and "fingerprint"
    as they are saved with a checkpoint. A class goes on by its name, or by its number where an import does not know
    names and has as many classes."""
    theirs = about["class_names"]
    known = {name: row for row, name in enumerate(theirs)}
    there = [known.get(name) for name in ours]
    if about["fingerprint"] == weight_files.UNKNOWN and len(theirs) == len(ours):
        there = list(range(len(ours)))
    new = [name for name, row in zip(ours, there, strict=True) if row is None]
    shown = ", ".join(map(repr, new[:_SHOWN])) + (", ..." if len(new) > _SHOWN else "")
    said = f"{len(ours) - len(new)} of {len(ours)} classes and the null class copied"
    return Rows((*there, len(theirs)), said + (f", {len(new)} anew ({shown})" if new else ""))
