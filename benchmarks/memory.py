"""Memory of a device and what devices exchange in a step of GSPN-XL/2 on 8, 64 and 256 devices, by the compiler.

python benchmarks/memory.py              compiles, writes benchmarks/results/memory_cpu.json and docs/memory.md
python benchmarks/memory.py --render     writes docs/memory.md again from the results

The whole step is compiled ahead of time for fake CPU devices; nothing is allocated or run. State and gradients are
exact, from shapes and shardings; what is kept for the backward pass is exact, from JAX's own derivative; temporary
memory and collectives are what XLA says for a CPU.
"""

import argparse
import collections
import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import platform
import sys

DEVICES = 256
ROOT = pathlib.Path(__file__).parents[1]
MESHES = ((8, 1), (1, 8), (64, 1), (8, 8), (1, 64), (256, 1), (32, 8), (4, 64), (1, 256))
"""(data, fsdp)"""
BATCHES = (256, 1024)
REMATS = ("none", "dots", "full")
# Temporary memory is linear in the images of a device: two numbers of them give the line, a third one checks it.
FITTED = {"data parallel": (8, 1), "fsdp": (1, 8)}
FIT_IMAGES, CHECK_IMAGES = (4, 32), 128


TEMPLATE = """# Memory and traffic of GSPN-XL/2, on paper

{parameters} parameters, 32x32x4 latents, float32 state, bfloat16 computation, one EMA, no accumulation. Written by
`python benchmarks/memory.py` (JAX {jax}, {date}; [numbers](../benchmarks/results/memory_cpu.json)). No GPU was used
and nothing was run: the whole training step of all 57 blocks was compiled for that many fake CPU devices.

GB is 1e9 bytes, of one device. A mesh is `mesh.data` x `mesh.fsdp` (`mesh.tensor` is 1): n x 1 is data parallel,
1 x n splits the state over all devices, the others split it within groups and repeat it between them (HSDP).

## State: exact
From shapes and shardings. The last but one column is what padding and the weights that are kept whole add to 1 / fsdp.

| mesh | parameters | optimizer | EMA | state | above 1/fsdp | gradients |
|---|---|---|---|---|---|---|
{states}

1500 is a multiple of neither 8, 64 nor 256: one axis of each weight is stored longer, 1504 for 8 and 1536 for 64 and
256. What is added is zero and stays zero. A checkpoint holds the axis as long as the mesh that saved it had it; any
other mesh cuts or lengthens it when it reads. Weights with fewer than 1,024 numbers a layer are kept whole.

## Activations
What JAX keeps of one image between the forward and the backward pass, exact, with the scan backend of the operator:
{kept_none} MB with `model.remat none`, {kept_dots} MB with `dots`, {kept_full} MB with `full`. Under fsdp `none` is
`dots`, for a weight kept whole for the backward pass would not be split.

GB of a device in all. "Held" is state, gradients and what is kept. "XLA:CPU" is state and temporary memory of the
compiled step:

| devices | mesh | batch | images a device | none: held | XLA:CPU | dots: held | XLA:CPU | full: held | XLA:CPU |
|---|---|---|---|---|---|---|---|---|---|
{memory}

Without a tilde it is what XLA says of that very program. With one it lies on the line through the programs of 4 and 32
images a device on 8 devices, with the gradients of the mesh; at 128 images (8 x 1, batch 1024, full) the temporary
memory on that line is {check} off the compiler. **XLA:CPU** planned these buffers: it computes in float32 where the
program says bfloat16, which makes what it keeps up to twice as large, and runs the operator as a scan. A GPU's plan is
another one, and its kernel keeps other values between the passes:

## On GPUs: XLA:GPU's plan
The same steps compiled for 8 H200 ({gpu_versions}, {gpu_date}; [performance.md](performance.md) has the time bounds).
State and temporary memory are those of the compiled program, with the kernel in it; `names` is the `remat` of the
configs. What is exchanged is counted as below, in the types that the GPUs send.

| mesh | batch | remat | state | temporary | in all | all-gathers | GB | reduce-scatters | GB | all-reduces | GB |
|---|---|---|---|---|---|---|---|---|---|---|---|
{gpu}

## What is exchanged in a step
Batch 256, `remat full`, read from the compiled programs; loops count as often as they turn. GB sent by one device, by a
ring: (n - 1) / n of the result for an all-gather and a reduce-scatter, twice that for an all-reduce.

| mesh | all-gathers | GB | reduce-scatters | GB | all-reduces | GB | GB in all | others |
|---|---|---|---|---|---|---|---|---|
{exchanged}

- Weights are gathered one block at a time, in the forward and again in the backward loop. The largest all-gather of all
  programs has {largest} MB; a whole stack of one square weight would have {stack} MB.
- Gathers within blocks are counted at two bytes a number, as the program asks for (bfloat16); XLA:CPU, which has no
  bfloat16, carries four.
- Under fsdp the gradients of a block are reduce-scattered in float32 at once (`lax.psum_scatter`, and so on
  every backend); in HSDP each device's part is then all-reduced over `data`. Without fsdp the compiler all-reduces them
  block by block: here in float32, on a GPU in bfloat16, the type of the products.
- Counts are before XLA's GPU passes, which combine small collectives and overlap them with computation.
- No activation is exchanged: left to itself the compiler had split the products over fsdp and gathered activations
  (all-to-all and all-gather of [B, 16, 16, 1500] in every block), which is why blocks run under `jax.shard_map`.

## Which mesh
- **8 GPUs of 80 GB**: `mesh.data 8` (the default) with `remat names`, at batch 256 {gpu_total} GB of each;
  four times the batch fits with `remat full`. `--mesh.fsdp 8` sends
  about as many bytes (two gathers in bfloat16 and a reduce-scatter for one all-reduce in float32) and frees 9.7 GB of
  state and 2.4 GB of gradients, but has many small collectives: take it where memory is short (batch 1024, smaller
  devices).
- **64 GPUs, 8 a node**: 8 x 8 (`--mesh.fsdp 8`). Gathers stay within a node, where links are fast, and between nodes
  only an eighth of the gradients is all-reduced. 64 x 1 is the simple alternative: the state fits.
- **256 GPUs**: 32 x 8, for the same reason. fsdp over 64 or 256 saves another gigabyte or so and sends every weight
  between nodes twice a step: not for a model of this size.

These are arguments from bytes; no step was timed on several GPUs.
"""


