r"""One call of SDXL's U-Net compiled by XLA for an H200, by size: GSPN beside flash attention, at equal steps.

python benchmarks/unet_compile.py --size 1024 1024 --mixer gspn             one program
python benchmarks/unet_compile.py --size 8192 16384 --mixer gspn --record   and into benchmarks/results
python benchmarks/unet_compile.py --size 8192 16384 --blocks 1 1 --record   with fewer blocks: a smaller program
python benchmarks/unet_compile.py --render                                  the table, from the results

Blocks of a level are alike, so that the bound of a call is linear in their numbers: where the whole network (2 and 10
blocks a transformer) is not recorded, the table has the plane through 1 1, 2 1 and 1 2, and the largest of their
temporary memory.

Needs jax[cuda13] and no GPU, as `gpu_compile.py`, whose description of the device and untuned compilation these are. A
call has one image in bfloat16: guidance takes its two halves in turn. GSPN is the pure form with proxies of an eighth,
without skip, in chunks of 4 lines. Times are bounds: every kernel takes at least as long as its bytes at 85 % of the
memory bandwidth, and as its operations at 700 TFLOP/s, here of convolutions and attention as well as of products.
"""

import argparse
import collections
import datetime
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


def lower(size: tuple[int, int], mixer: str, blocks: tuple[int, int], pieces: int, device: Any) -> Any:
    """The lowered program of one call, of SDXL with so many blocks in each transformer."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from gspn_jax import unet
    from gspn_jax.models.attention import attention
    from gspn_jax.text_to_image import gspn_layers
    from gspn_jax.text_to_image.high_resolution import CHANNELS

    config, options = (
        dataclasses.replace(unet.SDXL, depths=(0, *blocks), middle_depth=blocks[1]),
        gspn_layers.LayerOptions(),
    )

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))

    weights = {
        name: struct(*(shape[2:] + shape[1::-1]))
        for name, shape in unet.expected_shapes(config).items()
        if mixer != "gspn" or ".attn1." not in name
    }
    layers = {name: struct(*own.shape) for name, own in gspn_layers.shapes(config, options).items()}

    def call(weights, layers, x, time, context, pooled, sizes):
        mixed = gspn_layers.mixer(layers, config, options, channels=CHANNELS) if mixer == "gspn" else None
        added = unet.Added(pooled, sizes)
        execution = unet.Execution(pieces=pieces)
        return unet.apply(weights, config, x, time, context, added, attend=attention, mixer=mixed, execution=execution)

    latents = struct(1, size[0] // 8, size[1] // 8, 4)
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
    """Operations of products, convolutions and flash attention, 2 a multiply-add."""
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
    return program.operations(computation, kernel)


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
        seconds = max(moved / (roofline.BANDWIDTH["h200"] * roofline.EFFICIENCY), done / roofline.PRODUCTS)
        row = rows[kernel.kind]
        row["ms"] += 1e3 * kernel.times * seconds
        row["gigabytes"] += 1e-9 * kernel.times * moved
        row["teraflop"] += 1e-12 * kernel.times * done
    kinds = dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))
    return {"ms": sum(row["ms"] for row in kinds.values()), "kinds": kinds}


def compiled(size: tuple[int, int], mixer: str, blocks: tuple[int, int], pieces: int) -> tuple[dict[str, Any], str]:
    """(results, HLO text) of one program."""
    from benchmarks import gpu_compile

    device = gpu_compile.devices("h200", 1)[0]
    start = time.monotonic()
    with gpu_compile.traced_for(device):
        lowered = lower(size, mixer, blocks, pieces, device)
    options = {name: {"true": True, "false": False}.get(value, value) for name, value in gpu_compile.OPTIONS.items()}
    program = lowered.compile(options)
    seconds, text, memory = time.monotonic() - start, program.as_text(), program.memory_analysis()
    about = {
        "size": list(size),
        "mixer": mixer,
        "blocks": list(blocks),
        "pieces": pieces,
        "date": datetime.date.today().isoformat(),
        "versions": gpu_compile.versions(),
        "seconds": round(seconds, 1),
    }
    return about | measures(text) | {
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
    }, text


def name_of(result: dict[str, Any]) -> str:
    return _name(result["mixer"], result["size"], result["blocks"])


def _name(mixer: str, size: Sequence[int], blocks: Sequence[int]) -> str:
    return f"{mixer} {'x'.join(map(str, size))}, {' and '.join(map(str, blocks))} blocks"


def of_whole(results: dict[str, Any], mixer: str, size: Sequence[int]) -> dict[str, Any] | None:
    """Results of the whole network: its own, or by the plane through three smaller ones; None without them."""
    if found := results.get(_name(mixer, size, WHOLE)):
        return found
    smaller = [results.get(_name(mixer, size, blocks)) for blocks in ((1, 1), (2, 1), (1, 2))]
    if None in smaller:
        return None

    def whole(least: float, one: float, other: float) -> float:
        return least + (WHOLE[0] - 1) * (one - least) + (WHOLE[1] - 1) * (other - least)

    kinds = {kind for found in smaller for kind in found["kinds"]}
    rows = {kind: {"ms": whole(*(found["kinds"].get(kind, {"ms": 0.0})["ms"] for found in smaller))} for kind in kinds}
    temporary = max(found["temporary_gb"] for found in smaller)
    return {"ms": whole(*(found["ms"] for found in smaller)), "kinds": rows, "temporary_gb": temporary}


def record(result: dict[str, Any]) -> None:
    """Puts a result in the place of an older one of the same program."""
    from gspn_jax.files import replacing

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name_of(result)] = result
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Rows of docs/text_to_image.md."""
    lines = [
        "| pixels | attention ms | GSPN ms | ratio | attention GB | GSPN GB | of GSPN: scans and around them ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        label = "x".join(map(str, size))
        attention, gspn = (of_whole(results, mixer, size) for mixer in ("attention", "gspn"))
        if attention and gspn:
            scans = sum(row["ms"] for kind, row in gspn["kinds"].items() if "scans" in kind)
            lines.append(
                f"| {label} | {attention['ms']:,.1f} | {gspn['ms']:,.1f} | {attention['ms'] / gspn['ms']:.2f} | "
                f"{attention['temporary_gb']:.2f} | {gspn['temporary_gb']:.2f} | {scans:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--mixer", choices=("gspn", "attention"), default="gspn")
    parser.add_argument("--blocks", type=int, nargs=2, default=WHOLE, help="of each transformer at the coarser levels")
    parser.add_argument("--pieces", type=int, default=16, help="runs of tokens of the feed-forwards")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="where to keep the compiled program's text")
    parser.add_argument("--record", action="store_true", help="add the result to benchmarks/results")
    parser.add_argument("--render", action="store_true", help="print the table of what is recorded")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin for CUDA is loaded all the same, and no GPU is looked for
    sys.path.insert(0, str(ROOT))
    logging.basicConfig(level="INFO", format="%(message)s")
    if arguments.render:
        print(table(json.loads(RESULTS.read_text())))
        return
    result, text = compiled(tuple(arguments.size), arguments.mixer, tuple(arguments.blocks), arguments.pieces)
    if arguments.hlo:
        arguments.hlo.write_text(text)
    if arguments.record:
        record(result)
    print(json.dumps({name: value for name, value in result.items() if name != "versions"}, indent=1))


if __name__ == "__main__":
    main()
