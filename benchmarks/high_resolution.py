"""The whole path coarse to fine on this machine, with random weights of a narrow network: memory planned and measured.

python benchmarks/high_resolution.py                             2048 x 4096 pixels, from 256 x 512 in three doublings
python benchmarks/high_resolution.py --size 1024 2048 --record   into benchmarks/results

Measured is the most that the process had resident during the levels of a second image, above what it had before them:
the first one also compiles what stands around the calls, which takes memory of the host. Planned is the largest stage
by the compiler, and the images on the host. Calls run in the thread that makes them: with JAX's
asynchronous dispatch a CPU may hold the temporary memory of two.
"""

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "high_resolution_cpu.json"


def narrow_model(folder: pathlib.Path) -> Any:
    """A model as Stable Diffusion 1, of narrow networks with random weights, with GSPN layers."""
    import jax
    import numpy as np

    from gspn_jax import autoencoder, text, unet
    from gspn_jax.text_to_image import gspn_layers
    from gspn_jax.text_to_image.folder import Model, TextPart

    rng = np.random.default_rng(0)

    def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
            scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
            return (scale * rng.standard_normal(shape) + (len(shape) == 1 and name.endswith("weight"))).astype(
                np.float32
            )

        return {name: value(name, shape) for name, shape in shapes.items()}

    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\na b\n")
    tokenizer = text.load_tokenizer(merges)
    tower = text.TextConfig(width=32, layers=1, heads=2, hidden=64, vocabulary=tokenizer.vocabulary)
    network = unet.UNetConfig(
        channels=(32, 64, 128), depths=(0, 1, 1), heads=(2, 2, 4), context_width=32, groups=8, linear_projection=True
    )
    vae = autoencoder.AutoencoderConfig(channels=(8, 8, 16, 16), layers=1, groups=4)
    options = gspn_layers.LayerOptions()
    layers = jax.jit(gspn_layers.init, static_argnums=(0, 1))(network, options, jax.random.key(0))
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Model(
        unet=unet.from_state_dict(drawn(unet.expected_shapes(network)), network),
        unet_config=network,
        texts=(TextPart(text.from_state_dict(drawn(text.expected_shapes(tower)), tower), tower, tokenizer),),
        autoencoder=autoencoder.from_state_dict(drawn(autoencoder.expected_shapes(vae)), vae),
        autoencoder_config=vae,
        latent_scale=vae.scaling_factor,
        prediction="epsilon",
        scheduler=scheduler,
        empty_is_zero=False,
        gspn=gspn_layers.Layers({name: np.asarray(value) for name, value in layers.items()}, options),
    )


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def most_resident(run: Callable[[], Any]) -> tuple[int, Any]:
    """(the most that the process has resident while `run` runs above what it had before, the result)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the most resident begins again
    before = resident("VmRSS")
    result = run()
    return resident("VmHWM") - before, result


def measured(model: Any, size: tuple[int, int], trained: int, options: Any) -> dict[str, Any]:
    """Draws an image of `size` by a network that is taken to have been trained on squares of `trained`; results."""
    import jax

    from gspn_jax.config import MeshConfig
    from gspn_jax.parallel import sharding
    from gspn_jax.text_to_image import high_resolution
    from gspn_jax.text_to_image.drawing import Drawing, Settings, scheduler_of

    device, factor = jax.devices()[0], model.autoencoder_config.factor
    first, levels = high_resolution.make_levels(size, trained, factor, options, len(model.texts))
    settings = Settings(first, 2, 7.5, 0.0, "euler", scheduler_of(model))
    started = time.monotonic()
    refinement = high_resolution.Refinement(
        model, settings, levels, options, seed=0, tile=trained // factor, device=device
    )
    stages = refinement.plan()
    print(high_resolution.describe(stages, size), flush=True)
    compiling = time.monotonic() - started
    mesh = sharding.make_mesh(MeshConfig(), [device])
    with Drawing(model._replace(gspn=None), settings, mesh, seed=0, batch_size=1, total=1) as drawing:
        image = drawing.decode(drawing.latents(["a b"], [0]))[0]
    del drawing
    first_taken, _ = most_resident(lambda: refinement("a b", image, 0))  # also compiles what stands around the calls
    calls, started = [], time.monotonic()

    def called() -> None:
        calls.append(resident("VmHWM"))

    before = resident("VmRSS")
    taken, image = most_resident(lambda: refinement("a b", image, 0, called))
    planned = max(stage.together + stage.host for stage in stages) + 2 * image.nbytes
    return {
        "size": list(size),
        "levels": [level._asdict() for level in levels],
        "stages": [stage._asdict() for stage in stages],
        "planned_gb": planned / 1e9,
        "measured_gb": taken / 1e9,
        "ratio": taken / planned,
        "measured_to_the_last_call_gb": (calls[-1] - before) / 1e9,
        "first_image_gb": first_taken / 1e9,
        "finite": bool(image.std() > 0),
        "compile_s": round(compiling, 1),
        "refine_s": round(time.monotonic() - started, 1),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 4096), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--trained", type=int, default=512, help="side that is drawn from noise, and of tiles, at most")
    parser.add_argument("--skips-on-host", action="store_true")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax

    from gspn_jax.files import replacing
    from gspn_jax.text_to_image.high_resolution import RefineOptions

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a call may begin before the last one's is freed
    options = RefineOptions(steps=(2,), strengths=(0.5,), skips_on_host=arguments.skips_on_host)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(narrow_model(pathlib.Path(folder)), tuple(arguments.size), arguments.trained, options)
    print(json.dumps(result, indent=1))
    if arguments.record:
        with replacing(RESULTS) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
