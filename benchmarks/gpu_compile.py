r"""GPU programs compiled by XLA for GPUs on a machine without one, and the least time that each could take.

python benchmarks/gpu_compile.py step GSPN-XL/2 --batch 64 --gpu h200      one training step, all 57 blocks
python benchmarks/gpu_compile.py step GSPN-XL/2 --batch 16 --gpu rtx4090   the same for compute capability 8.9
python benchmarks/gpu_compile.py step GSPN-XL/2 --batch 256 --mesh 8x1     data x fsdp, over 8 GPUs
python benchmarks/gpu_compile.py sampler GSPN-L/2 --batch 64               the sampler, by its evaluations
python benchmarks/gpu_compile.py step GSPN-T --batch 128                   one training step of an image classifier
python benchmarks/gpu_compile.py inference GSPN-T --batch 128              its classes of a batch
python benchmarks/gpu_compile.py recorded     every program of docs/performance.md, with its results
python benchmarks/gpu_compile.py render       docs/performance.md again from the results
make gpu-compile ARGS="step GSPN-B/2"         the same in an environment of its own (JAX for CUDA, 4 GB of wheels)

XLA:GPU needs no device: it is given a description of one ("deviceless compilation"). Nothing is tuned, for that needs
the device: products go to cuBLAS, convolutions to cuDNN without an algorithm, and our kernels are in the program as
MLIR. The times are bounds (`benchmarks.roofline`), never measurements. A program takes 1 to 5 minutes and 2 GB.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_compile.json"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "nvidia-cudnn-cu13", "nvidia-cublas")
OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "false"}
"""Of XLA: nothing can be tuned without the device, and untuned Triton products have default tiles or none at all."""
RECORDED = (
    "step GSPN-XL/2 --batch 64",
    "step GSPN-XL/2 --batch 32",
    "step GSPN-XL/2 --batch 32 --remat full",
    "step GSPN-XL/2 --batch 256 --mesh 8x1",
    "step GSPN-XL/2 --batch 256 --mesh 1x8",
    "step GSPN-XL/2 --batch 256 --mesh 8x1 --remat full",
    "step GSPN-XL/2 --batch 256 --mesh 1x8 --remat full",
    "step GSPN-L/2 --batch 64",
    "step GSPN-B/2 --batch 64",
    "step DiT-XL/2 --batch 64",
    "sampler GSPN-XL/2 --batch 64",
    "sampler GSPN-L/2 --batch 64",
    "sampler DiT-XL/2 --batch 64",
    "step GSPN-XL/2 --batch 16 --gpu rtx4090",
    *(f"{what} {preset} --batch 128" for preset in ("GSPN-T", "GSPN-S", "GSPN-B") for what in ("step", "inference")),
)
"""The programs of docs/performance.md."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's cost models and tiling ask of a GPU; but for name and memory alike on all of compute capability 9.0.
    Bytes, of one multiprocessor or block where that is said."""

    name: str
    memory: int
    bandwidth: float
    """Bytes a second."""
    memory_clock: float
    """GHz, as NVIDIA's tools print it."""
    capability: str = "9.0a"
    feature: str = "feature_extension: ACCELERATED_FEATURES"
    cores: int = 132
    """Multiprocessors."""
    threads: int = 2048
    """That a multiprocessor keeps."""
    shared_memory: int = 233472
    """Of a multiprocessor."""
    block_shared_memory: int = 232448
    """Of a block that asks for more than 48 KiB."""
    l2_cache: int = 52428800


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 2.619),
    "h200": Gpu("NVIDIA H200", 151_397_597_184, 4.8e12, 3.201),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", 25_386_352_640, 1.008e12, 10.501, "8.9", "minor: 9", cores=128, threads=1536,
        shared_memory=102400, block_shared_memory=101376, l2_cache=75497472,
    ),
}  # fmt: skip
"""Clocks and units of the RTX 4090 are those of the others: they weigh in tuning alone, and nothing is tuned."""

