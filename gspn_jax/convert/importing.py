"""A file of weights -> a run directory: of the original DiT, SiT or REPA, or of what `export` wrote."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from gspn_jax import models
from gspn_jax.config import Config, ConfigError, check_numbers, to_dict
from gspn_jax.files import check_new_folder, new_folder
from gspn_jax.runs import averages, checkpoints, manifest, readback, weight_files

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory, to sample and evaluate, of a file of weights."""

    weights: str
    """A checkpoint of the original DiT, SiT or REPA (.pt or .safetensors), or the model.safetensors of an `export`."""
    output: str
    """The run directory to write, which must not exist."""
    step: int | None = None
    """Training steps of a DiT, which its file does not tell: 7000000 for the published one of 256 pixels, 3000000 for
    that of 512; 0 (unknown) by default."""
    heads: int | None = None
    """Attention heads of a DiT whose width and depth are those of no preset."""
    image_size: int | None = None
    """Side of the latents of a DiT whose file has no pos_embed."""
    objective: weight_files.Objective | None = None
    """Objective that a model of DiT's names was trained for: flow for SiT and REPA (linear path, velocity; a file of
    REPA is known by its projectors), ddpm for DiT (the default)."""
    null_row: weight_files.NullRow | None = None
    """Whether the table of classes ends in the null class of guidance, or has none (trained without label dropout).
    Must be given unless the table has DiT's 1,001 rows, whose last is the null class."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, least in (("step", 0), ("heads", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, found {value}")


def import_weights(arguments: Import) -> None:
    """Raises ConfigError, WeightsError or ImportError with one sentence for what cannot be used."""
    output = pathlib.Path(arguments.output)
    check_new_folder(output)
    readback.check_path(output, "--output")
    found = weight_files.read(
        arguments.weights,
        weight_files.Origin(
            step=arguments.step,
            heads=arguments.heads,
            image_size=arguments.image_size,
            objective=arguments.objective,
            null_row=arguments.null_row,
        ),
    )
    config = dataclasses.replace(found.config, run_dir=str(output))
    meta = {
        "config": to_dict(config),
        "notes": {"imported_from": arguments.weights},
        "fingerprint": found.fingerprint,
        "class_names": list(found.class_names),
    }
    with new_folder(output, bytes_needed=sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))) as folder:
        _write_checkpoint(folder, found.step, found.params, config, meta)
    print(
        f"{_described(config)} ({models.count_parameters(config) / 1e6:.1f}M parameters) of step {found.step}, "
        f"{_average(config)}, in {output}: it can be sampled and evaluated, and a new run begins with it by "
        f"--init-from {output}"
    )
    if not found.ours and arguments.objective is None:
        objective = config.diffusion.objective
        log.info("it was taken for a model of %s: a SiT has a DiT's names and needs --objective flow", objective)


def _described(config: Config) -> str:
    """The preset, or where the sizes are those of none, the sizes."""
    found, arch = models.resolve(config.model), models.PRESETS[config.model.preset]
    if (found.hidden, found.depth, found.patch) == (arch.hidden, arch.depth, arch.patch):
        return config.model.preset
    return f"a network of width {found.hidden}, depth {found.depth}, patch {found.patch}"


def _average(config: Config) -> str:
    decay = config.train.ema_decays[0]
    return f"EMA {decay:g}" if decay else "the parameters as the file has them"


def _write_checkpoint(run: pathlib.Path, step: int, params: Any, config: Config, meta: dict[str, Any]) -> None:
    """A checkpoint of nothing but the average, whole with its manifest."""
    where, item = checkpoints.folder(run) / str(step), averages.item(config.train.ema_decays[0])
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            where, args=ocp.args.Composite(**{item: ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)})
        )
    manifest.write(where)
    wrong = readback.difference(where, {item: params})
    if wrong:
        raise checkpoints.CheckpointError(f"the checkpoint that was written cannot be read back: {wrong}")
