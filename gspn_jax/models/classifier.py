"""GSPN-T/S/B of the paper's image classification, as data, and the network around a hierarchy: features or logits."""

import collections
import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gspn_jax.config import Remat
from gspn_jax.models.embeddings import NORMAL
from gspn_jax.models.hierarchy import Backbone, Hierarchy, MixerOptions, Stage, multiply_adds
from gspn_jax.models.parameters import abstract_of, by_path
from gspn_jax.models.scan_mixer import AttentionOptions, LayerNorm, LocalOptions, ScanOptions

_GLOBAL = (None,)
_LOCAL = (2,)


def _hierarchy(width: int, proxy: int, drop_path: float, *chunks: tuple[int | None, ...]) -> Hierarchy:
    """Stages whose width doubles from one to the next."""
    stages = (Stage(width * 2**i, blocks, ScanOptions(proxy)) for i, blocks in enumerate(chunks))
    return Hierarchy(tuple(stages), drop_path)


PRESETS: dict[str, Hierarchy] = {
    "GSPN-T": _hierarchy(96, 8, 0.2, _LOCAL * 2, _LOCAL * 2, _GLOBAL * 7, _GLOBAL * 2),
    "GSPN-S": _hierarchy(108, 16, 0.4, _LOCAL * 5, _LOCAL * 5, _LOCAL * 10, _GLOBAL * 2),
    "GSPN-B": _hierarchy(120, 8, 0.5, _LOCAL * 4, _LOCAL * 4, _GLOBAL * 7 + _LOCAL * 6 + _GLOBAL + _LOCAL, _GLOBAL * 4),
}
"""Settings of the released configs of NVlabs/GSPN a97a4c0; proxies, local scans and drop path are in no paper.

Of the published sizes (30M, 50M and 89M parameters; 5.3, 9.0 and 15.9 GMAC) S's work and B's parameters do not follow
from them: they have 31.3M, 50.0M and 92.5M parameters (with `skip` 31.5M, 50.8M and 93.1M; then 5.2, 11.9, 15.7 GMAC).
"""


MINI = "GSPN-mini"
_MINI_STAGES = ((64, _LOCAL * 2, 4), (128, _GLOBAL * 3, 8))
"""(width, chunks, proxy) of the stages of our own small network, of depthwise 5x5, for images of 32 pixels."""

MIXERS = ("gspn", "attention", "none")
"""Operation by which distant tokens see one another. "attention" and "none" are widened to the parameters of GSPN's
mixer with a proxy of a sixteenth of the width: those of GSPN-mini are equal within 1 %, by our arithmetic and a
test."""


def preset(
    name: str, *, skip: bool = False, released: bool = False, groups: int | None = None,
    drop_path: float | None = None, mixer: str = "gspn", remat: Remat = "none", unroll: bool | None = None,
) -> Hierarchy:  # fmt: skip
    """The hierarchy of a name in PRESETS, or "GSPN-mini", with choices of `ScanOptions` for all of its blocks.

    `released` is the released code's start, and its skip term with it. `drop_path` None is the preset's. `mixer` is one
    of MIXERS. Raises ValueError for an unknown name, and for options of scans without scans.
    """
    if name not in (*PRESETS, MINI):
        raise ValueError(f"The preset must be one of {', '.join((*PRESETS, MINI))}, found {name!r}")
    if mixer not in MIXERS:
        raise ValueError(f"The mixer must be one of {', '.join(MIXERS)}, found {mixer!r}")
    if mixer != "gspn" and (skip or released or groups):
        raise ValueError(f"skip, released and groups are choices of line scans, found a mixer without them: {mixer!r}")
    mini = Hierarchy(tuple(Stage(width, chunks, ScanOptions(s, kernel=5)) for width, chunks, s in _MINI_STAGES))
    hierarchy = PRESETS.get(name, mini)

    def options(of_scans: ScanOptions) -> MixerOptions:
        if mixer == "attention":
            return AttentionOptions(kernel=of_scans.kernel)
        if mixer == "none":
            return LocalOptions(kernel=of_scans.kernel)
        return dataclasses.replace(of_scans, skip=skip or released, released=released, groups=groups)

    stages = tuple(dataclasses.replace(stage, mixer=options(stage.mixer)) for stage in hierarchy.stages)
    drop_path = hierarchy.drop_path if drop_path is None else drop_path
    return dataclasses.replace(hierarchy, stages=stages, drop_path=drop_path, remat=remat, unroll=unroll)


class Head(nnx.Module):
    """Layer norm, mean over the map, linear; in float32. Without classes the mean itself."""

    def __init__(self, width: int, num_classes: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, rngs=rngs)
        self.linear = nnx.Linear(width, num_classes, kernel_init=NORMAL, rngs=rngs) if num_classes else None

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B K"] | Float[Array, "B D"]:
        x = self.norm(x.astype(jnp.float32)).mean((1, 2))
        return x if self.linear is None else self.linear(x)


class Classifier(nnx.Module):
    """Images to logits of `num_classes`, or with 0 classes to the features [B, D] that a linear would read.

    `dtype` is that of the computation; parameters, norms, scan states, head and result are float32.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        *,
        num_classes: int,
        channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.backbone = Backbone(hierarchy, channels=channels, dtype=dtype, rngs=rngs)
        self.head = Head(hierarchy.stages[-1].width, num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "B H W C"], *, features: bool = False, drop_path_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B K"] | tuple[Float[Array, "B h w D"], ...]:
        """Logits; with `features` the maps of all stages instead, as blocks leave them, for detection and segmentation.

        Sizes, drop path and errors are those of `Backbone`.
        """
        maps = self.backbone(images, drop_path_key=drop_path_key)
        return maps if features else self.head(maps[-1])


def count_parameters(hierarchy: Hierarchy, *, num_classes: int, channels: int = 3) -> dict[str, int]:
    """The number of parameters by part ("stem", "down2", "stage1", ..., "head"), without allocating them."""
    _, shapes = abstract_of(lambda rngs: Classifier(hierarchy, num_classes=num_classes, channels=channels, rngs=rngs))
    counts = collections.Counter()
    for path, leaf in by_path(shapes).items():
        top, *inner = path.split("/")
        stage, part = inner[:2]
        down = "stem" if stage == "stage1" else stage.replace("stage", "down")
        counts["head" if top == "head" else stage if part == "blocks" else down] += math.prod(leaf.shape)
    return dict(counts)


def count_multiply_adds(
    hierarchy: Hierarchy, *, num_classes: int, height: int, width: int, channels: int = 3
) -> dict[str, int]:
    """Multiply-adds of one image by part, those of `hierarchy.multiply_adds` and "head"."""
    return multiply_adds(hierarchy, channels, height, width) | {"head": hierarchy.stages[-1].width * num_classes}
