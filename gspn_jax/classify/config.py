"""The configuration of a run that trains an image classifier: sections of its own beside those that every run has."""

import dataclasses
from typing import Literal, get_args

from gspn_jax.config import (
    ConfigError,
    DataConfig,
    OptimizerConfig,
    Remat,
    RunConfig,
    SourceName,
    TrainConfig,
    check_numbers,
    require,
    require_fraction,
    require_one_of,
    require_positive,
)

Preset = Literal["GSPN-T", "GSPN-S", "GSPN-B", "GSPN-mini"]
Mixer = Literal["gspn", "attention", "none"]
SMALLEST_CROP = 0.01
"""An image is scaled to its size / crop before the centre is cut out: a smaller one asks for sides without end."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A network of `gspn_jax.models.classifier`: a preset, and what of it is changed."""

    preset: Preset = "GSPN-T"
    mixer: Mixer = "gspn"
    """Operation by which distant tokens see one another: line scans, or for comparison attention or nothing, at about
    equal parameters."""
    drop_path: float | None = None
    """Rate of the last block, of the first 0; None is the preset's."""
    groups: int | None = None
    """Number of sets of propagation weights: None is one per channel (GSPN), 1 is one for all (GSPN-2)."""
    skip: bool = False
    """Adds the per-pixel skip term of the authors' released code (not in the paper)."""
    released: bool = False
    """Starts from the released code's initialisation, and has its skip term."""
    remat: Remat = "none"
    """Values that the backward pass computes again, as in `config.ModelConfig`."""
    unroll: bool | None = None
    """Compiles every block, in place of loops over blocks. None: on GPUs."""

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        require_one_of("model.preset", self.preset, get_args(Preset))
        require_one_of("model.mixer", self.mixer, get_args(Mixer))
        require_one_of("model.remat", self.remat, get_args(Remat))
        drop_path = self.drop_path
        require(drop_path is None or 0 <= drop_path < 1, "model.drop_path", "in [0, 1), or None", drop_path)
        require(self.groups is None or self.groups > 0, "model.groups", "greater than 0 or None", self.groups)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of a training image, in this order; the values are those of Swin's recipe, as of the release's."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """The area of the random crop, as a share of the image's."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    """Probability of a mirror image."""
    rand_layers: int = 2
    """Operations of RandAugment that are drawn for an image; 0 is none."""
    rand_magnitude: float = 9.0
    rand_deviation: float = 0.5
    rand_probability: float = 0.5
    """Probability of each operation that is drawn to be applied."""
    erasing: float = 0.25
    """Probability that a box of the image becomes noise."""
    mixup: float = 0.8
    """Parameter of the Beta distribution of Mixup; 0 leaves it out."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 leaves it out."""
    mix_switch: float = 0.5
    """Probability of CutMix rather than Mixup."""
    mix_probability: float = 1.0
    """Probability that a batch is mixed at all."""
    smoothing: float = 0.1
    """Share of a target that is spread over all classes."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, subtracted from pixels in 0..1."""
    deviation: tuple[float, ...] = IMAGENET_DEVIATION
    """By which they are then divided."""

    def __post_init__(self) -> None:
        check_numbers(self, "augment")
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"augment.{name}", "(low, high) with 0 < low <= high", (low, high))
        require(self.crop_area[1] <= 1, "augment.crop_area", "at most 1", self.crop_area)
        for name in ("flip", "rand_probability", "erasing", "mix_switch", "mix_probability"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", "in [0, 1]", getattr(self, name))
        for name in ("rand_layers", "rand_deviation", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"augment.{name}", "0 or more", getattr(self, name))
        require(0 <= self.rand_magnitude <= 10, "augment.rand_magnitude", "in [0, 10]", self.rand_magnitude)
        require_fraction(self, "augment", "smoothing")
        require(all(value > 0 for value in self.deviation), "augment.deviation", "greater than 0", self.deviation)


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Accuracy on images that are not trained on, of the parameters and of every average, on the mesh that trains."""

    every: int = 0
    """Evaluates every so many steps and at the last; 0 is never."""
    source: SourceName | None = None
    """None is data.source."""
    path: str | None = None
    """The folder of images or records, or the data_dir of tensorflow-datasets."""
    split: str = "validation"
    """Split of a set of tensorflow-datasets."""
    image_size: int | None = None
    """None is data.image_size."""
    crop: float = 0.875
    """The share of the shorter side that is looked at: it is scaled to image_size / crop, and the centre is cut out."""
    batch_size: int = 256
    """Images at a time over all devices."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval")
        require(self.every >= 0, "eval.every", "0 or more", self.every)
        require(SMALLEST_CROP <= self.crop <= 1, "eval.crop", f"from {SMALLEST_CROP} to 1", self.crop)
        require_positive(self, "eval", "batch_size")
        require(self.image_size is None or self.image_size > 0, "eval.image_size", "greater than 0", self.image_size)
        if self.source is not None:
            require_one_of("eval.source", self.source, ("digits", "folder", "records", "tfds"))


def check_view(image_size: int | None, crop: float | None) -> None:
    """Raises ConfigError for flags of what is looked at that no image can be cut to."""
    if image_size is not None and image_size < 1:
        raise ConfigError(f"--image-size must be 1 or more, found {image_size}")
    if crop is not None and not SMALLEST_CROP <= crop <= 1:
        raise ConfigError(f"--crop must be from {SMALLEST_CROP} to 1, found {crop}")


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(RunConfig):
    """One experiment with a classifier. `run_dir` receives checkpoints and logs."""

    model: ClassifierConfig = ClassifierConfig()
    data: DataConfig = DataConfig(source="folder", path="unset", image_size=224, channels=3, num_classes=1000)
    """`image_size` is that of the crops that are trained on; `flip` and `in_memory` are left alone (augment.flip;
    records lie in the page cache)."""
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: ValidationConfig = ValidationConfig()

    TASK = "classification"
    FIXED = (*RunConfig.FIXED, "augment")
    MACHINE = ("model.unroll",)
    FREE = ("model.remat", "model.unroll", "data.path", "data.workers", "data.bad_images")
    SHAPES = ("data.channels", "data.num_classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.data.latents, "data.source", "a set of images", self.data.source)
        require(not self.data.unconditional, "data.unconditional", "False: a classifier tells classes apart", True)
        require(not self.data.flip, "data.flip", "False: augment.flip mirrors images", self.data.flip)
        require(not self.data.in_memory, "data.in_memory", "False: prepare images as records instead", True)
        for name in ("mean", "deviation"):
            values = getattr(self.augment, name)
            require(
                len(values) == self.data.channels,
                f"augment.{name}",
                f"{self.data.channels} numbers, one a channel",
                values,
            )
        if self.eval.every and self.validation.source in ("folder", "records"):
            require(bool(self.eval.path), "eval.path", "the folder of images to evaluate on", self.eval.path)

    @property
    def validation(self) -> DataConfig:
        """The set that is evaluated on."""
        settings = self.eval
        source = settings.source or self.data.source
        return dataclasses.replace(
            self.data,
            source=source,
            path=settings.path or ("unset" if source in ("folder", "records") else None),
            split=settings.split,
            image_size=settings.image_size or self.data.image_size,
            bad_images="error",
        )
