"""Pictures of results: FID against the images seen in training, FID and Inception score against guidance, or what else
was measured where neither was.

Only results that can be compared are joined by a line: of as many samples, drawn and scored alike.
"""

import collections
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gspn_jax import extras
from gspn_jax.config import ConfigError
from gspn_jax.diffusion.samplers import sampler_name
from gspn_jax.evaluate.report import DRAWN, average, label, read_result
from gspn_jax.runs import checkpoints
from gspn_jax.small_files import DamagedFile, read_lines

log = logging.getLogger(__name__)

Against = Literal["images", "guidance"]

AXIS = {"images": "training images seen", "guidance": "guidance scale"}
_DRAWN = {"images": ("fid",), "guidance": ("fid", "is")}
_FORMATS = (".png", ".svg", ".pdf")


class Point(NamedTuple):
    line: str
    """Settings that all points of a line have in common; its label."""
    x: float
    metrics: Mapping[str, float]


def draw(paths: Sequence[str | pathlib.Path], against: Against, output: str | pathlib.Path) -> str:
    """Draws what is found at `paths`: run directories, or files that an evaluation wrote. Returns a line that says so.

    Raises ConfigError for an output that exists or is of another kind, and without points; MissingExtra without
    matplotlib.
    """
    output = pathlib.Path(output)
    if output.suffix not in _FORMATS or not output.parent.is_dir() or output.exists():
        raise ConfigError(
            f"--output must be a new {', '.join(_FORMATS)} file in a folder that exists, found {str(output)!r}"
        )
    points = [point for path in map(pathlib.Path, paths) for point in _points_at(path, against)]
    if not any("fid" in point.metrics for point in points):
        raise ConfigError(
            f"--plot must name run directories or JSON files with FID of a run's samples, found none in "
            f"{', '.join(map(str, paths))}"
        )
    return _draw(points, against, output)


def draw_results(results: Iterable[Mapping[str, Any]], against: Against, output: pathlib.Path) -> str:
    """Draws results that are at hand; where it cannot be drawn, the line returned says why."""
    points = [_point(result, against) for result in results]
    try:
        return _draw(points, against, output)
    except ConfigError as error:
        return f"no picture: {error}"


def _points_at(path: pathlib.Path, against: Against) -> list[Point]:
    """Those of a JSON file, or of a run: its evaluations and, against images, what it logged while it trained."""
    if path.is_file():
        return [_point(_read(path), against)]
    if not path.is_dir():
        raise ConfigError(f"--plot must name run directories or JSON files of evaluations, found nothing at {path}")
    points = [_point(_read(file), against) for file in sorted((path / "evaluation").glob("*.json"))]
    return points + (_logged(path) if against == "images" else [])


def _logged(run: pathlib.Path) -> list[Point]:
    """The evaluations during training that metrics.jsonl tells of, drawn as the latest checkpoint's config says."""
    lines, wrong = read_lines(run / "metrics.jsonl", {"step": int, "eval/fid": float | None})
    if wrong:
        log.warning("%d lines of %s are left out: %s", len(wrong), run / "metrics.jsonl", wrong[0])
    evaluated = [line for _, line in lines if line["eval/fid"] is not None]
    if not evaluated:
        return []
    config = checkpoints.read_config(run)[1]
    wanted, sampler = config.eval, config.sampler
    ema = config.train.ema_decays[0] if wanted.ema is None else wanted.ema
    guidance = sampler.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale
    name = _label(
        run.resolve().name,
        "in training",
        average({"ema_decay": ema}),
        sampler_name(sampler, config.diffusion),
        wanted.steps or sampler.steps,
        f"guidance {guidance:g}",
        wanted.num_samples,
    )
    return [Point(name, line["step"] * config.train.batch_size, {"fid": line["eval/fid"]}) for line in evaluated]


def _label(run: str, when: str, ema: str, sampler: str, steps: int, guidance: str, count: int) -> str:
    parts = (run, when, ema, f"{sampler} {steps} steps", guidance, f"{count:,} samples")
    return ", ".join(part for part in parts if part)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_result(path, DRAWN)
    except DamagedFile as error:
        raise ConfigError(f"{path} must be the result of an evaluation of a run's samples, but {error}") from error


def _point(result: Mapping[str, Any], against: Against) -> Point:
    samples = result["samples"]
    sampler = samples["sampler"]
    images = against == "images"
    line = _label(
        pathlib.Path(samples["run"]).resolve().name,
        "" if images else f"step {samples['step']:,}",
        average(samples),
        sampler["name"],
        sampler["steps"],
        f"guidance {sampler['guidance_scale']:g}" if images else "",
        samples["count"],
    )
    return Point(line, samples["images_seen"] if images else sampler["guidance_scale"], result["metrics"])


def _draw(points: Sequence[Point], against: Against, output: pathlib.Path) -> str:
    extras.require("plot", "matplotlib", by="drawing")
    from matplotlib.figure import Figure

    found = list(dict.fromkeys(name for point in points for name in point.metrics))
    names = [name for name in _DRAWN[against] if name in found] or found
    lines: dict[str, list[Point]] = collections.defaultdict(list)
    for point in points:
        lines[point.line].append(point)
    figure = Figure(figsize=(6 * len(names), 4.5), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for title, line in lines.items():
            drawn = sorted((point.x, point.metrics[name]) for point in line if name in point.metrics)
            axes.plot(*zip(*drawn, strict=True), marker="o", label=title)
        axes.set_xlabel(AXIS[against])
        axes.set_ylabel(label(name))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(output, dpi=150)
    return f"{len(points)} results drawn in {output}"
