"""Improved precision and recall (Kynkaanniemi et al. 2019) as the ADM evaluator computes them, tile by tile."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

NEIGHBOURS = 3
BLOCK, TILE = 10_000, 1000
"""ADM leaves float16 for a whole block of 10,000 x 10,000 distances when one of them overflows. Of a block, the
distances of TILE rows are in memory at a time."""


def precision_recall(
    reference: Float32[np.ndarray, "M D"],
    samples: Float32[np.ndarray, "N D"],
    *,
    reference_radii: Float32[np.ndarray, " M"] | None = None,
    neighbours: int = NEIGHBOURS,
    float16: bool = False,
) -> tuple[float, float]:
    """(share of samples among the reference, share of the reference among the samples), each 0..1.

    A point is among the others when it is no further from one of them than that one's radius (`radii`, which gives
    `reference_radii` when they are not at hand). `float16` rounds as the ADM evaluator does: distances then have 11
    bits, ties are common, and the published numbers depend on them.
    Raises ValueError for no more rows than neighbours on a side, or sides that differ in the number of features.
    """
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"both sides must have the same number of features, found {reference.shape[1]} and {samples.shape[1]}"
        )
    if reference_radii is None:
        reference_radii = radii(reference, neighbours=neighbours, float16=float16)
    sample_radii = radii(samples, neighbours=neighbours, float16=float16)
    among_reference, among_samples = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows in _blocks(len(reference)):
        for columns in _blocks(len(samples)):
            in_rows, in_columns = _in_float16_or_32(
                functools.partial(
                    _memberships,
                    _tiles(reference[rows]),
                    _tiles(reference_radii[rows]),
                    samples[columns],
                    sample_radii[columns],
                ),
                float16,
            )
            among_samples[rows] |= in_columns[: len(reference[rows])]
            among_reference[columns] |= in_rows
    return float(among_reference.mean()), float(among_samples.mean())


def radii(
    features: Float32[np.ndarray, "N D"], *, neighbours: int = NEIGHBOURS, float16: bool = False
) -> Float32[np.ndarray, " N"]:
    """The squared distance of each row from its nearest neighbour but two, itself not counted (`neighbours` 3).

    Raises ValueError for no more rows than neighbours.
    """
    if len(features) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images a side, found {len(features)}")
    found = []
    for rows in _blocks(len(features)):
        tiles, nearest = _tiles(features[rows]), []
        for columns in _blocks(len(features)):
            count = min(neighbours + 1, len(features[columns]))  # one is the row itself
            nearest.append(
                _in_float16_or_32(functools.partial(_nearest, tiles, features[columns], count=count), float16)[
                    : len(features[rows])
                ]
            )
        found.append(np.sort(np.concatenate(nearest, axis=1), axis=1)[:, neighbours])
    return np.concatenate(found)


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _tiles(rows: np.ndarray) -> np.ndarray:
    """[n, ...] -> [tiles, TILE, ...], padded by copies of the last row, which change no membership and no overflow."""
    tile = min(TILE, len(rows))
    padding = ((0, -len(rows) % tile), *((0, 0),) * (rows.ndim - 1))
    return np.pad(rows, padding, mode="edge").reshape(-1, tile, *rows.shape[1:])


def _in_float16_or_32(work: Callable, float16: bool):
    """Result of `work` on a block; in float16 if that is asked for and no distance overflows."""
    if float16:
        finite, found = work(float16=True)
        if finite:
            return jax.device_get(found)
    return jax.device_get(work(float16=False)[1])


@functools.partial(jax.jit, static_argnames=("count", "float16"))
def _nearest(
    tiles: Float32[Array, "T t D"], columns: Float32[Array, "m D"], *, count: int, float16: bool
) -> tuple[Bool[Array, ""], Float32[Array, "n count"]]:
    """Whether all distances are finite, and the `count` smallest of each row."""

    def one(rows):
        distances = _distances(rows, columns, float16)
        return jnp.isfinite(distances).all(), -jax.lax.top_k(-distances, count)[0]

    finite, nearest = jax.lax.map(one, tiles)
    return finite.all(), nearest.reshape(-1, count)


@functools.partial(jax.jit, static_argnames="float16")
def _memberships(
    tiles: Float32[Array, "T t D"],
    tile_radii: Float32[Array, "T t"],
    columns: Float32[Array, "m D"],
    column_radii: Float32[Array, " m"],
    *,
    float16: bool,
) -> tuple[Bool[Array, ""], tuple[Bool[Array, " m"], Bool[Array, " n"]]]:
    """Whether all distances are finite; which columns are among the rows, and which rows among the columns."""

    def one(tile):
        rows, row_radii = tile
        distances = _distances(rows, columns, float16)
        return (
            jnp.isfinite(distances).all(),
            (distances <= row_radii[:, None]).any(0),
            (distances <= column_radii).any(1),
        )

    finite, in_rows, in_columns = jax.lax.map(one, (tiles, tile_radii))
    return finite.all(), (in_rows.any(0), in_columns.reshape(-1))


def _distances(u: Float32[Array, "n D"], v: Float32[Array, "m D"], float16: bool) -> Float32[Array, "n m"]:
    """max(|u|^2 - 2 u.v + |v|^2, 0), in the evaluator's order of operations; sums of products in float32."""
    rounded = _to_float16 if float16 else lambda x: x
    u, v = rounded(u), rounded(v)
    norm_u, norm_v = (rounded(rounded(x * x).sum(1)) for x in (u, v))
    product = rounded(jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST))
    return jnp.maximum(rounded(rounded(norm_u[:, None] - rounded(2 * product)) + norm_v), 0)


def _to_float16(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The nearest float16, infinity beyond 65,504. XLA may skip a conversion there and back, and this it may not."""
    small = jnp.round(x * 2.0**24) * 2.0**-24  # float16 has equal steps below 2**-14, which reduce_precision drops
    return jnp.where(jnp.abs(x) < 2.0**-14, small, jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10))