def config_of(batch: int, remat: str, mesh: tuple[int, int] = (1, 1)):
    from gspn_jax.config import MeshConfig
    from gspn_jax.configs.gspn_xl_2 import config

    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        mesh=MeshConfig(*mesh),
        train=dataclasses.replace(config.train, batch_size=batch),
    )


def state_bytes(mesh: tuple[int, int]) -> dict[str, int]:
    """Bytes on one device; gradients are as large as parameters."""
    import jax
    from jax.sharding import AbstractMesh

    from gspn_jax.parallel import sharding
    from gspn_jax.training.diffusion import DiffusionTask
    from gspn_jax.training.state import abstract_state

    state = abstract_state(DiffusionTask(config_of(256, "full")), AbstractMesh((*mesh, 1), sharding.AXES))
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema}
    found = {
        name: sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(part))
        for name, part in parts.items()
    }
    return found | {"gradients": found["parameters"]}


def kept_per_image(remat: str) -> int:
    """Bytes an image adds to what JAX keeps between the forward and the backward pass, on one device."""
    import jax
    import jax.numpy as jnp

    from gspn_jax.training.diffusion import DiffusionTask
    from gspn_jax.training.step import make_loss

    def kept(images: int) -> int:
        config = config_of(images, remat)
        task = DiffusionTask(config)
        shapes, loss = task.shapes, make_loss(task)
        batch = abstract_batch(images)
        backward = jax.eval_shape(
            lambda params, batch: jax.vjp(lambda p: loss(p, batch, jax.random.key(0))[0], params)[1], shapes, batch
        )
        return sum(
            math.prod(s.shape) * jnp.dtype(s.dtype).itemsize
            for s in jax.tree.leaves(backward)
            if not jnp.issubdtype(s.dtype, jax.dtypes.prng_key)
        )

    return kept(3) - kept(2)


def abstract_batch(images: int):
    import jax
    import jax.numpy as jnp

    return {
        "image": jax.ShapeDtypeStruct((images, 32, 32, 4), jnp.float32),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }


