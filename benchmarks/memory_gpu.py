"""Memory of training steps on one GPU, counted by XLA:GPU's compiler, and the formula of `gspn_jax.plan` fitted to it.

python benchmarks/memory_gpu.py step GSPN-B/2 --batch 64 [--remat full] [--accumulate 2] [--gpu h200]
                                       compiles one program and adds its memory to benchmarks/results/memory_gpu.json
python benchmarks/memory_gpu.py recorded     all programs that the formula is fitted to
python benchmarks/memory_gpu.py fit          fits it, and prints what `gspn_jax/plan/memory.py` has as FITTED

No GPU is needed (see gpu_compile.py, in whose environment it runs); "fit" needs SciPy alone.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.optimize import nnls

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory_gpu.json"
RECORDED = (
    "step GSPN-XL/2 --batch 16",
    "step GSPN-B/2 --batch 64",
    "step GSPN-XL/2 --batch 16 --remat full",
    "step GSPN-B/2 --batch 64 --remat full",
    "step DiT-B/2 --batch 64",
    "step DiT-XL/2 --batch 16",
    "step GSPN-XL/2 --batch 64 --accumulate 4 --remat full",
    "step GSPN-B/2 --batch 64 --remat full --gpu h200",
    "step GSPN-L/2 --batch 16",
    "step GSPN-L/2 --batch 16 --remat full",
)
"""Programs that the formula is fitted to, beside those of gpu_compile.py on one GPU."""


def config_of(arguments: argparse.Namespace) -> Any:
    from gspn_jax.config import MeshConfig
    from gspn_jax.configs.dit_xl_2 import config as dit
    from gspn_jax.configs.gspn_xl_2 import config as gspn

    base = dit if arguments.preset.startswith("DiT") else gspn
    remat = arguments.remat or base.model.remat
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, preset=arguments.preset, remat=remat),
        mesh=MeshConfig(1, 1, 1),
        data=dataclasses.replace(base.data, image_size=arguments.image_size),
        train=dataclasses.replace(base.train, batch_size=arguments.batch, accumulate=arguments.accumulate),
    )


def counted(arguments: argparse.Namespace) -> dict[str, Any]:
    """The memory of one program."""
    from benchmarks import gpu_compile
    from gspn_jax import models
    from gspn_jax.models.width import widths

    config = config_of(arguments)
    gpus = gpu_compile.devices(arguments.gpu, 1)
    start = time.monotonic()
    with gpu_compile.traced_for(gpus[0]):
        lowered, _ = gpu_compile.lower(arguments, config, gpus)
    memory = lowered.compile(gpu_compile.OPTIONS | {"xla_gpu_enable_triton_gemm": False}).memory_analysis()
    arch = models.resolve(config.model)
    return {
        "preset": arguments.preset,
        "layout": arch.layout,
        "mixer": arch.mixer,
        "remat": config.model.remat,
        "gpu": arguments.gpu,
        "images": arguments.batch // arguments.accumulate,
        "accumulate": arguments.accumulate,
        "parameters": models.count_parameters(config),
        "blocks": arch.blocks,
        "width": widths(arch)["hidden"],
        "tokens": (config.data.image_size // arch.patch) ** 2,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "seconds": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "versions": gpu_compile.versions(),
    }


def name_of(row: dict[str, Any]) -> str:
    name = f"{row['preset']}, {row['images']} images, remat {row['remat']}, {row['gpu']}"
    name += f", {row['tokens']} tokens" if row["tokens"] != 256 else ""
    return name + (f", accumulate {row['accumulate']}" if row["accumulate"] > 1 else "")


def others() -> list[dict[str, Any]]:
    """Steps on one H100 or H200 that gpu_compile.py has recorded; what it has for an RTX 4090 is counted here too."""
    from gspn_jax import models
    from gspn_jax.config import ModelConfig
    from gspn_jax.models.width import widths

    found = json.loads((ROOT / "benchmarks" / "results" / "gpu_compile.json").read_text())
    rows = []
    for result in found.values():
        known = result["preset"] in models.PRESETS
        elsewhere = result["mesh"] != "1x1" or result["gpu"] == "rtx4090"
        if result["what"] != "step" or elsewhere or result["model"] or not known:
            continue
        arch = models.resolve(ModelConfig(preset=result["preset"]))
        rows.append(
            {
                "preset": result["preset"],
                "layout": arch.layout,
                "mixer": arch.mixer,
                "remat": result["remat"],
                "gpu": result["gpu"],
                "images": result["batch"],
                "accumulate": 1,
                "parameters": round(result["arguments_gb"] * 1e9 / 16),
                "blocks": arch.blocks,
                "width": widths(arch)["hidden"],
                "tokens": (result["image_size"] // arch.patch) ** 2,
                "arguments": round(result["arguments_gb"] * 1e9),
                "temporary": round(result["temporary_gb"] * 1e9),
            }
        )
    return rows


def kind_of(row: dict[str, Any]) -> tuple[str, str]:
    """The row of `gspn_jax.plan.memory.FITTED` that a program is fitted in."""
    return row["mixer"], row["remat"]


def fits(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float, float, float, int]]:
    """{(mixer, remat): (gradients, per_block, once, largest relative error, programs)}, by least squares of relative
    errors over programs without accumulation; no number is negative, "gradients" is one for all."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["accumulate"] == 1:
            groups.setdefault(kind_of(row), []).append(row)
    names = sorted(groups)
    system, wanted = [], []
    for place, name in enumerate(names):
        for row in groups[name]:
            values = 2 * row["images"] * row["tokens"] * row["width"]
            line = np.zeros(1 + 2 * len(names))
            line[0], line[1 + 2 * place : 3 + 2 * place] = 4 * row["parameters"], (row["blocks"] * values, values)
            total = row["arguments"] + row["temporary"]
            system.append(line / total)
            wanted.append(row["temporary"] / total)
    found = nnls(np.array(system), np.array(wanted))[0]
    table = {name: (found[0], found[1 + 2 * place], found[2 + 2 * place]) for place, name in enumerate(names)}
    errors = {
        name: max(
            abs(rest(row, *numbers) - row["temporary"]) / (row["arguments"] + row["temporary"]) for row in groups[name]
        )
        for name, numbers in table.items()
    }
    return {name: (*numbers, errors[name], len(groups[name])) for name, numbers in table.items()}


