"""The U-Net of Stable Diffusion as a function of its weights, by the names of diffusers' `UNet2DConditionModel`
("down_blocks.0.resnets.0.conv1.weight").

Weights are laid out for NHWC: convolutions [kh, kw, in, out], linears [in, out]. Computed in the type of the latents;
norms, softmax and the sinusoids in float32. The map's height and width travel with it, so any size works.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from gspn_jax.unet.config import UNetConfig

Params = Mapping[str, Float[Array, "..."]]
Attend = Callable[[Array, Array, Array], Array]
"""Queries [B, N, heads, d], keys and values [B, M, heads, d] -> [B, N, heads, d]."""
Mixer = Callable[[str, Float[Array, "B H W D"]], Float[Array, "B H W D"]]
"""Takes the name of a self-attention ("...attn1") and what it would see -> what is added in its place."""

_HIGHEST = jax.lax.Precision.HIGHEST


class Added(NamedTuple):
    """Inputs of SDXL beside the text."""

    pooled: Float[Array, "B P"]
    """Pooled text state."""
    sizes: Num[Array, "B 6"]
    """Height and width of the original, top and left of the crop, height and width aimed at; in pixels."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """Choices of how a U-Net is run; but for `dilation` they change memory alone."""

    dilation: int = 1
    """Pixels between the taps of every convolution, and of its padding: another function of the same weights, which
    sees a larger map as it would see a smaller one."""
    pieces: int = 1
    """Runs of tokens that feed-forwards and attentions to the text take one after another."""
    skips_on_host: bool = False
    """Whether what the way down leaves for the way up waits in the memory of the host."""


PLAINLY = Execution()


class _Call(NamedTuple):
    """What every block of one call sees."""

    params: Params
    groups: int
    execution: Execution
    time: Float[Array, "B T"]
    context: Float[Array, "B N D"]
    attend: Attend
    mixer: Mixer | None
    features: dict[str, Float[Array, "..."]] | None
    """Takes the outputs of self-attentions; None where they are not asked for, so that nothing keeps them."""


def attention(
    q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"]
) -> Float[Array, "B N heads d"]:
    """softmax(q k^T / sqrt(d)) v of each head, with all scores in memory at once, in float32."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision=_HIGHEST, preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(scores / math.sqrt(q.shape[-1])).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", shares, v, precision=_HIGHEST)


def apply(
    params: Params,
    config: UNetConfig,
    x: Float[Array, "B H W C"],
    timesteps: Num[Array, "#B"],
    context: Float[Array, "B N D"],
    added: Added | None = None,
    *,
    attend: Attend = attention,
    mixer: Mixer | None = None,
    execution: Execution = PLAINLY,
) -> Float[Array, "B H W O"]:
    """Predicts the noise, or v where the model was trained so, of noised latents `x` at `timesteps` 0 .. 999.

    `context` are the text states. `attend` computes every attention (pass one that is flash attention where it can be);
    `mixer` takes the place of the self-attentions. Raises ValueError for shapes that do not fit the config.
    """
    return _run(params, config, x, timesteps, context, added, None, attend=attend, mixer=mixer, execution=execution)


def apply_with_features(
    params: Params,
    config: UNetConfig,
    x: Float[Array, "B H W C"],
    timesteps: Num[Array, "#B"],
    context: Float[Array, "B N D"],
    added: Added | None = None,
    **how: Any,
) -> tuple[Float[Array, "B H W O"], dict[str, Float[Array, "..."]]]:
    """Predicts as `apply`, with its keywords; also gives the output [B, h, w, D] of every self-attention, or of what
    takes its place, by its name "...attn1"."""
    kept: dict[str, Array] = {}
    return _run(params, config, x, timesteps, context, added, kept, **how), kept


def _run(
    params: Params,
    config: UNetConfig,
    x: Float[Array, "B H W C"],
    timesteps: Num[Array, "#B"],
    context: Float[Array, "B N D"],
    added: Added | None,
    kept: dict[str, Float[Array, "..."]] | None,
    *,
    attend: Attend = attention,
    mixer: Mixer | None = None,
    execution: Execution = PLAINLY,
) -> Float[Array, "B H W O"]:
    _check(config, x, context, added)
    time = _embed(params, config, x, timesteps, added)
    call = _Call(params, config.groups, execution, time, context.astype(x.dtype), attend, mixer, kept)
    skips = _Skips(execution.skips_on_host)
    last = len(config.channels) - 1
    x = _conv(call, "conv_in", x)
    skips.push(x)
    for level in range(last + 1):
        block = f"down_blocks.{level}"
        for layer in range(config.layers):
            x = _layer(call, block, layer, x, config.depths[level], config.heads[level])
            skips.push(x)
        if level < last:
            x = _conv(call, f"{block}.downsamplers.0.conv", x, stride=2)
            skips.push(x)

    x = _residual(call, "mid_block.resnets.0", x)
    x = _transformer(call, "mid_block.attentions.0", x, config.middle_depth, config.heads[-1])
    x = _residual(call, "mid_block.resnets.1", x)

    for level in range(last, -1, -1):
        block = f"up_blocks.{last - level}"
        for layer in range(config.layers + 1):
            joined = jnp.concatenate([x, skips.pop()], axis=-1)
            x = _layer(call, block, layer, joined, config.depths[level], config.heads[level])
        if level > 0:
            height, width = skips.last_size  # an odd size was rounded up on the way down
            x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
            x = _conv(call, f"{block}.upsamplers.0.conv", x)
    return _conv(call, "conv_out", _norm_silu(params, "conv_norm_out", x, config.groups))