_TARGET = """gpu_device_info {{
threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared_memory} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2_cache} clock_rate_ghz: 1.98
device_memory_size: {memory} shared_memory_per_block_optin: {block_shared_memory}
cuda_compute_capability {{ major: {major} {feature} }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536
scalar_unit_description {{ {scalar} }} matrix_unit_description {{ {matrix} }}
thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
platform_version: "Compute Capability {capability}" device_address_bits: 64 pcie_bandwidth: 34359738368
ecc_enabled: true
model_str: "sm_{capability} with {memory}B RAM, {cores} cores, 1980000KHz clock, "
"{memory_clock:.0f}KHz mem clock, {l2_cache}B L2$"
name: "{name}" driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
dnn_version: "9.28.1" device_interconnect_info {{ active_links: 18 }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 28 patch: 1 }} device_description_str: "{name}"
"""
"""A GpuTargetConfigProto in text. Type numbers below are those of xla_data.proto."""
_SCALAR = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
_MATRIX = {2: 1024, 6: 1024, 10: 512, 11: 256, 12: 32, 16: 512, 19: 1024, 20: 1024}


def target(gpu: str) -> str:
    """The description of `gpu` that XLA compiles for."""

    def rate(key: int, units: int, ops: int, clock: float) -> str:
        return (
            f"rate_infos {{ key: {key} value {{ clock_rate_ghz: {clock} units_per_core: {units} "
            f"ops_per_clock: {ops} }} }}"
        )

    about = dataclasses.asdict(GPUS[gpu])
    about["memory_clock"] *= 1e6
    scalar = " ".join(rate(key, *value, 1.98) for key, value in _SCALAR.items())
    matrix = " ".join(rate(key, 4, ops, 1.98 if key == 12 else 1.83) for key, ops in _MATRIX.items())
    major = about["capability"][0]
    return _TARGET.format(**about, major=major, scalar=scalar, matrix=matrix)