def rest(row: dict[str, Any], gradients: float, per_block: float, once: float) -> float:
    """Temporary bytes by the formula."""
    values = 2 * row["images"] * row["tokens"] * row["width"] * (row["blocks"] * per_block + once)
    return gradients * 4 * row["parameters"] + values + 4 * row["parameters"] * (row["accumulate"] > 1)


def fit() -> None:
    """Prints the table of the formula's numbers, as code, and what it says beside each program."""
    rows = recorded()
    table = fits(rows)
    for kind, numbers in table.items():
        words = ", ".join(f'"{word}"' for word in kind)
        print(f"    ({words}): Fit({', '.join(f'{number:.3g}' for number in numbers)}),")
    for row in rows:
        said = rest(row, *table[kind_of(row)][:3])
        print(f"# {name_of(row)}: {row['temporary'] / 1e9:.2f} GB by the compiler, {said / 1e9:.2f} by the formula")


def recorded() -> list[dict[str, Any]]:
    """All programs of one GPU whose memory was counted."""
    own = json.loads(RESULTS.read_text()).values() if RESULTS.exists() else ()
    return [*others(), *own]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "recorded", "fit"))
    parser.add_argument("preset", nargs="?", default="GSPN-B/2")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--image-size", type=int, default=32, help="of the latents")
    parser.add_argument("--remat", help="that of the config if not given")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--gpu", default="rtx4090", choices=("rtx4090", "h200"))
    return parser.parse_args(argv)


def record(row: dict[str, Any]) -> None:
    from gspn_jax.files import replacing

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name_of(row)] = row
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> None:
    row = counted(arguments)
    record(row)
    print(
        f"{name_of(row)}: {row['arguments'] / 1e9:.2f} + {row['temporary'] / 1e9:.2f} GB, {row['seconds']} s",
        flush=True,
    )


def main() -> None:
    arguments = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    if arguments.what == "step":
        run(arguments)
    elif arguments.what == "fit":
        fit()
    elif arguments.what == "recorded":
        import jax

        for words in RECORDED:
            run(parse(words.split()))
            jax.clear_caches()


if __name__ == "__main__":
    main()
