"""The scan with chunk=2 as one kernel forward and one backward, for terms of low rank on tensor cores.

With chunk=2 nothing is scanned. In each direction lines come in pairs: on the first line h = lam x, on the second each
pixel adds lam x to the weighted sum of three pixels of the first. So the pixels of a map fall into four classes by the
parities of row and column, each a grid of its own, and each class is first in two directions and second in the two
others. A block has one warpgroup for each class, keeps a slab of channels with its factors, and walks over images of
16 x 16 or pieces of larger ones (`local_pieces`). The programs are in `local_bodies`; docs/kernel_chunk2.md has more.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import devices, launch, local_pieces, low_rank, shared_memory
from gspn_jax.kernels.derivatives import differentiable
from gspn_jax.kernels.local_block import Arrivals, Given, Shared, exchanged_channels, exchanged_rows
from gspn_jax.kernels.local_bodies import LOGITS, Cotangents, local_backward, local_forward, pairs
from gspn_jax.kernels.local_copies import ByCopies
from gspn_jax.kernels.local_pieces import AXES, CLASSES, GRID, MOST_FILLED, PIXELS, Cut
from gspn_jax.kernels.local_threads import ByThreads
from gspn_jax.kernels.terms import OUT_GATE, Job
from gspn_jax.kernels.weights import DIRECTIONS

CHUNK = 2


def refuses(x: Float[Array, "B H W C"], proxy: Float[Array, "B H W d"], kinds: int) -> str | None:
    """Reason why the kernel cannot take `x` and `proxy` with so many kinds of terms, or None."""
    device = devices.current()
    _, height, width, channels = x.shape
    if device.local.missing:
        return device.local.missing
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {x.dtype}"
    slab = device.local.slab
    if height % 2 or width % 2 or channels % 8 or channels < slab:
        return f"takes even numbers of lines and channels in eights from {slab}, not {list(x.shape[1:])}"
    cut = Cut(height, width)
    if cut.filled > MOST_FILLED:
        return f"would fill up a map of {height} x {width} to {cut.filled:.1f} times its pixels, pieces of 16 x 16"
    needed = [_shared_bytes(cut, kinds, proxy.shape[-1], backward=backward) for backward in (False, True)]
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
    """The operator with chunk=2."""
    width = ((0, 0),) * 3 + ((0, shared_memory.filled_up(proxy.shape[-1]) - proxy.shape[-1]),)
    proxy, up = jnp.pad(proxy.astype(x.dtype), width), jnp.pad(up, width)
    forward, plain, pull_back = (
        functools.partial(program, job) for program in (_propagate_forward, low_rank.plain, _propagate_backward)
    )
    return differentiable(forward, plain=plain, pull_back=pull_back)((x, proxy, up, merge))


def _propagate_forward(job: Job, arrays: tuple[Array, ...]) -> Array:
    cut = Cut(*arrays[0].shape[1:3])
    given = _given(cut, *arrays)
    output = jax.ShapeDtypeStruct(given.x.shape, given.x.dtype)
    (y,) = _run(cut, functools.partial(local_forward, job=job), given, [output])
    return cut.restored(y)


def _given(
    cut: Cut, x: Array, proxy: Array, up: Array, merge: Array, cotangent: Float[Array, "B H W C"] | None = None
) -> Given:
    x, proxy = cut.filled_up(x), cut.filled_up(proxy)
    if cotangent is not None:
        cotangent = cut.filled_up(cotangent)
    return Given(
        x=_by_parity(x),
        proxy=cut.by_class(proxy),
        up=_by_slab(up, x.dtype),
        merge=merge,
        cotangent=None if cotangent is None else _by_parity(cotangent),
        beyond=local_pieces.beyond(cut, x, proxy, up, merge, cotangent),
    )


def _by_parity(x: Float[Array, "B H W C"]) -> Array:
    """[B H / 2, 2, W / 2, 2, C], as it lies: a copy to the chip has five axes at most."""
    batch, height, width, channels = x.shape
    return x.reshape(batch * height // 2, 2, width // 2, 2, channels)


def _by_slab(up: Float[Array, "4 N C d"], dtype: Any) -> Float[Array, "slabs 4 rows d"]:
    """Factors by slab, all kinds one below the other."""
    found = low_rank.by_slab(up, np.arange(devices.current().local.slab), dtype).swapaxes(0, 1)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])


def _run(cut: Cut, body: Any, given: Given, outputs: list[Any]) -> list[Array]:
    pieces, slabs = given.proxy.shape[0], given.up.shape[0]
    splits = _splits(pieces, slabs)
    shared = _shared(cut, given)
    view = ByCopies if devices.current().local.by_copies else ByThreads
    body = functools.partial(body, cut=cut, pieces=pieces // splits, view=view)
    return launch.run(body, {"split": splits, "slab": slabs}, CLASSES, given, outputs, shared)


def _splits(pieces: int, slabs: int) -> int:
    """The number of blocks that share the pieces of a slab: their last round should leave few multiprocessors idle."""
    multiprocessors = devices.current().multiprocessors

    def time(splits: int) -> int:  # in pieces, and about one more for the factors
        return math.ceil(splits * slabs / multiprocessors) * (pieces // splits + 1)

    return min((n for n in range(1, pieces + 1) if pieces % n == 0), key=time)


def _shared(cut: Cut, given: Given) -> Shared:
    _, _, rows, rank = given.up.shape
    local, backward, dtype = devices.current().local, given.cotangent is not None, given.x.dtype
    exchanged = exchanged_channels(1 + LOGITS if backward else AXES, local.slab)
    proxies, slots, sources = 1 if backward else 2, 2 if local.by_copies else 1, len(given.sources)
    proxy, arrivals = (), ()
    if local.by_copies:
        proxy = shared_memory.swizzled((proxies, CLASSES, PIXELS, rank), dtype)
        arrivals = Arrivals(
            up=plgpu.Barrier(num_barriers=CLASSES),
            proxy=plgpu.Barrier(num_barriers=proxies * CLASSES),
            pixels=plgpu.Barrier(num_arrivals=sources + (not cut.single), num_barriers=slots * CLASSES),
        )
    return Shared(
        up=shared_memory.swizzled((CLASSES, rows, rank), dtype),
        proxy=proxy,
        pixels=plgpu.SMEM((slots, sources, CLASSES, GRID, GRID, local.slab), dtype),
        exchanged=shared_memory.row_major((exchanged_rows(cut), exchanged)),
        beyond=_beyond(given, 1 if backward else 2),
        arrivals=arrivals,
        meeting=plgpu.Barrier(num_arrivals=CLASSES),
    )


def _beyond(given: Given, slots: int) -> Any:
    """Rows may start anywhere, and slabs at any eighth channel: see `shared_memory.row_major`."""
    if given.beyond is None:
        return ()
    shape = (GRID + slots * (given.beyond.shape[1] + GRID), devices.current().local.slab)
    return plgpu.SMEM(shape, given.x.dtype, transforms=(plgpu.TilingTransform((8,)),))


def _propagate_backward(job: Job, arrays: tuple[Array, ...], _: tuple, cotangent: Array) -> tuple[Array, ...]:
    x, proxy, up, merge = arrays
    cut = Cut(*x.shape[1:3])
    given = _given(cut, *arrays, cotangent.astype(x.dtype))
    pieces = given.proxy.shape[0]
    terms = (CLASSES, pieces, PIXELS, len(pairs(job)), x.shape[-1])
    outputs = Cotangents(jax.ShapeDtypeStruct(given.x.shape, x.dtype), jax.ShapeDtypeStruct(terms, jnp.uint32))
    by = _run(cut, functools.partial(local_backward, job=job), given, outputs)
    terms = lax.bitcast_convert_type(by.terms, x.dtype).reshape(CLASSES, pieces * PIXELS, -1)
    by_up, gy_h = _by_up(job, given.proxy, terms)
    # the kernel leaves `merge` out of what out_gate and skip get: it is a factor of the sums, and gets them
    after = slice(OUT_GATE, None)
    used = up[:, after].astype(x.dtype).astype(jnp.float32)
    by_merge = gy_h + (by_up[:, after] * used).sum((1, 3))
    by_up = by_up.at[:, after].multiply(merge[:, None, :, None])
    scaled = up.at[:, after].multiply(merge[:, None, :, None]).astype(x.dtype)
    by_proxy = cut.from_classes(_by_proxy(job, scaled, terms)).astype(proxy.dtype)
    return cut.restored(by.x), by_proxy, by_up, by_merge


def _terms_of_classes(job: Job) -> list[list[list[tuple[int, int]]]]:
    """For each class direction and kind of its terms, in pairs, in the order of `Cotangents.terms`."""
    return [
        [[(2 * axis + (second != divmod(index, 2)[axis]), kind) for axis, second, kind in pair] for pair in pairs(job)]
        for index in range(CLASSES)
    ]


def _by_proxy(
    job: Job, up: Float[Array, "4 N C d"], terms: Float[Array, "4 pixels terms"]
) -> Float[Array, "4 pixels d"]:
    """Sums over terms and channels of cotangents and factors."""
    factors = jnp.stack(
        [
            jnp.stack([jnp.stack([up[place] for place in pair], axis=1) for pair in of_class])
            for of_class in _terms_of_classes(job)
        ]
    ).reshape(CLASSES, -1, up.shape[-1])
    return jnp.einsum("qpt,qtd->qpd", terms, factors, preferred_element_type=jnp.float32)


def _by_up(
    job: Job, proxy: Float[Array, "pieces 4 64 d"], terms: Float[Array, "4 pixels terms"]
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


def _shared_bytes(cut: Cut, kinds: int, rank: int, *, backward: bool) -> int:
    """Bytes of shared memory for a proxy of `rank` that expands to so many kinds of terms: see `_shared`."""
    rank = shared_memory.filled_up(rank)
    local = devices.current().local
    proxies, exchanged, sources = (1, 1 + LOGITS, 2) if backward else (2, AXES, 1)
    operands = 2 * rank * CLASSES * (kinds * local.slab + (proxies * PIXELS if local.by_copies else 0))
    slots = 2 if local.by_copies else 1
    grids = 0 if cut.single else 2 * AXES  # in two slots forward, of two kinds backward
    beyond = 2 * local.slab * ((2 if backward else 3) * GRID + grids * PIXELS) if grids else 0
    return (
        operands
        + beyond
        + 4 * exchanged_rows(cut) * exchanged_channels(exchanged, local.slab)
        + 2 * slots * sources * CLASSES * PIXELS * local.slab
    )
