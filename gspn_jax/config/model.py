"""Settings of the network of a run."""

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

from gspn_jax.config.checks import check_numbers, require, require_fraction, require_one_of, require_positive
from gspn_jax.tables import MIXERS, Choice

if TYPE_CHECKING:
    MixerName = str
else:  # the command line offers the table's names as they are when it reads its flags

    class MixerName(Choice):
        table = MIXERS


Layout = Literal["paper", "dit"]
MlpName = Literal["gelu", "swiglu"]
NormName = Literal["layer", "rms"]
Backend = Literal["scan", "reference", "mosaic_gpu"]
Remat = Literal["none", "dots", "names", "full"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A denoiser: a row of `gspn_jax.models.presets.PRESETS`, named by `preset`; a field left None keeps its value.

    `chunk` is the local scan length of each block: an int for all blocks, None for global scans as in the operator,
    "preset" for what the preset says (in the paper layout local 2, the last two blocks global), or a tuple with one int
    or None a block.
    """

    preset: str = "GSPN-B/2"
    layout: Layout | None = None
    mixer: MixerName | None = None
    hidden: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch: int | None = None
    mlp: MlpName | None = None
    """In the DiT layout: two linears around a GELU, or SwiGLU of as many parameters."""
    norm: NormName | None = None
    """In the DiT layout: layer norm without parameters, or RMS norm with a learned scale."""
    qk_norm: bool | None = None
    """RMS norm with a learned scale of the queries and keys of each head of attention."""
    rope: bool | None = None
    """Rotary positions in attention, of rows and of columns, beside the sine-cosine ones that are added."""
    positions: bool | None = None
    """In the DiT layout: adds sine-cosine positions to the tokens. None: where the mixer does not know them, as
    attention. True for one that does, where other weights are those of a model with them (`distill`, `init_from`)."""
    bottleneck: int | None = None
    """Width through which patches are embedded by two linears (JiT); 0 is one linear."""
    chunk: int | None | Literal["preset"] | tuple[int | None, ...] = "preset"  # noqa: RUF036 (tried in this order)
    groups: int | None = None
    """Number of sets of propagation weights: None is one per channel (GSPN), 1 is one for all (GSPN-2)."""
    proxy_ratio: int = 16
    skip: bool = False
    """Adds the per-pixel skip term of the authors' released code (not in the paper)."""
    mixer_options: tuple[str, ...] = ()
    """NAME=VALUE of a mixer that has options beside those above."""
    drop_path: float = 0.1
    learn_sigma: bool | None = None
    """None: two outputs per channel (prediction and variance range) under the "ddpm" objective, one under "flow"."""
    remat: Remat = "none"
    """Values that the backward pass computes again: none, all but the linears, all but what is dear to compute for its
    size (`gspn_jax.models.remat.NAMES`), all. Under mesh.fsdp "none" is "dots"."""
    unroll: bool | None = None
    """Compiles every block of a stack, in place of a loop over its blocks. None: on GPUs, but for samplers."""
    backend: Backend | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        for name in ("hidden", "depth", "heads", "patch", "groups"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", "greater than 0 or None", value)
        require_one_of("model.layout", self.layout, (*get_args(Layout), None))
        require_one_of("model.mixer", self.mixer, (*MIXERS, None))
        require_one_of("model.mlp", self.mlp, (*get_args(MlpName), None))
        require_one_of("model.norm", self.norm, (*get_args(NormName), None))
        require(
            self.bottleneck is None or self.bottleneck >= 0, "model.bottleneck", "0 or more, or None", self.bottleneck
        )
        require_one_of("model.remat", self.remat, get_args(Remat))
        require_one_of("model.backend", self.backend, (*get_args(Backend), None))
        require_positive(self, "model", "proxy_ratio")
        require_fraction(self, "model", "drop_path")
