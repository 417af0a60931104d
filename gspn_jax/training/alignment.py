"""The task of training a denoiser whose tokens are aligned with features of a frozen network (REPA, arXiv 2410.06940).

Tokens after a block are projected by an MLP and turned towards the features of the clean image at the same place, which
`python -m gspn_jax.prepare features` computed. The projector is trained beside the denoiser and is in none of its
files.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gspn_jax import data, extras, models
from gspn_jax.config import Config, ConfigError, require
from gspn_jax.models.embeddings import XAVIER
from gspn_jax.models.parameters import logical, rngs_of
from gspn_jax.parallel.agreement import on_every_host
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.task import Batch, Metrics

PROJECTOR = "projector"
"""Its name among the parameters."""
EPSILON = 1e-6
"""Least length of a vector that is divided by."""


class Projector(nnx.Module):
    """Three linears with SiLU between them, from the width of tokens to that of features."""

    def __init__(self, width: int, hidden: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        into, out = logical("embed", "mlp"), logical("mlp", "embed")
        make = functools.partial(nnx.Linear, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.fc1 = make(width, hidden, kernel_metadata=into)
        self.fc2 = make(hidden, hidden, kernel_metadata=out)
        self.fc3 = make(hidden, features, kernel_metadata=into)

    def __call__(self, tokens: Float[Array, "B h w D"]) -> Float[Array, "B h w F"]:
        return self.fc3(jax.nn.silu(self.fc2(jax.nn.silu(self.fc1(tokens)))))


class AlignmentTask(DiffusionTask):
    """`DiffusionTask` with `config.align`: the denoiser begins with the weights that it would have without."""

    apart = (PROJECTOR,)

    def __init__(self, config: Config):
        super().__init__(config)
        settings = config.align
        if settings.features is None:
            raise ConfigError("align.features must be a folder of `python -m gspn_jax.prepare features`, found None")
        if models.spans(config):
            raise ConfigError(
                f"align.features must be None with diffusion.objective={config.diffusion.objective!r}, which "
                f"differentiates the denoiser by its times, found {settings.features!r}"
            )
        require(
            settings.depth <= self._arch.blocks,
            "align.depth",
            f"a number of blocks of the model, 1 to {self._arch.blocks}",
            settings.depth,
        )
        require(
            config.data.latents or config.data.bad_images == "error",
            "data.bad_images",
            "'error' with align.features: an image that takes another's place has not its features",
            config.data.bad_images,
        )
        extras.require("train", "array_record", by="align.features")
        from gspn_jax.data.features import FeatureSet

        # here, where hosts can speak to one another: not in a function that is traced
        self._features = on_every_host(lambda: FeatureSet(settings.features))

    # --- parameters
    @functools.cached_property
    def _projector(self) -> tuple[nnx.GraphDef, Any]:
        return models.abstract_of(self._build_projector)

    def _build_projector(self, rngs: nnx.Rngs) -> Projector:
        width = self._features.metadata.shape[-1]
        return Projector(self._arch.hidden, self.config.align.hidden, width, dtype=self.config.train.compute, rngs=rngs)

    @property
    def shapes(self) -> Any:
        return super().shapes | {PROJECTOR: self._projector[1]}

    def init(self, key: Key[Array, ""]) -> Any:
        projector = self._build_projector(rngs_of(jax.random.fold_in(key, 1)))
        return super().init(key) | {PROJECTOR: models.split(projector)[1]}

    # --- a step
    def loss(self, params: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """Loss of the objective plus `align.weight` times (1 - alignment), the mean cosine of the projected tokens and
        the batch's "features" float16 [B, h, w, D]."""
        settings = self.config.align
        block = settings.depth - 1
        label_key, noise_key, path_key = jax.random.split(key, 3)
        network = {name: part for name, part in params.items() if name != PROJECTOR}
        inner, seen = self.denoiser(network, path_key), []

        def denoise(x, t, condition, features=()):
            output, tokens = inner(x, t, condition, features=tuple({*features, block}))
            seen.append(tokens[block])
            return (output, {i: tokens[i] for i in features}) if features else output

        losses, metrics = self.losses(denoise, batch, label_key, noise_key)
        (tokens,) = seen  # an objective evaluates the denoiser once
        projected = nnx.merge(self._projector[0], params[PROJECTOR])(tokens)
        alignment = cosine(projected, batch["features"]).mean()
        metrics = {name: value.mean() for name, value in metrics.items()}
        metrics |= {"data_loss": losses.mean(), "alignment": alignment}
        return losses.mean() + settings.weight * (1 - alignment), metrics

    def forward_flops(self) -> float:
        """With those of the projector."""
        height, width, features = self._features.metadata.shape
        hidden = self.config.align.hidden
        each = hidden * (self._arch.hidden + hidden + features)
        return super().forward_flops() + 2 * height * width * each

    def image_bytes(self) -> int:
        return super().image_bytes() + self._features.bytes

    # --- data
    def source(self) -> data.Source:
        """Raises ConfigError for features of other images than those that are trained on."""
        from gspn_jax.data.features import Featured

        self._features.check(self._source, self.config.data, self.config.data.image_size // self._arch.patch)
        return Featured(self._source, self._features)

    def loader(self, source: Any, **place: int) -> data.Loader:
        batch_size = self.config.train.batch_size
        return data.make_loader(
            self.config.data, source.images, batch_size=batch_size, features=source.features, **place
        )

    def describe(self, source: data.Source) -> str:
        about, settings = self._features.metadata, self.config.align
        return (
            f"{super().describe(source)}, aligned with {about.network} after block {settings.depth} of "
            f"{self._arch.blocks} (weight {settings.weight:g})"
        )


def cosine(ours: Float[Array, "B h w F"], theirs: Float[Array, "B h w F"]) -> Float[Array, "B h w"]:
    """Cosine of the angle between two vectors at each place, in float32; 0 where one is zero."""

    def unit(x):
        x = x.astype(jnp.float32)
        square = jnp.square(x).sum(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, EPSILON**2))

    return (unit(ours) * unit(theirs)).sum(-1)
