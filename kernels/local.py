"""The scan with chunk=2 as one kernel forward and one backward, for terms of low rank on tensor cores.

With chunk=2 nothing is scanned. In each direction lines come in pairs: on the first line h = lam x, on the second each
pixel adds lam x to the weighted sum of three pixels of the first. So the pixels of a map fall into four classes by the
parities of row and column, each a grid of its own, and each class is first in two directions and second in the two
others. A block has one warpgroup for each class, keeps a slab of channels with its factors, and walks over images.
The programs are in `local_bodies`; docs/kernel.md has the picture.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, devices, expansion, launch
from gspn_jax.kernels.derivatives import differentiable
from gspn_jax.kernels.local_bodies import (
    AXES,
    CLASSES,
    LOGITS,
    PIXELS,
    ROWS,
    SLAB,
    Cotangents,
    Given,
    Shared,
    exchanged_channels,
    local_backward,
    local_forward,
    pairs,
)
from gspn_jax.kernels.terms import OUT_GATE, Job
from gspn_jax.kernels.weights import DIRECTIONS

CHUNK = 2


def refuses(x: Float[Array, "B H W C"], proxy: Float[Array, "B H W d"], kinds: int) -> str | None:
    """Reason why the kernel cannot take `x` and `proxy` with so many kinds of terms, or None."""
    device = devices.current()
    _, height, width, channels = x.shape
    if device.expanding is None:
        return "needs wgmma"
    if not (compat.RESHAPES_REFERENCES or compat.interpreting()):
        return f"needs JAX 0.11 or newer, and this is {jax.__version__}"
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {x.dtype}"
    if (height, width) not in ((16, 16), (32, 8)) or channels % 8 or channels < SLAB:
        return f"takes maps of 16 x 16 or 32 x 8 and channels in eights from {SLAB}, not {list(x.shape[1:])}"
    needed = [_shared_bytes(kinds, proxy.shape[-1], backward=backward) for backward in (False, True)]
    if max(needed) > device.shared_bytes:
        return f"has no room on chip for a proxy of {proxy.shape[-1]}"
    return None


def propagate(
    job: Job,
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    up: Float[Array, "4 N C d"],
    merge: Float[Array, "4 C"],
) -> Float[Array, "B H W C"]:
    """The operator with chunk=2; `proxy` and `up` are as wide as the tensor cores take them."""
    forward, plain, pull_back = (
        functools.partial(program, job) for program in (_propagate_forward, expansion.plain, _propagate_backward)
    )
    return differentiable(forward, plain=plain, pull_back=pull_back)((x, proxy, up, merge))


def _propagate_forward(job: Job, arrays: tuple[Array, ...]) -> Array:
    x, proxy, up, merge = arrays
    given = _given(x, proxy, up, merge)
    output = jax.ShapeDtypeStruct(given.x.shape, x.dtype)
    (y,) = _run(functools.partial(local_forward, job=job), given, [output])
    return y.reshape(x.shape)


def _given(x: Array, proxy: Array, up: Array, merge: Array) -> Given:
    return Given(_by_parity(x), _by_class(proxy), _by_slab(up, x.dtype), merge)


def _by_parity(x: Float[Array, "B H W C"]) -> Array:
    """[B H / 2, 2, W / 2, 2, C], as it lies: a copy to the chip has five axes at most."""
    batch, height, width, channels = x.shape
    return x.reshape(batch * height // 2, 2, width // 2, 2, channels)


def _by_class(proxy: Float[Array, "B H W d"]) -> Float[Array, "B 4 64 d"]:
    batch, height, width, rank = proxy.shape
    parities = proxy.reshape(batch, height // 2, 2, width // 2, 2, rank).transpose(0, 2, 4, 1, 3, 5)
    return parities.reshape(batch, CLASSES, PIXELS, rank)


def _by_slab(up: Float[Array, "4 N C d"], dtype: Any) -> Float[Array, "slabs 4 rows d"]:
    """[.., N * SLAB, d] of each; the last slab overlaps the one before it where SLAB does not divide the channels."""
    directions, kinds, channels, rank = up.shape
    slabs = math.ceil(channels / SLAB)
    starts = jnp.minimum(jnp.arange(slabs) * SLAB, channels - SLAB)
    found = up.astype(dtype)[:, :, starts[:, None] + jnp.arange(SLAB)]
    return found.transpose(2, 0, 1, 3, 4).reshape(slabs, directions, kinds * SLAB, rank)


def _run(body: Any, given: Given, outputs: list[Any]) -> list[Array]:
    batch, slabs = given.proxy.shape[0], given.up.shape[0]
    splits = _splits(batch, slabs)
    shared = _shared(given)
    body = functools.partial(body, images=batch // splits)
    return launch.run(body, {"split": splits, "slab": slabs}, CLASSES, given, outputs, shared)


def _splits(batch: int, slabs: int) -> int:
    """The number of blocks that share the images of a slab: their last round should leave few multiprocessors idle."""
    multiprocessors = devices.current().expanding.multiprocessors

    def time(splits: int) -> int:  # in images, and about one more for the factors
        return math.ceil(splits * slabs / multiprocessors) * (batch // splits + 1)

    return min((n for n in range(1, batch + 1) if batch % n == 0), key=time)


def _shared(given: Given) -> Shared:
    _, _, rows, rank = given.up.shape
    backward = given.cotangent is not None
    height, width = given.proxy.shape[2] // given.x.shape[2], given.x.shape[2]
    pixels = 2 if backward else 1
    slots = 1 if backward else 2
    return Shared(
        up=expansion.swizzled((CLASSES, rows, rank), given.x.dtype),
        proxy=expansion.swizzled((slots, CLASSES, PIXELS, rank), given.x.dtype),
        pixels=plgpu.SMEM((2, pixels, CLASSES, height, width, SLAB), given.x.dtype),
        exchanged=launch.row_major((ROWS, exchanged_channels(1 + LOGITS if backward else AXES))),
        up_arrived=plgpu.Barrier(num_barriers=CLASSES),
        proxy_arrived=plgpu.Barrier(num_barriers=slots * CLASSES),
        pixels_arrived=plgpu.Barrier(num_barriers=2 * pixels * CLASSES),
        meeting=plgpu.Barrier(num_arrivals=CLASSES),
    )


def _propagate_backward(job: Job, arrays: tuple[Array, ...], _: tuple, cotangent: Array) -> tuple[Array, ...]:
    x, proxy, up, merge = arrays
    given = _given(x, proxy, up, merge)._replace(cotangent=_by_parity(cotangent.astype(x.dtype)))
    terms = (CLASSES, x.shape[0], PIXELS, len(pairs(job)), x.shape[-1])
    outputs = Cotangents(jax.ShapeDtypeStruct(given.x.shape, x.dtype), jax.ShapeDtypeStruct(terms, jnp.uint32))
    by = _run(functools.partial(local_backward, job=job), given, outputs)
    terms = lax.bitcast_convert_type(by.terms, x.dtype).reshape(CLASSES, x.shape[0] * PIXELS, -1)
    by_up, gy_h = _by_up(job, given.proxy, terms)
    # the kernel leaves `merge` out of what out_gate and skip get: it is a factor of the sums, and gets them
    after = slice(OUT_GATE, None)
    used = up[:, after].astype(x.dtype).astype(jnp.float32)
    by_merge = gy_h + (by_up[:, after] * used).sum((1, 3))
    by_up = by_up.at[:, after].multiply(merge[:, None, :, None])
    scaled = up.at[:, after].multiply(merge[:, None, :, None]).astype(x.dtype)
    by_proxy = _by_proxy(job, scaled, terms, proxy.shape).astype(proxy.dtype)
    return by.x.reshape(x.shape), by_proxy, by_up, by_merge


def _terms_of_classes(job: Job) -> list[list[list[tuple[int, int]]]]:
    """For each class direction and kind of its terms, in pairs, in the order of `Cotangents.terms`."""
    return [
        [[(2 * axis + (second != divmod(index, 2)[axis]), kind) for axis, second, kind in pair] for pair in pairs(job)]
        for index in range(CLASSES)
    ]


def _by_proxy(
    job: Job, up: Float[Array, "4 N C d"], terms: Float[Array, "4 pixels terms"], shape: tuple[int, ...]
) -> Float[Array, "B H W d"]:
    """Sums over terms and channels of cotangents and factors."""
    batch, height, width, rank = shape
    factors = jnp.stack(
        [
            jnp.stack([jnp.stack([up[place] for place in pair], axis=1) for pair in of_class])
            for of_class in _terms_of_classes(job)
        ]
    ).reshape(CLASSES, -1, rank)
    found = jnp.einsum("qpt,qtd->qpd", terms, factors, preferred_element_type=jnp.float32)
    parities = found.reshape(2, 2, batch, height // 2, width // 2, rank)
    return parities.transpose(2, 3, 0, 4, 1, 5).reshape(shape)


def _by_up(
    job: Job, proxy: Float[Array, "B 4 64 d"], terms: Float[Array, "4 pixels terms"]
) -> tuple[Float[Array, "4 N C d"], Float[Array, "4 C"]]:
    """(sums over pixels of cotangents and proxy, sum of gy h): a column of ones beside the proxy gives the latter."""
    rank = proxy.shape[-1]
    wider = jnp.pad(proxy, ((0, 0),) * 3 + ((0, 8),), constant_values=1)
    wider = wider.swapaxes(0, 1).reshape(CLASSES, -1, rank + 8)
    found = jnp.einsum("qpt,qpd->qtd", terms, wider, preferred_element_type=jnp.float32)
    found = found.reshape(CLASSES, len(pairs(job)), -1, 2, rank + 8)
    sums: dict[tuple[int, int], list[Array]] = {}
    for of_class, used in zip(found, _terms_of_classes(job), strict=True):
        for of_pair, pair in zip(of_class, used, strict=True):
            for n, place in enumerate(pair):
                sums.setdefault(place, []).append(of_pair[:, n])
    directions = range(len(DIRECTIONS))
    total = jnp.stack([jnp.stack([sum(sums[k, kind]) for kind in range(job.kinds)]) for k in directions])
    total = lax.optimization_barrier(total)  # or XLA adds up what it is made of for each of its uses
    return total[..., :rank], total[:, OUT_GATE, :, rank]


def _shared_bytes(kinds: int, rank: int, *, backward: bool) -> int:
    """Of shared memory for a proxy of `rank` that expands to so many kinds of terms."""
    rank += -rank % expansion.QUANTUM
    slots, exchanged, tiles_of_class = (1, 1 + LOGITS, 4) if backward else (2, AXES, 2)
    operands = 2 * rank * CLASSES * (kinds * SLAB + slots * PIXELS)
    return operands + 4 * ROWS * exchanged_channels(exchanged) + 2 * tiles_of_class * CLASSES * PIXELS * SLAB
