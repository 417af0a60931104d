r"""One call of SDXL's U-Net compiled by XLA for an H200, by size: GSPN beside flash attention, at equal steps.

python benchmarks/unet_compile.py --size 1024 1024 --mixer gspn             one program
python benchmarks/unet_compile.py --size 8192 16384 --mixer gspn --record   and into benchmarks/results
python benchmarks/unet_compile.py --size 8192 16384 --blocks 1 1 --record   with fewer blocks: a smaller program
python benchmarks/unet_compile.py --size 8192 16384 --level 2 --record      what a block of a level adds to a network
python benchmarks/unet_compile.py --all 30                                  what is not recorded, for so many minutes
python benchmarks/unet_compile.py --render                                  the table, from the results

Blocks of a level are alike, so that the bound of a call is linear in their numbers. Where the whole network (2 and 10
blocks a transformer) is not recorded, the table has the plane through 1 1, 2 1 and 1 2, or else 1 1 with as many times
what a block adds as there are more of them; and the largest temporary memory of those programs. What a block adds is
the difference of two small networks of one level, whose middle has one block and none.

Needs jax[cuda13] and no GPU, as `gpu_compile.py`, whose description of the device and untuned compilation these are. A
call has one image in bfloat16: guidance takes its two halves in turn. GSPN is the pure form with proxies of an eighth,
without skip, in chunks of 4 lines. Times are bounds: every kernel takes at least as long as its bytes at 85 % of the
memory bandwidth, and as its operations at 700 TFLOP/s, here of convolutions, attention and the proxies that our kernel
expands as well as of products.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "unet_compile.json"
SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (8192, 16384))
"""Pixels: the rows of the table."""


WHOLE = (2, 10)
"""Blocks of each transformer of SDXL at its two coarser levels."""
TRANSFORMERS = (5, 6)
"""Transformers of each of these levels: two on the way down, three on the way up, and the middle's."""


def whole_network(blocks: tuple[int, int]) -> Any:
    """SDXL with so many blocks in each transformer."""
    from gspn_jax import unet

    return dataclasses.replace(unet.SDXL, depths=(0, *blocks), middle_depth=blocks[1])


def one_level(level: int, depth: int) -> Any:
    """A network of one level of SDXL, with a transformer of so many blocks in its middle."""
    from gspn_jax import unet

    return dataclasses.replace(
        unet.SDXL,
        channels=unet.SDXL.channels[level : level + 1],
        heads=unet.SDXL.heads[level : level + 1],
        layers=0,
        depths=(0,),
        middle_depth=depth,
    )


