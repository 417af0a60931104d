"""GSPN in the place of a U-Net's self-attentions ("...attn1"): options, parameters, and the `mixer` of `unet.apply`.

Parameters are a flat dict by the names of the attentions that they replace, "<attn1>.<part>", laid out for NHWC:

    proxy.weight [D, s]                       gates [s, 4, 3, D], lam, out_gate (and skip) [s, 4, D], merge [4]
    to_out.0.weight [D, D], to_out.0.bias [D] (to_q.weight, to_k.weight, to_v.weight [D, D] of the form "qkv")

with s = D / proxy_ratio. Directions are down, up, right, left, as in `kernels.propagate`, and every term is taken at
its own pixel. Height and width travel with the map, so any size and aspect ratio works.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from gspn_jax import unet
from gspn_jax.config import ConfigError
from gspn_jax.kernels import propagate_low_rank
from gspn_jax.models.mixers import CHANNELS, DIRECTIONS, NEIGHBOURS
from gspn_jax.models.parameters import ParamShape
from gspn_jax.unet import UNetConfig

Form = Literal["pure", "qkv"]
"""How a layer is made of its tokens x, with P = proxy.weight: "pure" scans x, and all terms come from x P. "qkv" scans
x + x V; gates and skip come from x P, lam from (x + x K) P, out_gate from (x + x Q) P."""

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Choices of the layers of a U-Net. The released code has "pure" with 8 for Stable Diffusion 1 and "qkv" with 32
    for SDXL, `skip` and chunks of 4 in both; GSPN-2 has 8."""

    form: Form = "pure"
    proxy_ratio: int = 8
    """Width of a layer over that of its proxy."""
    skip: bool = False
    """Whether a term skip_k x of the released code is added to each direction; the paper has none."""
    chunks: tuple[int, ...] = (4,)
    """Lines of a local scan at each level of the U-Net, the finest first; 0 scans the whole map. One number holds for
    all levels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", tuple(self.chunks))
        if self.form not in get_args(Form):
            raise ConfigError(
                f"the form of GSPN layers must be one of {', '.join(get_args(Form))}, found {self.form!r}"
            )
        if type(self.proxy_ratio) is not int or self.proxy_ratio < 1:
            raise ConfigError(f"the proxy_ratio of GSPN layers must be 1 or more, found {self.proxy_ratio!r}")
        if not self.chunks or any(type(chunk) is not int or chunk < 0 for chunk in self.chunks):
            raise ConfigError(
                f"the chunks of GSPN layers must be numbers of lines from 0, for each level or for all, found "
                f"{self.chunks!r}"
            )

    def check(self, config: UNetConfig) -> None:
        """Raises ConfigError for chunks and a proxy that do not fit the levels of the U-Net."""
        if len(self.chunks) not in (1, len(config.channels)):
            raise ConfigError(
                f"the chunks of GSPN layers must be one number, or one for each of the {len(config.channels)} levels "
                f"of the U-Net, found {len(self.chunks)}"
            )
        for width in attention_widths(config).values():
            if width % self.proxy_ratio:
                raise ConfigError(
                    f"the proxy_ratio of GSPN layers must divide the widths of the U-Net, found {self.proxy_ratio} for "
                    f"a layer of {width}"
                )

    @property
    def terms(self) -> tuple[str, ...]:
        """Parameters that make terms of a scan of the proxy."""
        return ("gates", "lam", "out_gate", "skip") if self.skip else ("gates", "lam", "out_gate")

    def chunk(self, level: int) -> int | None:
        """Lines of a local scan at a level; None is the whole map."""
        return self.chunks[level if len(self.chunks) > 1 else 0] or None


class Layers(NamedTuple):
    """GSPN layers of a U-Net, and what is known of them."""

    params: Mapping[str, Float[Array, "..."] | Float[np.ndarray, "..."]]
    options: LayerOptions
    about: Mapping[str, Any] = {}
    """JSON values from the file: how they were trained; empty for layers that are not."""


def attention_widths(config: UNetConfig) -> dict[str, int]:
    """Width of every self-attention by its name, "...attn1": 16 of Stable Diffusion 1 and 2, 70 of SDXL."""
    end = ".to_q.weight"
    return {
        name.removesuffix(end): shape[0]
        for name, shape in unet.expected_shapes(config).items()
        if name.endswith(f".attn1{end}")
    }


def level_of(name: str, config: UNetConfig) -> int:
    """Level of a self-attention, 0 the finest, from its name."""
    last = len(config.channels) - 1
    place, number, *_ = name.split(".")
    if place == "mid_block":
        return last
    return int(number) if place == "down_blocks" else last - int(number)


def shapes(config: UNetConfig, options: LayerOptions) -> dict[str, ParamShape]:
    """Shape of every parameter, float32, with the names of its axes. Raises ConfigError as `LayerOptions.check`."""
    options.check(config)
    return {
        f"{name}.{part}": ParamShape(shape, jnp.float32, axes=axes, float32=part == "merge")
        for name, width in attention_widths(config).items()
        for part, shape, axes in _parts(width, options)
    }


def _parts(width: int, options: LayerOptions) -> Iterator[tuple[str, tuple[int, ...], tuple[str | None, ...]]]:
    """Name, shape and axes of each parameter of a layer."""
    proxy = width // options.proxy_ratio
    yield "proxy.weight", (width, proxy), ("channels", "embed")
    yield "gates", (proxy, DIRECTIONS, NEIGHBOURS, width), CHANNELS
    for term in options.terms[1:]:
        yield term, (proxy, DIRECTIONS, width), CHANNELS
    yield "merge", (DIRECTIONS,), ()
    for part in ("to_q", "to_k", "to_v") if options.form == "qkv" else ():
        yield f"{part}.weight", (width, width), ("embed", "channels")
    yield "to_out.0.weight", (width, width), ("channels", "embed")
    yield "to_out.0.bias", (width,), ("embed",)


def init(config: UNetConfig, options: LayerOptions, key: Key[Array, ""]) -> dict[str, Float[Array, "..."]]:
    """Fresh parameters: linears uniform by Glorot, merge 1/4, so that a layer hands its tokens on at scale 1 with their
    context, as `models.mixers.GSPNMixer` does. Pure: jit it with the first two arguments static."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, own in shapes(config, options).items():
        alike.setdefault((name.partition(".attn1.")[2], own.shape), []).append(name)
    params = {}
    for number, ((part, shape), names) in enumerate(alike.items()):  # few draws, of many layers each: small programs
        stacked = _first(part, jax.random.fold_in(key, number), (len(names), *shape))
        params |= dict(zip(names, stacked, strict=True))
    return params