def devices(gpu: str, count: int) -> list:
    """`count` GPUs of one host, there to be compiled for and nothing else."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target(gpu), topology=f"1x1x{count}"
    ).devices


@contextlib.contextmanager
def traced_for(device: Any) -> Iterator[None]:
    """Inside, what asks for the device while it is traced is answered with `device`, which is not attached."""
    import jax

    from gspn_jax.kernels import devices as kernel_devices
    from gspn_jax.models import attention

    attached = jax.default_backend
    jax.default_backend = lambda: device.platform
    try:
        with kernel_devices.for_device(device.compute_capability), attention.traced_for(device):
            yield
    finally:
        jax.default_backend = attached


def is_classifier(preset: str) -> bool:
    """Whether a preset is one of images at 224 pixels, which have no patch size in their name."""
    return "/" not in preset


def classifier_config(arguments: argparse.Namespace):
    """The recipe of the preset, with what was asked for."""
    import importlib

    from gspn_jax.config import MeshConfig

    base = importlib.import_module("gspn_jax.configs." + arguments.preset.lower().replace("-", "_")).config
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **arguments.model, remat=arguments.remat or base.model.remat),
        mesh=MeshConfig(*arguments.mesh),
        data=dataclasses.replace(base.data, image_size=arguments.image_size),
        train=dataclasses.replace(base.train, batch_size=arguments.batch),
    )


def config_of(arguments: argparse.Namespace):
    """The config file of the preset, or of its family, with what was asked for."""
    if is_classifier(arguments.preset):
        return classifier_config(arguments)
    from gspn_jax.config import MeshConfig
    from gspn_jax.configs.dit_xl_2 import config as dit
    from gspn_jax.configs.gspn_xl_2 import config as gspn
    from gspn_jax.models import resolve

    base = dit if arguments.preset.startswith("DiT") else gspn
    model = {"preset": arguments.preset, "remat": arguments.remat or base.model.remat} | arguments.model
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **model),
        mesh=MeshConfig(*arguments.mesh),
        data=dataclasses.replace(base.data, image_size=arguments.image_size),
        train=dataclasses.replace(base.train, batch_size=arguments.batch),
    )
    resolve(config.model)
    return config


def lower(arguments: argparse.Namespace, config: Any, gpus: list) -> tuple[Any, int]:
    """(the lowered program, the training steps or network evaluations that it makes)."""
    import jax
    import jax.numpy as jnp

    from gspn_jax.classify.network import forward
    from gspn_jax.classify.task import ClassificationTask
    from gspn_jax.parallel import sharding
    from gspn_jax.sampling.sampler import Sampler
    from gspn_jax.training.diffusion import DiffusionTask
    from gspn_jax.training.state import abstract_state
    from gspn_jax.training.step import make_step

    mesh = sharding.make_mesh(config.mesh, gpus)
    sharding.check_batch(config, mesh)
    if arguments.what == "sampler":
        sampler = Sampler(config, mesh, decode=lambda latents: latents)
        return sampler.lower(arguments.batch), sampler.evaluations
    split, size = sharding.batch_sharding(mesh), config.data.image_size
    shape = (config.train.batch_size, size, size, config.data.channels)
    classifies = is_classifier(arguments.preset)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8 if classifies else jnp.float32, sharding=split),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
    }
    task = (ClassificationTask if classifies else DiffusionTask)(config)
    state = abstract_state(task, mesh)
    if arguments.what == "inference":
        logits = forward(config, task.network, mesh)
        return jax.jit(lambda *given: logits(*given).argmax(-1)).lower(state.params, batch["image"]), 1
    return make_step(task, mesh).lower(state, batch), 1


def compiled(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(results, HLO text) of one program."""
    from benchmarks.collectives import collectives

    config = config_of(arguments)
    gpus = devices(arguments.gpu, math.prod(arguments.mesh))
    with traced_for(gpus[0]):
        start = time.monotonic()
        lowered, runs = lower(arguments, config, gpus)
        lowering = time.monotonic() - start
    options = OPTIONS | arguments.xla
    program = lowered.compile({name: {"true": True, "false": False}.get(v, v) for name, v in options.items()})
    seconds = time.monotonic() - start - lowering
    text, memory = program.as_text(), program.memory_analysis()
    sent = {}
    for found in collectives(text, len(gpus)):
        row = sent.setdefault(found.kind, {"count": 0, "gigabytes_sent": 0.0})
        row["count"] += found.times
        row["gigabytes_sent"] += found.times * found.sent / 1e9
    about = {
        "what": arguments.what,
        "preset": arguments.preset,
        "batch": arguments.batch,
        "gpu": arguments.gpu,
        "mesh": "x".join(map(str, arguments.mesh)),
        "remat": config.model.remat,
        "image_size": arguments.image_size,
        "model": arguments.model,
        "xla": options,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions(),
        "lowering_s": round(lowering, 1),
        "compile_s": round(seconds, 1),
    }
    return about | measures(text, arguments.gpu, runs) | {
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "sent": sent,
    }, text


def measures(text: str, gpu: str, runs: int) -> dict[str, Any]:
    """Bounds of one of the `runs` that a program makes, by kind of work, on each GPU that can run it, and its
    collectives."""
    from benchmarks import hlo, roofline

    program = hlo.Program(text)
    found = roofline.kernels(program)
    kinds = {
        name: {
            kind: {key: value / runs for key, value in row.items()}
            for kind, row in roofline.bounds(found, name).items()
        }
        for name in GPUS
        if GPUS[name].capability == GPUS[gpu].capability
    }
    return {
        "runs": runs,
        "ms": {name: sum(row["ms"] for row in rows.values()) for name, rows in kinds.items()},
        "kinds": kinds[gpu],
        "exchanges": [row._asdict() for row in roofline.exchanges(program, gpu)],
    }


