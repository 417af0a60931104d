"""Settings of other networks that a denoiser learns from: features to align with, a teacher."""

import dataclasses

from gspn_jax.config.checks import check_numbers, put_homes, require, require_positive


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Alignment of tokens with features of a frozen network (REPA, arXiv 2410.06940), whose settings are the
    defaults."""

    features: str | None = None
    """The folder of features of the images that are trained on, which `gspn_jax.prepare features` wrote. None aligns
    nothing."""
    depth: int = 8
    """Blocks after which tokens are projected and compared."""
    weight: float = 0.5
    """Weight of 1 - cosine beside the objective's loss."""
    hidden: int = 2048
    """Width of the projector, an MLP of three linears that is trained beside the denoiser and in none of its files."""

    def __post_init__(self) -> None:
        check_numbers(self, "align")
        put_homes(self, "features")
        require(self.features != "", "align.features", "a folder of features, or None", self.features)
        require_positive(self, "align", "depth", "hidden")
        require(self.weight >= 0, "align.weight", "0 or more", self.weight)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher, a trained denoiser of the same images and classes."""

    teacher: str | None = None
    """Run directory of the teacher, whose first average is taken; a new run begins with those of its weights that fit,
    unless `init_from` names others. None is no teacher."""
    step: int | None = None
    """Checkpoint of the teacher; None is the newest."""
    prediction_weight: float = 1.0
    """Weight of the mean squared distance from its prediction."""
    features: tuple[int, ...] = ()
    """Numbers of blocks, from 0, whose tokens are compared as well."""
    feature_weight: float = 1.0
    """Weight of that distance, which is relative to the mean square of the teacher's tokens."""
    data_weight: float = 0.0
    """Weight of the objective's own loss."""

    def __post_init__(self) -> None:
        check_numbers(self, "distill")
        put_homes(self, "teacher")
        require(self.teacher != "", "distill.teacher", "a run directory, or None", self.teacher)
        require(all(i >= 0 for i in self.features), "distill.features", "numbers of blocks from 0", self.features)
        for name in ("prediction_weight", "feature_weight", "data_weight"):
            require(getattr(self, name) >= 0, f"distill.{name}", "0 or more", getattr(self, name))
