"""The names that a config can say, each once: tables of sources, mixers, objectives, samplers, metrics, networks.

A line of a table is what the name stands for, or where that is ("module:name"), which is imported when it is first
asked for: the names are known to configs, to the command line and to errors without what stands behind them. To add
something of one's own, write it and add a line, before the config that names it is built:

    from gspn_jax.tables import SAMPLERS
    SAMPLERS["mine"] = SamplerKind(...)
"""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any


class Table(MutableMapping[str, Any]):
    """Names in the order in which they are offered, and what they stand for."""

    def __init__(self, lines: dict[str, Any]):
        self._lines = dict(lines)

    def __getitem__(self, name: str) -> Any:
        line = self._lines[name]
        if isinstance(line, str):
            module, _, attribute = line.partition(":")
            line = importlib.import_module(module)
            line = self._lines[name] = getattr(line, attribute) if attribute else line
        return line

    def __setitem__(self, name: str, line: Any) -> None:
        self._lines[name] = line

    def __delitem__(self, name: str) -> None:
        del self._lines[name]

    def __contains__(self, name: object) -> bool:
        return name in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


class _OfStrings(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, str)


class Choice(str, metaclass=_OfStrings):
    """The type of a field of a config that names a line of its `table`; values are plain strings."""

    table: Table


SOURCES = Table(
    {
        "digits": "gspn_jax.data.sources:DIGITS",
        "folder": "gspn_jax.data.sources:FOLDER",
        "records": "gspn_jax.data.sources:RECORDS",
        "tfds": "gspn_jax.data.sources:TFDS",
        "latents": "gspn_jax.data.sources:LATENTS",
    }
)
"""`data.source`: `data.sources.Kind`s."""

MIXERS = Table(
    {
        "attention": "gspn_jax.models.mixers:AttentionOptions",
        "gspn": "gspn_jax.models.mixers:GSPNOptions",
        "compressed_gspn": "gspn_jax.models.compressed_gspn:CompressedOptions",
        "convolution": "gspn_jax.models.convolution:ConvolutionOptions",
        "linear_attention": "gspn_jax.models.linear_attention:LinearAttentionOptions",
        "gated_linear_attention": "gspn_jax.models.gated_linear_attention:GatedLinearAttentionOptions",
    }
)
"""`model.mixer`: classes of `models.mixers.MixerOptions`."""

OBJECTIVES = Table(
    {
        "ddpm": "gspn_jax.diffusion.objectives:EPSILON",
        "flow": "gspn_jax.diffusion.objectives:VELOCITY",
        "x_prediction": "gspn_jax.diffusion.objectives:CLEAN",
        "mean_flow": "gspn_jax.diffusion.objectives:MEAN_VELOCITY",
    }
)
"""`diffusion.objective`: `diffusion.objectives.Objective`s."""

SAMPLERS = Table(
    {
        "ddpm": "gspn_jax.diffusion.samplers:DDPM",
        "ddim": "gspn_jax.diffusion.samplers:DDIM",
        "dpm++": "gspn_jax.diffusion.samplers:DPM_SOLVER",
        "euler": "gspn_jax.diffusion.samplers:EULER",
        "heun": "gspn_jax.diffusion.samplers:HEUN",
        "sde": "gspn_jax.diffusion.samplers:SDE",
        "mean_flow": "gspn_jax.diffusion.samplers:MEAN_FLOW",
    }
)
"""`sampler.name`: `diffusion.samplers.SamplerKind`s."""

STABLE_DIFFUSION_SAMPLERS = Table(
    {
        "euler": "gspn_jax.diffusion.stable_diffusion:EULER",
        "ddim": "gspn_jax.diffusion.stable_diffusion:DDIM",
        "pndm": "gspn_jax.diffusion.stable_diffusion:PNDM",
        "dpm++": "gspn_jax.diffusion.stable_diffusion:DPM_SOLVER",
    }
)
"""`--sampler` of text to image: `diffusion.stable_diffusion.Sampler`s, at the timesteps of a model's folder."""

METRICS = Table(
    {
        "fid": "gspn_jax.metrics.scores:FID",
        "sfid": "gspn_jax.metrics.scores:SFID",
        "is": "gspn_jax.metrics.scores:INCEPTION_SCORE",
        "kid": "gspn_jax.metrics.scores:KID",
        "precision": "gspn_jax.metrics.scores:PRECISION",
        "recall": "gspn_jax.metrics.scores:RECALL",
        "fd_dinov2": "gspn_jax.metrics.scores:FD_DINOV2",
        "clip": "gspn_jax.metrics.scores:CLIP_SCORE",
    }
)
"""`eval.metrics`: `metrics.scores.Metric`s."""

FEATURE_NETWORKS = Table(
    {"inception": "gspn_jax.metrics.inception", "dinov2": "gspn_jax.text.dinov2", "clip": "gspn_jax.text.clip"}
)
"""Networks through which metrics see images: `metrics.networks.FeatureNetwork`s."""


def samplers_of(objective: str) -> tuple[str, ...]:
    """The samplers that fit an objective, its default first."""
    chosen = OBJECTIVES[objective]
    names = [name for name, kind in SAMPLERS.items() if chosen.fits(kind)]
    return tuple(sorted(names, key=lambda name: name != chosen.sampler))