def lower(config: Any, size: tuple[int, int], mixer: str, pieces: int, device: Any) -> Any:
    """The lowered program of one call of a network, of latents of `size`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from gspn_jax import unet
    from gspn_jax.models.attention import attention
    from gspn_jax.text_to_image import gspn_layers
    from gspn_jax.text_to_image.high_resolution import CHANNELS

    options = gspn_layers.LayerOptions()
    with_norms = dataclasses.replace(config, middle_depth=max(config.middle_depth, 1))  # in the middle

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))

    weights = {
        name: struct(*(shape[2:] + shape[1::-1]))
        for name, shape in unet.expected_shapes(with_norms).items()
        if mixer != "gspn" or ".attn1." not in name
    }
    layers = {name: struct(*own.shape) for name, own in gspn_layers.shapes(config, options).items()}

    def call(weights, layers, x, time, context, pooled, sizes):
        mixed = gspn_layers.mixer(layers, config, options, channels=CHANNELS) if mixer == "gspn" else None
        added = unet.Added(pooled, sizes)
        execution = unet.Execution(pieces=pieces)
        return unet.apply(weights, config, x, time, context, added, attend=attention, mixer=mixed, execution=execution)

    latents = struct(1, *size, 4)
    return jax.jit(call).lower(
        weights,
        layers if mixer == "gspn" else {},
        latents,
        struct(1),
        struct(1, 77, 2048),
        struct(1, 1280),
        struct(1, 6),
    )


def operations(program: Any, computation: str, kernel: Any) -> int:
    """Operations of products, convolutions, flash attention and the expansion of proxies on chip, 2 a multiply-add."""
    from benchmarks.hlo import arrays

    body = program.computations[computation]
    if kernel.opcode == "fusion":
        return sum(operations(program, kernel.calls, found) for found in program.computations[kernel.calls].values())
    if kernel.opcode == "custom-call" and "cudnn" in kernel.target:
        shapes = [dims for name in kernel.operands for _, dims in arrays(body[name].shape)[:1]]
        (_, result), *_ = arrays(kernel.shape)
        if "fmha" in kernel.target:
            queries, keys = shapes[:2]
            return 4 * math.prod(queries) * math.prod(keys) // (keys[0] * keys[-1] * _heads(queries, keys))
        labels = kernel.attribute(r"dim_labels=\w+_(\w+)->") or ""
        window = shapes[1]
        return 2 * math.prod(result) * math.prod(window) // window[labels.index("o")]
    if kernel.opcode == "custom-call" and "mosaic" in kernel.target:
        (x, *_), *others = ([dims for _, dims in arrays(body[name].shape)] for name in kernel.operands)
        factors = [dims for (dims, *_) in others if len(dims) == FACTORS and dims[:3] != x[:3]]
        return 2 * math.prod(x[:3]) * sum(map(math.prod, factors))
    return program.operations(computation, kernel)


FACTORS = 5
"""Axes of the factors by which our kernel expands a proxy: directions, slabs, kinds, channels, width of the proxy. What
else has so many is a map, as x is."""


def _heads(queries: tuple[int, ...], keys: tuple[int, ...]) -> int:
    """The axis that queries and keys [B, N, heads, d], [B, M, heads, d] share beside images and width."""
    return queries[2] if queries[2] == keys[2] else queries[1]


def measures(text: str) -> dict[str, Any]:
    """Bound of the call on an H200, by kind of work."""
    from benchmarks import hlo, roofline

    program, rows = (
        hlo.Program(text),
        collections.defaultdict(lambda: dict.fromkeys(("ms", "gigabytes", "teraflop"), 0.0)),
    )
    computations = {loop: computation for loop, computation, _ in program.runs()}
    for kernel in roofline.kernels(program):
        done = operations(program, computations[kernel.loop], kernel.instruction)
        moved = kernel.read + kernel.written
        seconds = max(moved / (roofline.BANDWIDTH["h200"] * roofline.EFFICIENCY), done / roofline.PRODUCTS["h200"])
        row = rows[kernel.kind]
        row["ms"] += 1e3 * kernel.times * seconds
        row["gigabytes"] += 1e-9 * kernel.times * moved
        row["teraflop"] += 1e-12 * kernel.times * done
    kinds = dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))
    return {"ms": sum(row["ms"] for row in kinds.values()), "kinds": kinds}


def compiled(config: Any, size: tuple[int, int], mixer: str, pieces: int) -> tuple[dict[str, Any], str]:
    """(results, HLO text) of one program, of latents of `size`."""
    from benchmarks import gpu_compile

    device = gpu_compile.devices("h200", 1)[0]
    start = time.monotonic()
    with gpu_compile.traced_for(device):
        lowered = lower(config, size, mixer, pieces, device)
    options = {name: {"true": True, "false": False}.get(value, value) for name, value in gpu_compile.OPTIONS.items()}
    program = lowered.compile(options)
    seconds, text, memory = time.monotonic() - start, program.as_text(), program.memory_analysis()
    return measures(text) | {
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "seconds": round(seconds, 1),
    }, text


def about(size: Sequence[int], mixer: str, pieces: int) -> dict[str, Any]:
    """Notes that go with a result: size, mixer, pieces, date and versions."""
    from benchmarks import gpu_compile

    versions, date = gpu_compile.versions(), datetime.date.today().isoformat()
    return {"size": list(size), "mixer": mixer, "pieces": pieces, "date": date, "versions": versions}


def of_network(size: tuple[int, int], mixer: str, blocks: tuple[int, int], pieces: int) -> tuple[dict[str, Any], str]:
    """(results, HLO text) of SDXL with so many blocks in each transformer."""
    found, text = compiled(whole_network(blocks), (size[0] // 8, size[1] // 8), mixer, pieces)
    return about(size, mixer, pieces) | {"blocks": list(blocks)} | found, text


@functools.cache
def without_block(latents: tuple[int, int], level: int, pieces: int) -> dict[str, Any]:
    """Results of the network of one level that has no block, and so no mixer."""
    return compiled(one_level(level, 0), latents, "attention", pieces)[0]


def of_block(size: tuple[int, int], mixer: str, level: int, pieces: int) -> dict[str, Any]:
    """Results of one block of a level: what it adds to the network of that level without one."""
    latents = (size[0] // 8 // 2**level, size[1] // 8 // 2**level)
    without = without_block(latents, level, pieces)
    found, _ = compiled(one_level(level, 1), latents, mixer, pieces)
    kinds = {
        kind: {"ms": found["kinds"].get(kind, {"ms": 0.0})["ms"] - without["kinds"].get(kind, {"ms": 0.0})["ms"]}
        for kind in found["kinds"] | without["kinds"]
    }
    seconds = without["seconds"] + found["seconds"]
    return about(size, mixer, pieces) | {"level": level, "ms": found["ms"] - without["ms"], "kinds": kinds} | {
        "temporary_gb": found["temporary_gb"], "seconds": seconds,
    }  # fmt: skip


def name_of(result: dict[str, Any]) -> str:
    if "level" in result:
        return _block_name(result["mixer"], result["size"], result["level"])
    return _name(result["mixer"], result["size"], result["blocks"])


def _name(mixer: str, size: Sequence[int], blocks: Sequence[int]) -> str:
    return f"{mixer} {'x'.join(map(str, size))}, {' and '.join(map(str, blocks))} blocks"


def _block_name(mixer: str, size: Sequence[int], level: int) -> str:
    return f"{mixer} {'x'.join(map(str, size))}, a block of level {level}"


def of_whole(results: dict[str, Any], mixer: str, size: Sequence[int]) -> dict[str, Any] | None:
    """Results of the whole network: its own, by the plane through three smaller ones, or by what blocks add to the
    smallest; None without them. "how" says which."""
    if found := results.get(_name(mixer, size, WHOLE)):
        return found | {"how": "whole"}
    least = results.get(_name(mixer, size, (1, 1)))
    larger = [results.get(_name(mixer, size, blocks)) for blocks in ((2, 1), (1, 2))]
    added = [results.get(_block_name(mixer, size, level)) for level in (1, 2)]
    more = [count - 1 for count in WHOLE]
    if least and None not in larger:
        others, how = larger, "plane"

        def whole(ms: float, *values: float) -> float:
            return ms + sum(count * (value - ms) for count, value in zip(more, values, strict=True))
    elif least and None not in added:
        others, how = added, "blocks"

        def whole(ms: float, *values: float) -> float:
            counts = (count * number for count, number in zip(more, TRANSFORMERS, strict=True))
            return ms + sum(count * value for count, value in zip(counts, values, strict=True))
    else:
        return None
    parts = (least, *others)
    kinds = {kind for found in parts for kind in found["kinds"]}
    rows = {kind: {"ms": whole(*(found["kinds"].get(kind, {"ms": 0.0})["ms"] for found in parts))} for kind in kinds}
    temporary = max(found["temporary_gb"] for found in parts)
    return {"ms": whole(*(found["ms"] for found in parts)), "kinds": rows, "temporary_gb": temporary, "how": how}


def recorded() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(result: dict[str, Any]) -> None:
    """Puts a result in the place of an older one of the same program."""
    from gspn_jax.files import replacing

    results = recorded()
    results[name_of(result)] = result
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def record_all(minutes: float, pieces: int) -> None:
    """Records what the table needs and is not there, until so many minutes have passed: the longest images first."""
    start = time.monotonic()
    for size in sorted(SIZES, key=lambda size: -math.prod(size)):
        wanted = [(mixer, level) for level in (1, 2) for mixer in ("gspn", "attention")]
        for mixer, level in wanted:
            if _block_name(mixer, size, level) not in recorded() and time.monotonic() - start < 60 * minutes:
                record(of_block(size, mixer, level, pieces))
        for mixer in ("gspn", "attention"):
            if _name(mixer, size, (1, 1)) not in recorded() and time.monotonic() - start < 60 * minutes:
                record(of_network(size, mixer, (1, 1), pieces)[0])


def table(results: dict[str, Any]) -> str:
    """Rows of docs/text_to_image.md."""
    lines = [
        "| pixels | attention ms | of it attention | GSPN ms | of it scans and around them | ratio | attention GB | "
        "GSPN GB | made of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        label = "x".join(map(str, size))
        attention, gspn = (of_whole(results, mixer, size) for mixer in ("attention", "gspn"))
        if attention and gspn:
            scans = sum(row["ms"] for kind, row in gspn["kinds"].items() if "scans" in kind)
            flash = attention["kinds"].get("attention", {"ms": 0.0})["ms"]  # with that to the text
            how = gspn["how"] if gspn["how"] == attention["how"] else f"{attention['how']}, {gspn['how']}"
            lines.append(
                f"| {label} | {attention['ms']:,.1f} | {flash:,.1f} | {gspn['ms']:,.1f} | {scans:.1f} | "
                f"{attention['ms'] / gspn['ms']:.2f} | {attention['temporary_gb']:.2f} | {gspn['temporary_gb']:.2f} | "
                f"{how} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--mixer", choices=("gspn", "attention"), default="gspn")
    parser.add_argument("--blocks", type=int, nargs=2, default=WHOLE, help="of each transformer at the coarser levels")
    parser.add_argument("--level", type=int, choices=(1, 2), help="only what a block of that level adds")
    parser.add_argument("--all", type=float, metavar="MINUTES", help="record what the table needs and is not there")
    parser.add_argument("--pieces", type=int, default=16, help="runs of tokens of the feed-forwards")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="where to keep the compiled program's text")
    parser.add_argument("--record", action="store_true", help="add the result to benchmarks/results")
    parser.add_argument("--render", action="store_true", help="print the table of what is recorded")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin for CUDA is loaded all the same, and no GPU is looked for
    sys.path.insert(0, str(ROOT))
    logging.basicConfig(level="INFO", format="%(message)s")
    if arguments.render:
        print(table(recorded()))
        return
    if arguments.all:
        record_all(arguments.all, arguments.pieces)
        return
    size, text = tuple(arguments.size), ""
    if arguments.level:
        result = of_block(size, arguments.mixer, arguments.level, arguments.pieces)
    else:
        result, text = of_network(size, arguments.mixer, tuple(arguments.blocks), arguments.pieces)
    if arguments.hlo:
        arguments.hlo.write_text(text)
    if arguments.record:
        record(result)
    print(json.dumps({name: value for name, value in result.items() if name != "versions"}, indent=1))


if __name__ == "__main__":
    main()