def _first(part: str, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "L ..."]:
    """First values of a parameter of several layers."""
    if part == "merge":
        return jnp.full(shape, 1 / DIRECTIONS, jnp.float32)  # of no weak type, for which a step would be compiled again
    if part.endswith("bias"):
        return jnp.zeros(shape)
    limit = math.sqrt(6 / (shape[1] + math.prod(shape[2:])))
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def started_from(
    params: Mapping[str, Float[Array, "..."]], teacher: Mapping[str, Float[Array, "..."] | Float[np.ndarray, "..."]]
) -> dict[str, Float[Array, "..."]]:
    """The parameters with those taken from a U-Net that has the same names and shapes: to_out of every layer, and in
    the form "qkv" to_q, to_k and to_v, which the paper has correspond to out_gate, lam and x."""

    def taken(name: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        found = teacher.get(name)
        return value if found is None or found.shape != value.shape else jnp.asarray(found, value.dtype)

    return {name: taken(name, value) for name, value in params.items()}


def mixer(
    params: Mapping[str, Float[Array, "..."]],
    config: UNetConfig,
    options: LayerOptions,
    *,
    backend: str | None = None,
    channels: int | None = None,
) -> unet.Mixer:
    """Layers as `unet.apply` takes them in place of its self-attentions; `backend` is that of `kernels.propagate`, and
    `channels` as `layer` has it."""

    def mix(name: str, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        prefix = f"{name}."
        own = {part: params[f"{prefix}{part}"] for part, *_ in _parts(x.shape[-1], options)}
        chunk = options.chunk(level_of(name, config))
        return _traced_once(own, options, x, chunk=chunk, backend=backend, channels=channels)

    return mix


def layer(
    params: Mapping[str, Float[Array, "..."]],
    options: LayerOptions,
    x: Float[Array, "B H W D"],
    *,
    chunk: int | None,
    backend: str | None = None,
    channels: int | None = None,
) -> Float[Array, "B H W D"]:
    """One layer on the tokens that its attention would see; `params` by part ("proxy.weight"). In the type of `x`.

    Channels are scanned `channels` at a time or fewer, which bounds the memory of the terms, 20 numbers a channel,
    where they are not expanded on chip; None takes all at once.
    """

    def times(part: str, tokens: Float[Array, "B H W C"]) -> Float[Array, "B H W E"]:
        return jnp.matmul(tokens, params[f"{part}.weight"].astype(x.dtype), precision=_HIGHEST)

    terms = [params[term].astype(x.dtype) for term in options.terms]
    if options.form == "pure":
        value, proxy = x, times("proxy", x)
    else:
        value = x + times("to_v", x)
        proxies = times("proxy", x), times("proxy", x + times("to_k", x)), times("proxy", x + times("to_q", x))
        proxy, terms = _side_by_side(proxies, terms)
    merge = params["merge"].astype(jnp.float32)

    def scan(arrays: tuple[Array, ...]) -> Float[Array, "B H W C"]:
        value, gates, lam, out_gate, *skip = arrays
        return propagate_low_rank(
            value, proxy, gates, lam, out_gate, merge, skip=skip[0] if skip else None, chunk=chunk, backend=backend
        )

    y = _by_channels(scan, (value, *terms), channels or x.shape[-1])
    return times("to_out.0", y) + params["to_out.0.bias"].astype(x.dtype)


_traced_once = jax.jit(layer, static_argnames=("options", "chunk", "backend", "channels"))
"""Layers of one shape are one function of the program: 70 of them are traced, and their kernels made, twice."""


def _by_channels(
    function: Callable[[tuple[Array, ...]], Float[Array, "B H W C"]], arrays: tuple[Array, ...], most: int
) -> Float[Array, "B H W D"]:
    """`function` of arrays [..., D] whose channels are independent, of at most `most` channels at a time."""
    width = arrays[0].shape[-1]
    pieces = next(count for count in range(1, width + 1) if width % count == 0 and width // count <= most)
    if pieces == 1:
        return function(arrays)
    split = tuple(jnp.moveaxis(array.reshape(*array.shape[:-1], pieces, -1), -2, 0) for array in arrays)
    joined = jnp.moveaxis(jax.lax.map(function, split), 0, -2)
    return joined.reshape(*joined.shape[:-2], width)


def _side_by_side(
    proxies: tuple[Float[Array, "B H W s"], ...], terms: list[Float[Array, "s ..."]]
) -> tuple[Float[Array, "B H W S"], list[Float[Array, "S ..."]]]:
    """Three proxies as one, S = 3 s, and terms that read each its own part of it, the fourth (skip) the first: so a
    kernel that expands proxies on chip takes this form too, and the terms, 20 D numbers a pixel, are never in memory.
    """
    rank = proxies[0].shape[-1]

    def reads(part: int, term: Float[Array, "s ..."]) -> Float[Array, "S ..."]:
        before, after = part * rank, (len(proxies) - 1 - part) * rank
        return jnp.pad(term, ((before, after), *((0, 0),) * (term.ndim - 1)))

    return jnp.concatenate(proxies, axis=-1), [reads(i % len(proxies), term) for i, term in enumerate(terms)]
