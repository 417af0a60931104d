"""Plans a run for GPUs that need not be at hand: what fits their memory, and the hours and the disk that it takes.

python -m gspn_jax.plan --config gspn_b_2 --gpu "RTX 4090"
python -m gspn_jax.plan --config gspn_xl_2 --gpu H100 --gpus 8 --share 0.3 --train.batch-size 1024
python -m gspn_jax.plan --table                 the table of README.md

Any field of the config is a flag. Memory is the state, exact from shapes and shardings, and a formula for the rest that
was fitted to the compiler's counts; hours are arithmetic at a share of the peak that is assumed. Nothing is measured.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator

from gspn_jax import cli
from gspn_jax.config import Config, ConfigError

PROGRAM = "python -m gspn_jax.plan"
USABLE = 0.9
"""Part of a GPU's memory that is planned with; JAX takes 0.75 by default."""
SHARE = 0.2
"""Part of the peak that a step is assumed to reach: one H100 was measured at 0.235 with GSPN-XL/2."""
RECOMPUTED = {"full": 4 / 3}
"""Operations of a step with a remat, relative to those that MFU counts."""
FEW = 8
"""Images at a time below which a device is hardly busy: more are taken where they fit, even for more recomputation."""
IMAGENET = 1_281_167


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One way to make a step: `images` of each micro-batch are on a device."""

    remat: str
    data: int
    fsdp: int
    accumulate: int
    images: int
    state: float
    rest: float

    @property
    def memory(self) -> float:
        return self.state + self.rest

    @property
    def cost(self) -> tuple:
        """Order of options: enough images, then least recomputation, state that is not split, least micro-batches."""
        recomputed = RECOMPUTED.get(self.remat, 1.0)
        return self.images < FEW and self.accumulate > 1, recomputed, self.fsdp, self.accumulate

    @property
    def flags(self) -> str:
        found = f"--model.remat {self.remat} --train.accumulate {self.accumulate}"
        return found + (f" --mesh.fsdp {self.fsdp}" if self.fsdp > 1 else "")


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    cli.setup()
    argv = cli.words(argv)
    first = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    first.add_argument("--gpu")
    for name, default in (("gpus", 1), ("images", None), ("share", SHARE), ("usable", USABLE)):
        first.add_argument(f"--{name}", default=default)
    with cli.user_errors():
        chosen, rest = first.parse_known_args(argv)
        if not rest or rest[0] in ("-h", "--help"):
            print(__doc__)
            return
        if rest == ["--table"]:
            print(table())
            return
        if chosen.gpu is None:
            raise ConfigError(f'{PROGRAM} needs --gpu NAME, such as "RTX 4090"')
        gpus, images = _whole(chosen.gpus, "--gpus"), chosen.images and _whole(chosen.images, "--images")
        share, usable = (_part(getattr(chosen, name), f"--{name}") for name in ("share", "usable"))
        config = cli.parse_config(rest, program=PROGRAM, description=__doc__)
        print(report(config, chosen.gpu, gpus, share=share, usable=usable, images=images))


def _whole(text: str | int, flag: str) -> int:
    from gspn_jax.config import whole_number

    found = whole_number(str(text))
    if not found:
        raise ConfigError(f"{flag} must be a whole number from 1 on, found {text!r}")
    return found


def _part(text: str | float, flag: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found <= 1:
        raise ConfigError(f"{flag} must be greater than 0 and at most 1, found {text!r}")
    return found


def options(config: Config, gpus: int) -> Iterator[Option]:
    """All ways to make the config's step on so many GPUs, by the formula."""
    from gspn_jax.plan import memory

    batch = config.train.batch_size
    for fsdp in (count for count in range(1, gpus + 1) if gpus % count == 0):
        data = gpus // fsdp
        state = memory.state_on(config, data, fsdp)
        for accumulate in (count for count in range(1, batch // gpus + 1) if batch % (count * gpus) == 0):
            images = batch // (gpus * accumulate)
            for remat in memory.remats(config):
                need = memory.needed(config, state, remat, images, accumulate)
                yield Option(
                    remat=remat,
                    data=data,
                    fsdp=fsdp,
                    accumulate=accumulate,
                    images=images,
                    state=need.state,
                    rest=need.rest,
                )


def choose(config: Config, gpu: str, gpus: int, usable: float = USABLE) -> tuple[Option, list[Option]]:
    """(the option to take, the one with most images at a time of each remat and mesh that fits).

    Raises ConfigError for a batch that GPUs cannot share, and when nothing fits.
    """
    from gspn_jax.plan.gpus import gpu_named

    name, size, _ = gpu_named(gpu)
    if config.train.batch_size % gpus:
        raise ConfigError(f"train.batch_size must be a multiple of the {gpus} GPUs, found {config.train.batch_size}")
    found = list(options(config, gpus))
    fitting = [option for option in found if option.memory <= usable * size]
    if not fitting:
        least = min(found, key=lambda option: option.memory)
        raise ConfigError(
            f"{config.model.preset} must fit into {usable:.0%} of the {size / 1e9:.1f} GB of {_count(gpus, name)}, "
            f"found that a step takes at least {least.memory / 1e9:.1f} GB of each ({least.flags})"
        )
    widest: dict[tuple[str, int], Option] = {}
    for option in sorted(fitting, key=lambda option: -option.images):
        widest.setdefault((option.remat, option.fsdp), option)
    return min(fitting, key=lambda option: option.cost), list(widest.values())


def _count(gpus: int, name: str) -> str:
    return f"{gpus} x {name}" if gpus > 1 else f"one {name}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def hours(config: Config, peak: float, gpus: int, option: Option, share: float) -> tuple[float, float]:
    """(seconds of a step, hours of the run) at a share of the peak of all GPUs; recomputation counts."""
    from gspn_jax.training.diffusion import DiffusionTask

    operations = 3 * config.train.batch_size * DiffusionTask(config).forward_flops()
    seconds = operations * RECOMPUTED.get(option.remat, 1.0) / (share * peak * gpus)
    return seconds, seconds * config.train.steps / 3600


def disk(config: Config, images: int | None) -> list[tuple[str, float, str]]:
    """(what, bytes, how it is counted) of what a run has on the disk."""
    import jax

    from gspn_jax.data.latents import record_type
    from gspn_jax.plan import memory
    from gspn_jax.runs.saving import LATEST

    state, train = memory.state_on(config, 1, 1), config.train
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    kept = LATEST + 1 + (train.steps // train.keep_every if train.keep_every else 0)
    rows = [
        ("a checkpoint", size, "parameters, optimizer and averages in float32"),
        ("checkpoints", kept * size, f"{kept}: the latest {LATEST}, one being written, those of train.keep_every"),
    ]
    if train.snapshot_every:
        each = 4 * len(train.ema_widths) * sum(leaf.size for leaf in jax.tree.leaves(state.params))
        count = train.steps // train.snapshot_every
        rows.append(("snapshots", count * each, f"{count} of {len(train.ema_widths)} averages"))
    if config.data.latents:
        count = images or (IMAGENET if config.data.num_classes == 1000 else None)
        shape = (config.data.image_size, config.data.image_size, config.data.channels)
        each = record_type(shape, config.data.flip).itemsize
        said = f"{count:,} records of {each:,} bytes" if count else f"{each:,} bytes an image; --images says how many"
        rows.append(("latents", (count or 1) * each, said))
    return rows


def report(
    config: Config, gpu: str, gpus: int, *, share: float = SHARE, usable: float = USABLE, images: int | None = None
) -> str:
    """The plan as text. Raises ConfigError for what is not known or does not fit."""
    from gspn_jax import models
    from gspn_jax.plan import memory
    from gspn_jax.plan.gpus import gpu_named

    name, size, peak = gpu_named(gpu)
    taken, widest = choose(config, gpu, gpus, usable)
    seconds, run = hours(config, peak, gpus, taken, share)
    arch = models.resolve(config.model)
    fit = memory.FITTED[arch.mixer, taken.remat]
    lines = [
        f"{config.model.preset} ({models.count_parameters(config) / 1e6:.1f}M parameters), {config.train.batch_size:,} "
        f"images a step, on {_count(gpus, name)} of {size / 1e9:.1f} GB",
        "",
        f"take    {taken.flags}",
        f"        mesh {taken.data} x {taken.fsdp}, {taken.images:,} images at a time on each GPU",
        f"memory  {taken.memory / 1e9:.1f} GB of each: {taken.state / 1e9:.2f} state, {taken.rest / 1e9:.1f} gradients "
        f"and activations (by the formula)",
        f"        fitted to {_many(fit.programs, 'compiled program')}, {fit.error:.1%} from them at most",
        f"        XLA_PYTHON_CLIENT_MEM_FRACTION={usable:g} lets JAX have it" if taken.memory > 0.75 * size else "",
        f"time    {seconds:.3g} s a step, {run:,.1f} hours for {config.train.steps:,} steps, at {share:.0%} of "
        f"{peak / 1e12:.0f} TFLOP/s: assumed",
        *(f"disk    {what} {bytes_ / 1e9:,.1f} GB: {how}" for what, bytes_, how in disk(config, images)),
        "",
        "most images at a time that fit:",
        *(
            f"        remat {one.remat:6} mesh {one.data} x {one.fsdp}  {one.images:5,} images, accumulate "
            f"{one.accumulate}: {one.memory / 1e9:.1f} GB"
            for one in sorted(widest, key=lambda one: one.cost)
        ),
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or lines[i - 1])


TABLE_GPUS = (
    ("RTX 4080", 1),
    ("RTX 4090", 1),
    ("RTX 4090", 2),
    ("RTX 5090", 1),
    ("A100 80GB", 1),
    ("H100", 1),
    ("H100", 8),
)
TABLE_CONFIGS = ("gspn_b_2", "gspn_l_2", "gspn_xl_2", "dit_xl_2")


def table() -> str:
    """Markdown: a row for each of some GPUs, a column for each of the ImageNet-256 configs."""
    from gspn_jax.plan.gpus import gpu_named

    configs = [cli.load_config(name) for name in TABLE_CONFIGS]
    head = " | ".join(config.model.preset for config in configs)
    lines = [f"| GPUs | {head} |", "|---" * (1 + len(configs)) + "|"]
    for gpu, count in TABLE_GPUS:
        cells = []
        for config in configs:
            try:
                taken, _ = choose(config, gpu, count)
            except ConfigError:
                cells.append("does not fit")
                continue
            days = hours(config, gpu_named(gpu)[2], count, taken, SHARE)[1] / 24
            split = f", fsdp {taken.fsdp}" if taken.fsdp > 1 else ""
            batch = f"{taken.images} x {taken.accumulate}, {taken.remat}{split}"
            cells.append(f"{batch}: {taken.memory / 1e9:.0f} GB, {days:.2g} days")
        lines.append(f"| {count} x {gpu} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