def versions() -> dict[str, str]:
    """Of what is installed of PACKAGES."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def show(result: dict[str, Any]) -> None:
    """Prints one program's results."""
    one = {"step": "a step", "sampler": "an evaluation", "inference": "a batch"}[result["what"]]
    print(
        f"\n{name_of(result)}: {one} takes at least "
        + " or ".join(f"{ms:.1f} ms on {GPUS[gpu].name}" for gpu, ms in result["ms"].items())
    )
    print(
        f"{result['arguments_gb']:.2f} GB of arguments and {result['temporary_gb']:.2f} GB of temporary memory a "
        f"device; lowered in {result['lowering_s']:.0f} s, compiled in {result['compile_s']:.0f} s"
    )
    total = result["ms"][result["gpu"]]
    for kind, row in result["kinds"].items():
        print(
            f"  {kind:20} {row['ms']:8.2f} ms {row['ms'] / total:6.1%} {row['gigabytes']:9.2f} GB "
            f"{row['teraflop']:8.3f} TFLOP {row['launches']:8.0f} launches"
        )
    for kind, row in result["sent"].items():
        print(f"  {kind}: {row['count']} a step, {row['gigabytes_sent']:.3f} GB sent by a device")
    for row in result["exchanges"]:
        kept = "synchronous" if not row["asynchronous"] else f"beside {row['overlapped_us']:.0f} us of kernels"
        print(
            f"    {row['loop']:12} {row['times']:3} x {row['kind']}, {row['operands']} arrays, "
            f"{row['megabytes']:.2f} MB of {' '.join(row['types'])}, {kept}"
        )


def name_of(result: dict[str, Any]) -> str:
    """The command that gives this result, without its defaults."""
    name = f"{result['what']} {result['preset']} --batch {result['batch']}"
    name += f" --mesh {result['mesh']}" if result["mesh"] != "1x1" else ""
    name += f" --gpu {result['gpu']}" if GPUS[result["gpu"]].capability != GPUS["h200"].capability else ""
    return name + f" --remat {result['remat']}" * (result["what"] == "step")


def record(result: dict[str, Any]) -> None:
    """Puts a result in the place of an older one of the same program."""
    from gspn_jax.files import replacing

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name_of(result)] = result
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; "recorded" and "render" have no others."""

    def pairs(text: str) -> tuple[str, str]:
        name, _, value = text.partition("=")
        return name, value

    def mesh(text: str) -> tuple[int, int]:
        data, _, fsdp = text.partition("x")
        return int(data), int(fsdp)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "sampler", "inference", "recorded", "render"))
    parser.add_argument("preset", nargs="?", default="GSPN-XL/2")
    parser.add_argument("--batch", type=int, default=64, help="images over all devices")
    parser.add_argument("--image-size", type=int, help="of the latents, 32 if not given, or of images, 224")
    parser.add_argument("--remat", help="that of the config if not given")
    parser.add_argument("--mesh", type=mesh, default=(1, 1), metavar="DATAxFSDP")
    parser.add_argument("--gpu", default="h200", choices=GPUS)
    parser.add_argument("--model", type=pairs, nargs="*", default=(), metavar="FIELD=NUMBER", help="as hidden=1200")
    parser.add_argument("--xla", type=pairs, nargs="*", default=(), metavar="OPTION=VALUE", help="of XLA")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="where to keep the compiled program's text")
    parser.add_argument("--record", action="store_true", help="add the result to benchmarks/results")
    arguments = parser.parse_args(argv)
    arguments.xla = dict(arguments.xla)
    arguments.model = {name: int(value) for name, value in arguments.model}
    arguments.image_size = arguments.image_size or (224 if is_classifier(arguments.preset) else 32)
    wrong = "sampler" if is_classifier(arguments.preset) else "inference"
    if arguments.what == wrong:
        parser.error(f"{arguments.preset} has no {wrong}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    result, text = compiled(arguments)
    show(result)
    if arguments.hlo:
        arguments.hlo.write_text(text)
    if arguments.record:
        record(result)


def main() -> None:
    arguments = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin for CUDA is loaded all the same, and no GPU is looked for
    sys.path.insert(0, str(ROOT))
    from benchmarks import gpu_compile_report
    from gspn_jax.cli import user_errors

    if arguments.what != "render" and importlib.util.find_spec("jax_cuda13_plugin") is None:
        sys.exit("error: XLA's compiler for GPUs must be installed (jax[cuda13]), found none: use make gpu-compile")
    with user_errors():
        if arguments.what == "recorded":
            import jax

            for words in RECORDED:
                run(parse([*words.split(), "--record"]))
                jax.clear_caches()
        elif arguments.what != "render":
            run(arguments)
    if arguments.record or arguments.what in ("recorded", "render"):
        gpu_compile_report.write(RESULTS, ROOT / "docs" / "performance.md")


if __name__ == "__main__":
    main()