def compiled(mesh: tuple[int, int], batch: int, remat: str) -> dict:
    """Temporary bytes and collectives of the compiled step."""
    import jax

    from benchmarks.collectives import collectives
    from gspn_jax.parallel import sharding
    from gspn_jax.training.diffusion import DiffusionTask
    from gspn_jax.training.state import abstract_state
    from gspn_jax.training.step import make_step

    config = config_of(batch, remat, mesh)
    devices = math.prod(mesh)
    built = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    task = DiffusionTask(config)
    program = make_step(task, built).lower(abstract_state(task, built), abstract_batch(batch)).compile()
    kinds = collections.defaultdict(lambda: {"count": 0, "sent": 0, "in_loops": 0})
    largest = 0
    for found in collectives(program.as_text(), devices):
        kind = kinds[found.kind]
        kind["count"] += found.times
        kind["sent"] += found.times * found.sent
        kind["in_loops"] += found.times * found.sent if found.loops else 0
        if found.kind == "all-gather":
            largest = max(largest, found.bytes)
    memory = program.memory_analysis()
    jax.clear_caches()
    return {
        "mesh": mesh,
        "batch": batch,
        "images_per_device": batch // devices,
        "remat": remat,
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "collectives": dict(kinds),
        "largest_all_gather": largest,
    }


def measure(path: pathlib.Path) -> None:
    """Compiles what is not in the results yet, one by one."""
    import jax
    from tqdm import tqdm

    from gspn_jax import models

    results = json.loads(path.read_text()) if path.exists() else {"compiled": {}}
    results |= {
        "compiler": "XLA:CPU",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "parameters": models.count_parameters(config_of(256, "full")),
    }
    results["state"] = {f"{data} x {fsdp}": state_bytes((data, fsdp)) for data, fsdp in MESHES}
    results["kept_per_image"] = {remat: kept_per_image(remat) for remat in REMATS}
    wanted = [(mesh, 256, "full") for mesh in MESHES]
    for kind, mesh in FITTED.items():
        for remat in REMATS[kind == "fsdp" :]:  # with fsdp, "none" is "dots"
            wanted += [(mesh, 8 * images, remat) for images in FIT_IMAGES]
    wanted.append(((8, 1), 8 * CHECK_IMAGES, "full"))
    for (data, fsdp), batch, remat in tqdm(wanted, unit="program"):
        name = f"{data} x {fsdp}, {batch}, {remat}"
        if name not in results["compiled"]:
            results["compiled"][name] = compiled((data, fsdp), batch, remat)
            path.write_text(json.dumps(results, indent=1) + "\n")
    path.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict) -> str:
    """docs/memory.md."""
    state, programs = results["state"], results["compiled"]

    def name(mesh):
        return f"{mesh[0]} x {mesh[1]}"

    def total(mesh):
        return sum(state[name(mesh)][part] for part in ("parameters", "optimizer", "ema"))

    def line(mesh, images, remat):
        """Temporary bytes: of the program itself where it was compiled, else on the line through two programs."""
        exact = programs.get(f"{name(mesh)}, {images * math.prod(mesh)}, {remat}")
        if exact:
            return exact["temporary"], True
        base = FITTED["data parallel" if mesh[1] == 1 else "fsdp"]
        low, high = (programs[f"{name(base)}, {8 * n}, {remat}"]["temporary"] for n in FIT_IMAGES)
        slope = (high - low) / (FIT_IMAGES[1] - FIT_IMAGES[0])
        gradients = state[name(mesh)]["gradients"] - state[name(base)]["gradients"]
        return low + slope * (images - FIT_IMAGES[0]) + gradients, False

    def cell(mesh, images, remat):
        temporary, exact = line(mesh, images, remat)
        held = total(mesh) + state[name(mesh)]["gradients"] + images * results["kept_per_image"][remat]
        return f"{gb(held)} | {'' if exact else '~'}{gb(total(mesh) + temporary)}"

    states = [
        f"| {name(mesh)} | "
        + " | ".join(gb(state[name(mesh)][part], 3) for part in ("parameters", "optimizer", "ema"))
        + f" | {gb(total(mesh), 3)} | {total(mesh) * mesh[1] / total((8, 1)) - 1:+.1%} | "
        f"{gb(state[name(mesh)]['gradients'], 3)} |"
        for mesh in MESHES
    ]
    memory = []
    for mesh in MESHES:
        for batch in BATCHES:
            images = batch // math.prod(mesh)
            none = cell(mesh, images, "none") if mesh[1] == 1 else "dots | dots"
            memory.append(
                f"| {math.prod(mesh)} | {name(mesh)} | {batch} | {images} | {none} | "
                f"{cell(mesh, images, 'dots')} | {cell(mesh, images, 'full')} |"
            )
    exchanged = []
    for mesh in MESHES:
        kinds = programs[f"{name(mesh)}, 256, full"]["collectives"]
        cells, sent = [], 0
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            found = kinds.get(kind, {"count": 0, "sent": 0, "in_loops": 0})
            bytes_ = found["sent"] - (found["in_loops"] / 2 if kind == "all-gather" else 0)
            sent += bytes_
            cells.append(f"{found['count']:,} | {gb(bytes_, 2)}" if found["count"] else "| ")
        others = sorted(set(kinds) - {"all-gather", "reduce-scatter", "all-reduce"})
        exchanged.append(
            f"| {name(mesh)} | "
            + " | ".join(cells)
            + f" | {gb(sent, 2)} | "
            + (", ".join(f"{kinds[k]['count']} {k}" for k in others) or "none")
            + " |"
        )
    check = programs[f"8 x 1, {8 * CHECK_IMAGES}, full"]["temporary"]
    low, high = (programs[f"8 x 1, {8 * n}, full"]["temporary"] for n in FIT_IMAGES)
    guess = low + (high - low) / (FIT_IMAGES[1] - FIT_IMAGES[0]) * (CHECK_IMAGES - FIT_IMAGES[0])
    kept = results["kept_per_image"]
    values = (
        {
            "states": "\n".join(states),
            "memory": "\n".join(memory),
            "exchanged": "\n".join(exchanged),
            "check": f"{guess / check - 1:+.1%}",
            "parameters": f"{results['parameters'] / 1e6:.1f}M",
            "jax": results["jax"],
            "date": results["date"],
            "largest": f"{max(p['largest_all_gather'] for p in programs.values()) / 1e6:.1f}",
            "stack": f"{29 * 1504 * 1500 * 4 / 1e6:.0f}",
        }
        | on_gpus()
        | {f"kept_{remat}": f"{value / 1e6:,.0f}" for remat, value in kept.items()}
    )
    text = TEMPLATE
    for key, value in values.items():
        text = text.replace("{" + key + "}", value)
    return text