class _Skips:
    """Maps of the way down for the way up, the last first."""

    def __init__(self, on_host: bool):
        self._on_host, self._maps = on_host, []

    def push(self, x: Float[Array, "B H W C"]) -> None:
        self._maps.append(jax.device_put(x, jax.memory.Space.Host) if self._on_host else x)

    def pop(self) -> Float[Array, "B H W C"]:
        x = self._maps.pop()
        return jax.device_put(x, jax.memory.Space.Device) if self._on_host else x

    @property
    def last_size(self) -> tuple[int, int]:
        """Height and width of the map that comes next."""
        return self._maps[-1].shape[1:3]


def _check(config: UNetConfig, x: Array, context: Array, added: Added | None) -> None:
    if x.ndim != 4 or x.shape[3] != config.in_channels:
        raise ValueError(f"latents must be [B, H, W, {config.in_channels}], found {list(x.shape)}")
    if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != config.context_width:
        raise ValueError(f"text states must be [{x.shape[0]}, N, {config.context_width}], found {list(context.shape)}")
    if (added is None) != (config.added_width is None):
        raise ValueError(
            "this U-Net takes "
            + (
                "no pooled text and sizes, found some"
                if config.added_width is None
                else "pooled text and sizes, found none"
            )
        )
    if added is not None:
        expected = (x.shape[0], config.pooled_width), (x.shape[0], 6)
        if (found := (added.pooled.shape, added.sizes.shape)) != expected:
            raise ValueError(
                f"pooled text and sizes must be {list(expected[0])} and {list(expected[1])}, found "
                f"{list(found[0])} and {list(found[1])}"
            )


def _embed(
    params: Params, config: UNetConfig, x: Float[Array, "B H W C"], timesteps: Num[Array, "#B"], added: Added | None
) -> Float[Array, "B T"]:
    """The time, and what is added to it, as every residual block sees them."""

    def embedded(name: str, values: Float[Array, "B D"]) -> Float[Array, "B T"]:
        hidden = jax.nn.silu(_linear(params, f"{name}.linear_1", values.astype(x.dtype)))
        return _linear(params, f"{name}.linear_2", hidden)

    times = jnp.broadcast_to(timesteps, x.shape[:1])
    time = embedded("time_embedding", _sinusoids(times, config.channels[0]))
    if added is not None:
        sizes = _sinusoids(added.sizes, config.added_size_width).reshape(len(x), -1)
        time += embedded("add_embedding", jnp.concatenate([added.pooled.astype(jnp.float32), sizes], axis=-1))
    return jax.nn.silu(time)


