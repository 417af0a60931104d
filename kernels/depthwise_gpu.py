"""Depthwise convolution as Pallas kernels for NVIDIA GPUs (Mosaic GPU): correlation, its kernel's gradient, and all
gradients of y * relu(y) at once.

A thread has 2 neighbouring channels, or one, of a slab, and everything else is a loop: a warpgroup goes along a row of
the image with a window of sums (correlation) or of products (gradient) in registers. docs/kernel_depthwise.md has the
arithmetic.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, launch, reference, shared_memory
from gspn_jax.kernels.depthwise_plan import Plan, apply_if, correlate_gradient, correlate_row
from gspn_jax.kernels.derivatives import differentiable

SIDES = (3, 5, 7)
"""Heights and widths of kernels."""
WIDEST = 4096
"""Columns of an image. For all widths up to it the halo on either side of a segment is inside of the image or outside,
never both (of wider ones 5,942 is the first)."""
MOST = 2**16 - 1
"""Blocks along an axis of CUDA's grid but the first: images times slabs."""
TAPS = 2
"""Rows of the kernel whose gradient a warpgroup computes: a cotangent is loaded and widened once for them."""


def refuses(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> str | None:
    """Why the GPU kernel cannot take them, in words, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {x.dtype}"
    if not {*kernel.shape[:2]} <= {*SIDES}:
        return f"takes kernels of {', '.join(map(str, SIDES))} rows and columns, not {list(kernel.shape[:2])}"
    if x.shape[3] < 128 or 0 in x.shape:
        return f"takes at least 128 channels and no empty axis, not {list(x.shape)}"
    if x.shape[2] > WIDEST:
        return f"takes images of up to {WIDEST} columns, not {x.shape[2]}"
    if x.shape[0] * Plan.of(x.shape, kernel.shape[:2]).slabs > MOST:
        return f"takes up to {MOST} slabs of channels of all images, not those of {list(x.shape)}"
    return None


def correlate(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], squared_relu: bool
) -> Float[Array, "B H W C"]:
    """See `kernels.depthwise_conv`; arguments are checked there, and by `refuses`. The kernel is used in float32."""
    finish = _squared_relu if squared_relu else _unchanged

    def forward(arrays: tuple[Array, Array]) -> Array:
        return _correlate(*arrays, finish=finish)

    def plain(arrays: tuple[Array, Array]) -> Array:
        return finish(reference.depthwise_conv(*arrays)).astype(arrays[0].dtype)

    backward = functools.partial(_backward, squared_relu=squared_relu)
    return differentiable(forward, plain=plain, pull_back=backward)((x, kernel))


def _backward(arrays: tuple[Array, Array], _: tuple, cotangent: Array, *, squared_relu: bool) -> tuple[Array, Array]:
    x, kernel = arrays
    cotangent = cotangent.astype(x.dtype)
    if squared_relu and Plan.of(x.shape, kernel.shape[:2]).fits_at_once:
        return squared_relu_gradients(x, kernel, cotangent)
    if squared_relu:  # computes the convolution again, which is less than to write it and read it
        cotangent = _correlate(x, kernel, cotangent, finish=_squared_relu_gradient)
    grad_x = _correlate(cotangent, kernel, finish=_unchanged, turned=True)
    return grad_x, kernel_gradient(x, cotangent, kernel.shape[:2]).astype(kernel.dtype)


def _unchanged(y: Array) -> Array:
    return y


def _squared_relu(y: Array) -> Array:
    return y * jnp.maximum(y, 0.0)


def _squared_relu_gradient(y: Array, cotangent: Array) -> Array:
    return 2.0 * jnp.maximum(y, 0.0) * cotangent


def _correlate(
    x: Array, kernel: Array, *others: Array, finish: Callable, turned: bool = False
) -> Float[Array, "B H W C"]:
    """`finish` of the correlation and of `others`, arrays like x; `turned`: with the kernel turned by half a circle,
    which gives the gradient of x."""
    plan = Plan.of(x.shape, kernel.shape[:2])
    grid = {"image": x.shape[0], "slab": plan.slabs, "strip": plan.strips(x.shape[0]), "segment": plan.segments}
    body = functools.partial(correlate_rows, plan=plan, finish=finish, turned=turned)
    arrays = x, kernel.astype(jnp.float32), *others
    return launch.run(body, grid, plan.warpgroups, arrays, jax.ShapeDtypeStruct(x.shape, x.dtype), name="depthwise")


def correlate_rows(inputs: Any, y: Any, _: tuple, *, plan: Plan, finish: Callable, turned: bool) -> None:
    """A block takes a strip of rows of an image, its warpgroups one after the other `plan.together` of them."""
    x, kernel, *others = inputs
    image, warpgroup = lax.axis_index("image"), lax.axis_index("warpgroup")
    rows, first = plan.rows(x.shape[0]), plan.first_column(lax.axis_index("segment"))
    top = lax.axis_index("strip") * rows
    bottom = lax.min(top + rows, plan.height)
    middle, halo, together = plan.kernel_height // 2, plan.kernel_width // 2, plan.together

    def add_row(row: Array, those: range, m: Array, sums: list[tuple]) -> list[tuple]:
        """Adds to `those` rows of sums the products of a row of x: with row m - i of the kernel to row i."""
        line = plan.row(x, (image, row + m - middle), first, halo)
        for i in those:
            taps = plan.taps(kernel, 2 * middle - m + i if turned else m - i, turned)
            sums[i] = correlate_row(sums[i], line, taps)
        return sums

    def add_rows(row: Array) -> list[tuple]:
        """The sums of `together` rows from this one on."""
        sums = [(plan.zeros(),) * plan.length] * together
        begin, end = lax.max(middle - row, 0), lax.min(plan.height + middle - row, plan.kernel_height + together - 1)
        for those, start, stop in plan.passes:
            add = functools.partial(add_row, row, those)
            sums = lax.fori_loop(lax.max(begin, start), lax.min(end, stop), add, sums)
        return sums

    def store(row: Array, sums: tuple) -> None:
        for column, found in enumerate(sums):
            pixel = image, row, first + column
            compat.store(y, (*pixel, plan.mine()), finish(found, *(plan.read(other, *pixel) for other in others)))

    step = together * plan.warpgroups

    @pl.loop(0, lax.div(bottom - top - together * warpgroup + step - 1, step))
    def _(n):
        row = top + together * warpgroup + n * step
        for i, sums in enumerate(add_rows(row)):
            write = functools.partial(store, row + i, sums)
            write() if together == 1 else pl.when(row + i < bottom)(write)


def kernel_gradient(x: Array, cotangent: Array, size: tuple[int, int]) -> Float[Array, "kh kw C"]:
    """Each block sums over its part of all rows of all images; the parts are added up here, always in one order."""
    plan = Plan.of(x.shape, size)
    blocks = max(1, plan.device.multiprocessors * (max(SIDES) // size[0]) // plan.slabs)  # of up to four warpgroups
    parts = min(blocks, x.shape[0] * plan.segments * plan.height)
    grid = {"slab": plan.slabs, "part": parts}
    body = functools.partial(sum_kernel_gradient, plan=plan)
    output = jax.ShapeDtypeStruct((parts, *size, plan.channels), jnp.float32)
    return launch.run(body, grid, math.ceil(size[0] / TAPS), (x, cotangent), output, name="depthwise").sum(0)


def sum_kernel_gradient(inputs: Any, found: Any, _: tuple, *, plan: Plan) -> None:
    """A warpgroup takes `TAPS` rows of the kernel."""
    x, cotangent = inputs
    m, part = lax.axis_index("warpgroup") * TAPS, lax.axis_index("part")
    middle, halo = plan.kernel_height // 2, plan.kernel_width // 2
    lines = x.shape[0] * plan.segments * plan.height
    share = math.ceil(lines / found.shape[0])
    begin = lax.min(part * share, lines)
    end = lax.min(begin + share, lines)

    def add_piece(piece: Array, taps: list[tuple]) -> list[tuple]:
        """Adds the rows of a segment of an image."""
        image, segment = lax.div(piece, plan.segments), lax.rem(piece, plan.segments)
        first = plan.first_column(segment)

        def add_row(row: Array, taps: list[tuple]) -> list[tuple]:
            given = plan.row(cotangent, (image, row), first, 0)
            if plan.width % plan.length:  # columns that the segment shares with the one before it
                given = [
                    jnp.where(jnp.broadcast_to(first + column >= segment * plan.length, a.shape), a, 0.0)
                    for column, a in enumerate(given)
                ]

            def add(other: Array, taps: tuple) -> tuple:
                return correlate_gradient(taps, plan.row(x, (image, other), first, halo), given)

            for i in range(TAPS):
                other = row + m + i - middle
                inside = (other >= 0) & (other < plan.height) & (m + i < plan.kernel_height)
                taps[i] = apply_if(inside, functools.partial(add, other), taps[i])
            return taps

        top = lax.max(begin - piece * plan.height, 0)
        bottom = lax.min(end - piece * plan.height, plan.height)
        return lax.fori_loop(top, bottom, add_row, taps)

    pieces = lax.div(begin, plan.height), lax.div(end + plan.height - 1, plan.height)
    taps = lax.fori_loop(*pieces, add_piece, [(plan.zeros(),) * plan.kernel_width] * TAPS)
    for i, row in enumerate(taps):

        @pl.when(m + i < plan.kernel_height)
        def _(i=i, row=row):
            for n, tap in enumerate(row):
                compat.store(found, (part, m + i, n, plan.mine()), tap)


def squared_relu_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    """Gradients of y * relu(y) with respect to x and to the kernel, whose parts are added up as `kernel_gradient`'s."""
    plan = Plan.of(x.shape, kernel.shape[:2])
    lines = x.shape[0] * plan.height
    share = math.ceil(lines / plan.blocks)
    parts = math.ceil(lines / share)
    grid = {"slab": plan.slabs, "part": parts}
    outputs = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((parts, *kernel.shape), jnp.float32))
    held = shared_memory.row_major((plan.kernel_height, plan.width, plan.slab))
    body = functools.partial(pull_back_squared_relu, plan=plan, share=share)
    arrays = x, kernel.astype(jnp.float32), cotangent
    grad_x, by_part = launch.run(body, grid, 1, arrays, outputs, held, name="depthwise")
    return grad_x, by_part.sum(0).astype(kernel.dtype)