def on_gpus() -> dict[str, str]:
    """What docs/memory.md says of GPUs, from the results of gpu_compile.py."""
    results = json.loads((ROOT / "benchmarks" / "results" / "gpu_compile.json").read_text())
    rows = []
    for (data, fsdp), remat in itertools.product(((8, 1), (1, 8)), ("names", "full")):
        result = results.get(f"step GSPN-XL/2 --batch 256 --mesh {data}x{fsdp} --remat {remat}")
        if result is None:  # not recorded
            continue
        held, temporary = result["arguments_gb"], result["temporary_gb"]
        cells = [f"{data} x {fsdp}", "256", remat, f"{held:.2f}", f"{temporary:.2f}", f"{held + temporary:.1f}"]
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            sent = result["sent"].get(kind)
            cells += [f"{sent['count']:,}", f"{sent['gigabytes_sent']:.2f}"] if sent else ["", ""]
        rows.append(f"| {' | '.join(cells)} |")
    first = results["step GSPN-XL/2 --batch 32 --remat names"]  # what one of 8 GPUs has, but for the exchange
    return {
        "gpu": "\n".join(rows),
        "gpu_date": first["date"],
        "gpu_versions": f"JAX {first['versions']['jax']}, cuDNN {first['versions']['nvidia-cudnn-cu13']}",
        "gpu_total": f"{first['arguments_gb'] + first['temporary_gb']:.0f}",
    }


def gb(bytes_: float, digits: int = 1) -> str:
    return f"{bytes_ / 1e9:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "memory_cpu.json")
    arguments = parser.parse_args()
    if not arguments.render:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # LLVM's optimisations change no buffer and no collective
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={DEVICES}"
        )
        sys.path.insert(0, str(ROOT))
        measure(arguments.output)
    (ROOT / "docs" / "memory.md").write_text(render(json.loads(arguments.output.read_text())))


if __name__ == "__main__":
    main()