def _sinusoids(values: Num[Array, "*B"], width: int) -> Float[Array, "*B W"]:
    """Cosines, then sines, of the values times frequencies 1 down to almost 1/10000."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _layer(
    call: _Call, block: str, layer: int, x: Float[Array, "B H W C"], depth: int, heads: int
) -> Float[Array, "B H W D"]:
    x = _residual(call, f"{block}.resnets.{layer}", x)
    return _transformer(call, f"{block}.attentions.{layer}", x, depth, heads) if depth else x


def _residual(call: _Call, name: str, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
    params = call.params
    y = _conv(call, f"{name}.conv1", _norm_silu(params, f"{name}.norm1", x, call.groups))
    y += _linear(params, f"{name}.time_emb_proj", call.time)[:, None, None]
    y = _conv(call, f"{name}.conv2", _norm_silu(params, f"{name}.norm2", y, call.groups))
    return y + (_conv(call, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in params else x)


def _transformer(call: _Call, name: str, x: Float[Array, "B H W D"], depth: int, heads: int) -> Float[Array, "B H W D"]:
    params = call.params
    normal = _group_norm(params, f"{name}.norm", x, call.groups, epsilon=1e-6)
    y = _linear(params, f"{name}.proj_in", normal.astype(x.dtype))
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        seen = _layer_norm(params, f"{block}.norm1", y)
        if call.mixer is None:
            mixed = self_attention(params, f"{block}.attn1", seen, heads, call.attend)
        else:
            mixed = call.mixer(f"{block}.attn1", seen)
        if call.features is not None:
            call.features[f"{block}.attn1"] = mixed
        y += mixed
        y += _in_pieces(functools.partial(_read_text, call, block, heads), y, call.execution.pieces)
        y += _in_pieces(functools.partial(_feed_forward, call, block), y, call.execution.pieces)
    return x + _linear(params, f"{name}.proj_out", y)


def _in_pieces(
    function: Callable[[Float[Array, "B N D"]], Float[Array, "B N D"]], x: Float[Array, "B H W D"], pieces: int
) -> Float[Array, "B H W D"]:
    """`function`, which is one of each token, of all tokens, in so many pieces one after another."""
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    if pieces == 1:
        return function(tokens).reshape(x.shape)
    batch, count, width = tokens.shape
    padded = jnp.pad(tokens, ((0, 0), (0, -count % pieces), (0, 0)))
    split = padded.reshape(batch, pieces, -1, width).swapaxes(0, 1)
    joined = jax.lax.map(function, split).swapaxes(0, 1).reshape(padded.shape)
    return joined[:, :count].reshape(x.shape)


def self_attention(
    params: Params, name: str, x: Float[Array, "B H W D"], heads: int, attend: Attend = attention
) -> Float[Array, "B H W D"]:
    """Attention of every pixel to every other, as layer `name` ("...attn1") computes it."""
    return _attention(params, name, x, x.reshape(x.shape[0], -1, x.shape[-1]), heads, attend)


def _read_text(call: _Call, block: str, heads: int, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Attention to the text states, after its norm."""
    seen = _layer_norm(call.params, f"{block}.norm2", x)
    return _attention(call.params, f"{block}.attn2", seen, call.context, heads, call.attend)


def _attention(
    params: Params, name: str, x: Float[Array, "B *N D"], context: Float[Array, "B N E"], heads: int, attend: Attend
) -> Float[Array, "B *N D"]:
    def split(part: str, tokens: Float[Array, "B M E"]) -> Float[Array, "B M heads d"]:
        made = jnp.matmul(tokens, params[f"{name}.{part}.weight"].astype(x.dtype), precision=_HIGHEST)
        return made.reshape(*made.shape[:2], heads, -1)

    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    mixed = attend(split("to_q", tokens), split("to_k", context), split("to_v", context))
    return _linear(params, f"{name}.to_out.0", mixed.reshape(x.shape))


def _feed_forward(call: _Call, block: str, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Gated feed-forward, after its norm."""
    params, name = call.params, f"{block}.ff.net"
    seen = _layer_norm(params, f"{block}.norm3", x)
    value, gate = jnp.split(_linear(params, f"{name}.0.proj", seen).astype(jnp.float32), 2, axis=-1)
    return _linear(params, f"{name}.2", (value * jax.nn.gelu(gate, approximate=False)).astype(x.dtype))


def _conv(call: _Call, name: str, x: Float[Array, "B H W C"], *, stride: int = 1) -> Float[Array, "B h w D"]:
    """A convolution padded by half its kernel on every side, dilated as the call says."""
    kernel, dilation = call.params[f"{name}.weight"].astype(x.dtype), call.execution.dilation
    half = dilation * (kernel.shape[0] // 2)
    out = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((half, half), (half, half)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    )
    return out + call.params[f"{name}.bias"].astype(x.dtype)


def _linear(params: Params, name: str, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
    """A linear; its weight may be that of a 1x1 convolution."""
    weight = params[f"{name}.weight"].astype(x.dtype)
    weight = weight.reshape(weight.shape[-2:])
    return jnp.matmul(x, weight, precision=_HIGHEST) + params[f"{name}.bias"].astype(x.dtype)


def _norm_silu(params: Params, name: str, x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    return jax.nn.silu(_group_norm(params, name, x, groups, epsilon=1e-5)).astype(x.dtype)


def _group_norm(
    params: Params, name: str, x: Float[Array, "B H W C"], groups: int, *, epsilon: float
) -> Float32[Array, "B H W C"]:
    split = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = split - split.mean((1, 3), keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + epsilon)
    return _scaled(params, name, normal.reshape(x.shape))


def _layer_norm(params: Params, name: str, x: Float[Array, "B *N D"]) -> Float[Array, "B *N D"]:
    exact = x.astype(jnp.float32)
    centred = exact - exact.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return _scaled(params, name, normal).astype(x.dtype)


def _scaled(params: Params, name: str, x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    return x * params[f"{name}.weight"].astype(x.dtype) + params[f"{name}.bias"].astype(x.dtype)
