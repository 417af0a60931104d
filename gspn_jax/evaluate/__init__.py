"""FID and the other metrics of samples, by the protocol of the ADM evaluator (docs/evaluation.md).

python -m gspn_jax.evaluate --run runs/gspn_xl_2 --vae VAE --reference REF.npz --inception INCEPTION.pth
                                                    draws from a checkpoint and scores in one pass, without files
python -m gspn_jax.evaluate --run ... --guidance-scales 1 1.25 1.5 2
                                                    the same for each guidance scale, with a plot
python -m gspn_jax.evaluate --samples samples.npz --reference REF.npz --inception INCEPTION.pth
                                                    scores an .npz (arr_0) or a folder of images
python -m gspn_jax.evaluate --samples IMAGES --metrics clip --networks clip=CLIP
                                                    the CLIP score of images and their captions (docs/text_to_image.md)
python -m gspn_jax.evaluate --self-test --inception INCEPTION.pth
                                                    checks this machine and a file of weights
python -m gspn_jax.evaluate --plot runs/a runs/b --output fid.png
                                                    FID against training images seen, or --against guidance
"""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

from gspn_jax import cli, extras
from gspn_jax.config import Config, ConfigError

if TYPE_CHECKING:
    from gspn_jax.evaluate.runs import RunFlags

PROGRAM = "python -m gspn_jax.evaluate"
FAILED = 1
"""Exit code of a self-test that something did not pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Checks the features of this machine against stored ones and, with --inception, a file of weights."""

    inception: str | None = None
    """The weights to check (.pth, or .safetensors)."""
    record: str | None = None
    """Write the features of fixed images to this .npz."""
    compare: str | None = None
    """Compare with what --record wrote, such as on another machine or with another version."""

    def __post_init__(self) -> None:
        for name in ("record", "compare"):
            if getattr(self, name) and not self.inception:
                raise ConfigError(f"--{name} is of a file of weights, found no --inception")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Draws results against the images seen in training, or against the guidance scale."""

    paths: tuple[str, ...]
    """Run directories, or files that an evaluation wrote."""
    against: Literal["images", "guidance"] = "images"
    output: str = "fid.png"
    """The picture (.png, .svg or .pdf); one that exists is not overwritten."""


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("eval", "tyro", by=PROGRAM)
    import tyro

    argv = cli.words(argv)
    cli.setup()
    from gspn_jax.data import DataError
    from gspn_jax.parallel.agreement import on_every_host
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run")
    first.add_argument("--step", type=int)
    first.add_argument("--samples")
    first.add_argument("--self-test", action="store_true")
    first.add_argument("--plot", nargs="+")
    with cli.user_errors(DataError, CheckpointError, WeightsError, ImportError):
        chosen, rest = first.parse_known_args(argv)
        kinds = [name for name in ("run", "samples", "self_test", "plot") if getattr(chosen, name)]
        if not kinds and (not argv or "-h" in rest or "--help" in rest):
            print(__doc__)
            return
        if len(kinds) != 1:
            given = " and ".join(f"--{name.replace('_', '-')}" for name in kinds) or "none of them"
            raise ConfigError(f"one of --run, --samples, --self-test and --plot must be given, found {given}")
        if chosen.self_test:
            _self_test(tyro.cli(SelfTest, args=rest, prog=f"{PROGRAM} --self-test"))
        elif chosen.plot:
            from gspn_jax.evaluate.plots import draw

            flags = tyro.cli(Plot, args=rest, default=Plot(paths=tuple(chosen.plot)), prog=f"{PROGRAM} --plot")
            print(draw(flags.paths, flags.against, flags.output))
        elif chosen.samples:
            from gspn_jax.evaluate.files import FileFlags, evaluate_files

            rest, default = cli.join_other_hosts(rest), FileFlags(samples=chosen.samples)
            program = f"{PROGRAM} --samples {chosen.samples}"
            evaluate_files(on_every_host(lambda: cli.parse(FileFlags, args=rest, default=default, prog=program)))
        else:
            from gspn_jax.evaluate.runs import evaluate_run

            rest = cli.join_other_hosts(rest)
            evaluate_run(*on_every_host(lambda: _of_run(chosen, rest)))


def _of_run(chosen: argparse.Namespace, rest: list[str]) -> "tuple[RunFlags, Config, int]":
    """The flags of --run (defaults from the checkpoint's config), that config, and the step."""
    from gspn_jax.evaluate.runs import RunFlags
    from gspn_jax.runs import checkpoints

    step, config = checkpoints.read_config(chosen.run, chosen.step)
    default = RunFlags(run=chosen.run, step=step, sampler=config.sampler)
    return cli.parse(RunFlags, args=rest, default=default, prog=f"{PROGRAM} --run {chosen.run}"), config, step


def _self_test(flags: SelfTest) -> None:
    """Prints each check as it is done; exits with `FAILED` when one did not pass."""
    from gspn_jax.metrics import inception, self_test

    def shown(check: self_test.Check) -> bool:
        print({True: "ok    ", False: "FAILED", None: "note  "}[check.passed], check.text, flush=True)
        return check.passed is not False

    passed = [shown(self_test.check_machine())]
    if flags.inception:
        path = inception.file_of(inception.require(flags.inception, "--inception"))
        passed += [shown(check) for check in self_test.check_file(path, record=flags.record, compare=flags.compare)]
    else:
        print("note   no file of weights was checked: --inception names one")
    if not all(passed):
        sys.exit(FAILED)