def pull_back_squared_relu(inputs: Any, outputs: Any, held: Any, *, plan: Plan, share: int) -> None:
    """A warpgroup goes down its share of the rows of all images and holds the cotangents of y of as many rows as the
    kernel has, each of which a thread reads where it wrote, so that none waits for another."""
    x, kernel, cotangent = inputs
    grad_x, found = outputs
    part, rows, columns, height = lax.axis_index("part"), plan.kernel_height, plan.kernel_width, plan.height
    middle, halo = rows // 2, columns // 2
    begin = lax.min(part * share, x.shape[0] * height)
    end = lax.min(begin + share, x.shape[0] * height)
    zeros = (plan.zeros(),) * plan.length

    def place(row: Array) -> Array:
        return lax.rem(row, rows)

    def hold_cotangent(image: Array, row: Array) -> None:
        def add_row(m: Array, sums: tuple) -> tuple:
            twice = [tap + tap for tap in plan.taps(kernel, m)]
            return correlate_row(sums, plan.row(x, (image, row + m - middle), 0, halo), twice)

        rows_inside = lax.max(middle - row, 0), lax.min(height + middle - row, rows)
        given = plan.row(cotangent, (image, row), 0, 0)
        for column, twice_y in enumerate(lax.fori_loop(*rows_inside, add_row, zeros)):
            compat.store(held, (place(row), column, slice(None)), jnp.maximum(twice_y, 0.0) * given[column])

    def pull_back_row(image: Array, row: Array, taps: list[tuple]) -> list[tuple]:
        """Stores the gradient of x, and adds what the row of x gives to the kernel's, turned by half a circle."""
        pixels, sums = plan.row(x, (image, row), 0, 0), zeros
        for m in range(rows):
            other = row + m - middle

            def add(found: tuple, m: int = m, other: Array = other) -> tuple:
                sums, taps = found
                line = plan.row(held, (place(other),), 0, halo)
                turned = plan.taps(kernel, rows - 1 - m, turned=True)
                return correlate_row(sums, line, turned), correlate_gradient(taps, line, pixels)

            sums, taps[m] = apply_if((other >= 0) & (other < height), add, (sums, taps[m]))
        for column, a in enumerate(sums):
            compat.store(grad_x, (image, row, column, plan.mine()), a)
        return taps

    def go_through_image(image: Array, taps: list[tuple]) -> list[tuple]:
        top, bottom = lax.max(begin - image * height, 0), lax.min(end - image * height, height)

        def go_down(row: Array, taps: list[tuple]) -> list[tuple]:
            @pl.when(row < height)
            def _():
                hold_cotangent(image, row)

            done = row - middle
            return lax.fori_loop(lax.max(done, top), done + 1, lambda row, taps: pull_back_row(image, row, taps), taps)

        return lax.fori_loop(lax.max(top - middle, 0), bottom + middle, go_down, taps)

    images = lax.div(begin, height), lax.div(end + height - 1, height)
    taps = lax.fori_loop(*images, go_through_image, [(plan.zeros(),) * columns] * rows)
    for m in range(rows):
        for n in range(columns):
            compat.store(found, (part, rows - 1 - m, columns - 1 - n, plan.mine()), taps[m][n])
