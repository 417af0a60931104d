"""The configurations of runs that distil a U-Net's self-attentions into GSPN layers, and of those that train a U-Net:
sections of their own beside those that every run has."""

import dataclasses
from typing import Literal, get_args

from gspn_jax.config import MeshConfig, OptimizerConfig, RunConfig, TrainConfig, check_numbers, require, require_one_of
from gspn_jax.text_to_image.gspn_layers import LayerOptions

Start = Literal["teacher", "fresh"]
NetworkStart = Literal["folder", "fresh"]


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """A U-Net, and the layers that take the place of its self-attentions."""

    folder: str = "unset"
    """Folder of Stable Diffusion 1, 2 or SDXL, as diffusers writes it, whose U-Net is teacher and frame."""
    gspn: LayerOptions = LayerOptions()
    start: Start = "teacher"
    """Layers begin with the teacher's to_q, to_k, to_v and to_out where they have them, or all afresh; with init_from
    they are those of a file that `text_to_image export` wrote."""
    unet_sha256: str | None = None
    """Digest of the U-Net's files, by which a run that goes on knows its teacher; None is filled in."""

    def __post_init__(self) -> None:
        require_one_of("model.start", self.start, get_args(Start))


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
    """Images and captions as `python -m gspn_jax.prepare captions` writes them for the same folder."""

    path: str = "unset"


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """A U-Net that is trained."""

    folder: str = "unset"
    """Folder of a model, as diffusers writes it. It has the sizes of the U-Net (unet/config.json), the encoders of
    captions and images, and the scheduler whose noise is trained on."""
    start: NetworkStart = "folder"
    """The weights begin with those of the folder, or all afresh, for which it needs none of the U-Net."""

    def __post_init__(self) -> None:
        require_one_of("model.start", self.start, get_args(NetworkStart))


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Settings of denoising beside the folder's scheduler."""

    caption_dropout: float = 0.1
    """Probability with which a caption is dropped, so that guidance has what to lead away from."""

    def __post_init__(self) -> None:
        check_numbers(self, "diffusion")
        require(0 <= self.caption_dropout < 1, "diffusion.caption_dropout", "in [0, 1)", self.caption_dropout)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of three mean squared errors, as LinFusion and the released code of GSPN have them."""

    noise: float = 1.0
    """Weight of the student's prediction against the noise (or v)."""
    teacher: float = 0.5
    """Weight of the student's prediction against the teacher's."""
    features: float = 0.5
    """Weight of the outputs of the layers against those of the attentions, the mean over all of them."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value >= 0, f"loss.{field.name}", "0 or more", value)
        require(any(dataclasses.astuple(self)), "loss", "some weight greater than 0", dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class LayersConfig(RunConfig):
    """One distillation. `run_dir` receives checkpoints, which hold the GSPN layers alone, and logs."""

    model: StudentConfig = StudentConfig()
    data: CaptionsConfig = CaptionsConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-4)
    train: TrainConfig = TrainConfig(ema_decays=(0.0,))
    mesh: MeshConfig = MeshConfig()

    TASK = "GSPN layers"
    FIXED = (*RunConfig.FIXED, "loss")
    FREE = ("model.folder", "data.path")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mesh.tensor == 1, "mesh.tensor", "1 for distillation", self.mesh.tensor)
        require(self.train.sample_every == 0, "train.sample_every", "0 for distillation", self.train.sample_every)


@dataclasses.dataclass(frozen=True)
class UNetTrainingConfig(RunConfig):
    """Training of a U-Net on images with captions. `run_dir` receives checkpoints and logs."""

    model: NetworkConfig = NetworkConfig()
    data: CaptionsConfig = CaptionsConfig()
    diffusion: NoiseConfig = NoiseConfig()
    mesh: MeshConfig = MeshConfig()

    TASK = "text-to-image U-Net"
    FIXED = (*RunConfig.FIXED, "diffusion")
    FREE = ("model.folder", "data.path")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mesh.tensor == 1, "mesh.tensor", "1 for a U-Net", self.mesh.tensor)
        require(self.train.sample_every == 0, "train.sample_every", "0 for a U-Net", self.train.sample_every)
