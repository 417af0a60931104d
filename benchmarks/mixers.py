r"""Mixers in one table: a DiT with each, of equal parameters; what a step costs, and what it learns on digits.

python benchmarks/mixers.py time       training and sampling on the devices there are, by tokens
python benchmarks/mixers.py compile    the same programs compiled for an H200, which is not needed: bounds and memory
python benchmarks/mixers.py score      digits at equal images, three seeds: accuracy and Frechet distance
python benchmarks/mixers.py render     the tables of docs/mixers.md, from the results

`--rows`, `--tokens`, `--seeds` and `--what` take a part. Results go to benchmarks/results/mixers_*.json as they come;
what is there is not done again, so that the same command goes on.

All rows have the blocks of DiT, and differ in the mixer. One number of each is chosen so that it has the parameters of
attention (`matched`): the width of the proxy of GSPN, where the kernel has room for it, or the width of what is scanned
or convolved. GSPN's last two blocks scan the whole map and the others two lines, as the paper's presets do.

`compile` needs jax[cuda13], as `gpu_compile.py`, whose bounds these are but for two: flash attention takes at least as
long as its operations, and so does the kernel that expands a proxy.
"""

import argparse
import bisect
import collections
import dataclasses
import datetime
import functools
import importlib.util
import json
import logging
import math
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOKENS = (256, 1024, 4096)
SEEDS = (0, 1, 2)
WHATS = ("training", "sampling")


class Row(NamedTuple):
    """A mixer: fields of a model, and which of its numbers is chosen so that it has the parameters of attention."""

    mixer: str
    fields: dict[str, Any]
    knob: str | None = None
    local: bool = False
    """Whether all blocks but the last two scan two lines."""


ROWS = {
    "attention": Row("attention", {}),
    "GSPN": Row("gspn", {}, "proxy_ratio", local=True),
    "GSPN, all scans local": Row("gspn", {"chunk": 2}, "proxy_ratio"),
    "GSPN as released": Row("released_gspn", {"chunk": 2}, "proxy_ratio"),
    "GSPN, shared weights": Row("gspn", {"groups": 1}, "expansion", local=True),
    "compressed GSPN": Row("compressed_gspn", {}, "expansion", local=True),
    "convolution": Row("convolution", {}, "expansion"),
    "linear attention": Row("linear_attention", {}),
    "gated linear attention": Row("gated_linear_attention", {}),
}
KNOBS = {"proxy_ratio": [*range(32, 1, -1)], "expansion": [i / 16 for i in range(8, 49)]}
"""Values of each, those of fewer parameters first."""
DIGITS = {"preset": "DiT-S/2", "hidden": 64, "depth": 4, "heads": 4}
CPU = {"preset": "DiT-S/2", "hidden": 192, "depth": 4, "heads": 4}
GPU = {"preset": "DiT-B/2"}
BATCH = {"cpu": 4096, "gpu": 65536}
"""Tokens of a batch, whatever those of an image."""
STEPS, IMAGES, LEARNING_RATE, EMA, PER_CLASS = 300, 64, 5e-3, 0.95, 100


def matched(row: Row, base: dict[str, Any]) -> Any:
    """The `ModelConfig` of a row, with the parameters of attention as nearly as its one number allows."""
    from gspn_jax.config import ModelConfig
    from gspn_jax.models import PRESETS

    depth = base.get("depth") or PRESETS[base["preset"]].depth
    fields = base | {"mixer": row.mixer, "drop_path": 0.0} | row.fields
    if row.local:
        fields["chunk"] = (2,) * (depth - 2) + (None,) * 2
    if row.knob is None:
        return ModelConfig(**fields)

    def of(value: Any) -> Any:
        added = {"mixer_options": (f"expansion={value}",)} if row.knob == "expansion" else {row.knob: value}
        return ModelConfig(**fields | added)

    goal, values = mixer_parameters(ModelConfig(**base | {"mixer": "attention"})), KNOBS[row.knob]
    above = bisect.bisect_left(values, goal, 1, len(values) - 1, key=lambda value: mixer_parameters(of(value)))
    return min(map(of, values[above - 1 : above + 1]), key=lambda model: abs(mixer_parameters(model) - goal))


@functools.cache
def mixer_parameters(model: Any) -> int:
    """Parameters of one mixer."""
    import jax
    import jax.numpy as jnp

    from gspn_jax import models

    arch = models.resolve(model)
    build = functools.partial(arch.options.build, arch.hidden, dtype=jnp.float32)
    shapes = models.abstract_of(lambda rngs: build(rngs=rngs))[1]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


class Results:
    """A file of JSON: results by their keys, each kept with the date and versions that it was made with."""

    def __init__(self, what: str):
        self.path = RESULTS / f"mixers_{what}.json"

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Results that are there by now, from other processes too."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, key: str, result: dict[str, Any]) -> None:
        import jax

        from gspn_jax.files import replacing

        about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "python": platform.python_version()}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.rows | {key: result | about}, indent=1) + "\n")
        print(json.dumps({key: result | about}), flush=True)


def timed(flags: argparse.Namespace) -> None:
    """Times on the devices there are: DiT-B/2 on GPUs, a small DiT on a CPU."""
    import jax
    import train_step

    from gspn_jax import models
    from gspn_jax.parallel import sharding

    where = jax.default_backend()
    base, results, start = (CPU if where == "cpu" else GPU), Results(f"time_{where}"), time.monotonic()
    with tempfile.NamedTemporaryFile() as lock:
        timing = train_step.Timing(flags.repeats, lock.name, False)
        for tokens, what, name in programs(flags):
            if key(name, tokens, what) in results.rows or time.monotonic() - start > flags.limit:
                continue
            model = matched(ROWS[name], base)
            batch = BATCH[where] // tokens
            given = {"image_size": 2 * math.isqrt(tokens), "channels": 4, "batch_size": batch, "sampler_steps": 4}
            config = train_step.make_config(model, argparse.Namespace(**given))
            found = train_step.MEASURES[what](config, sharding.make_mesh(config.mesh), timing)
            device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            about = {"device": device, "batch": batch, "parameters": models.count_parameters(config)}
            results.add(key(name, tokens, what), about | found | {"load": os.getloadavg()[0]})
            jax.clear_caches()


def programs(flags: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """(tokens, what, row) of all that is asked for."""
    return ((tokens, what, name) for tokens in flags.tokens for what in flags.what for name in flags.rows)


def key(name: str, tokens: int, what: str) -> str:
    return f"{name}, {tokens} tokens, {what}"


def compiled(flags: argparse.Namespace) -> None:
    """Bounds of DiT-B/2 on an H200."""
    import jax

    from benchmarks import gpu_compile
    from gspn_jax import models

    results, start = Results("compile"), time.monotonic()
    for tokens, what, name in programs(flags):
        if key(name, tokens, what) in results.rows or time.monotonic() - start > flags.limit:
            continue
        model = matched(ROWS[name], GPU)
        batch, kind = BATCH["gpu"] // tokens, {"training": "step", "sampling": "sampler"}[what]
        asked = [kind, GPU["preset"], "--batch", str(batch), "--image-size", str(2 * math.isqrt(tokens))]
        arguments = gpu_compile.parse([*asked, "--remat", "none"])
        arguments.model = {
            field.name: getattr(model, field.name)
            for field in dataclasses.fields(model)
            if getattr(model, field.name) != field.default and field.name != "preset"
        }
        config = gpu_compile.config_of(arguments)
        found, text = gpu_compile.compiled(arguments)
        if flags.hlo:
            flags.hlo.write_text(text)
        least = bound(text, config, batch, tokens, what, found["runs"])
        kept = ("kinds", "temporary_gb", "arguments_gb", "lowering_s", "compile_s", "versions", "model")
        about = {"device": "H200, compiled", "batch": batch, "parameters": models.count_parameters(config)}
        results.add(key(name, tokens, what), about | least | {field: found[field] for field in kept})
        jax.clear_caches()


def bound(text: str, config: Any, batch: int, tokens: int, what: str, runs: int) -> dict[str, float]:
    """Least milliseconds of a step or an evaluation: those of `roofline`, where flash attention takes no less than its
    operations, nor scans than the products in which they expand proxies."""
    from benchmarks import hlo, roofline
    from gspn_jax.models import resolve

    program, arch, found = hlo.Program(text), resolve(config.model), collections.Counter()
    for kernel in roofline.kernels(program):
        targets = [part.target for part in program.inside(kernel.instruction) if "fmha" in part.target]
        # two products forward, five backward, which computes the scores again (arXiv 2205.14135)
        products = sum(10 if "Backward" in target else 4 for target in targets)
        done = products * batch * tokens**2 * arch.hidden
        found[kernel.kind] += kernel.times * max(kernel.seconds("h200"), done / roofline.PRODUCTS["h200"])
    if "scans" in found and arch.mixer != "released_gspn":
        passes = arch.blocks * batch * tokens * runs * (2 if what == "training" else 1)
        found["scans"] = max(found["scans"], passes * products_of_scans(arch) / roofline.PRODUCTS["h200"])
    milliseconds = 1e3 * sum(found.values()) / runs
    return {
        "ms": milliseconds,
        "images_per_second": 1e3 * batch / milliseconds,
        "scans_ms": 1e3 * found["scans"] / runs,
    }


def products_of_scans(arch: Any) -> float:
    """Operations of a pixel in which a proxy is expanded once: forward, and again backward."""
    from gspn_jax.models.mixers import DIRECTIONS, NEIGHBOURS, widened

    options = arch.options
    channels = widened(arch.hidden, options.expansion / getattr(options, "compression", 1))
    return 2.0 * options.proxy * DIRECTIONS * (NEIGHBOURS * options.groups + 2 * channels)


def scored(flags: argparse.Namespace) -> None:
    """Digits, all rows with one seed before the next seed; none begins after `--limit` seconds."""
    results, start = Results("score"), time.monotonic()
    for seed in flags.seeds:
        for name in flags.rows:
            if f"{name}, seed {seed}" not in results.rows and time.monotonic() - start < flags.limit:
                results.add(f"{name}, seed {seed}", score(name, seed, flags.output))


def score(name: str, seed: int, output: pathlib.Path) -> dict[str, Any]:
    """Trains a row on digits and scores 100 samples a class, without guidance."""
    import numpy as np

    from gspn_jax import cli, models
    from gspn_jax.config import DataConfig, SamplerConfig
    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints
    from gspn_jax.sampling.sampler import Sampler
    from gspn_jax.training.train import train

    base, start = cli.load_config("digits"), time.monotonic()
    config = dataclasses.replace(
        base,
        run_dir=str(output / f"{name.replace(',', '').replace(' ', '_')}_{seed}"),
        model=matched(ROWS[name], DIGITS),
        data=DataConfig(in_memory=True),
        sampler=SamplerConfig(name="heun", steps=6),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=LEARNING_RATE, warmup_steps=30),
        train=dataclasses.replace(
            base.train, steps=STEPS, batch_size=IMAGES, seed=seed, ema_decays=(EMA,), sample_every=0, save_every=STEPS,
            log_every=50,
        ),
    )  # fmt: skip
    train(config)
    trained, mesh, labels = time.monotonic() - start, sharding.make_mesh(config.mesh), np.tile(np.arange(10), PER_CLASS)
    params = checkpoints.restore_params(config.run_dir, STEPS, config, mesh)
    found = judge().score(Sampler(config, mesh, seed=seed)(params, labels, np.arange(len(labels))), labels)
    losses = [json.loads(line) for line in (pathlib.Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return dataclasses.asdict(found) | {
        "loss": [line["loss"] for line in losses if "loss" in line][-1],
        "parameters": models.count_parameters(config),
        "steps": STEPS,
        "images": STEPS * IMAGES,
        "training_s": round(trained, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


@functools.cache
def judge() -> Any:
    import numpy as np

    from gspn_jax.config import DataConfig
    from gspn_jax.data import make_source
    from gspn_jax.metrics.digits import DigitsJudge

    source = make_source(DataConfig())
    records = [source[i] for i in range(len(source))]
    return DigitsJudge(np.stack([r["image"] for r in records]), np.array([r["label"] for r in records]))


def rendered(flags: argparse.Namespace) -> None:
    """Prints the tables of docs/mixers.md."""
    for what in ("compile", "time_gpu", "time_cpu"):
        results = Results(what).rows
        for kind in WHATS if results else ():
            print(f"\n{what}, {kind}\n")
            print("\n".join(costs(results, kind)))
    print("\n" + "\n".join(scores(Results("score").rows)))


def costs(results: dict[str, dict], kind: str) -> Iterable[str]:
    """Lines of a table: images/s of a step or an evaluation, and memory, by tokens."""
    yield "| mixer | parameters | " + " | ".join(f"{tokens:,} tokens: images/s, GB" for tokens in TOKENS) + " |"
    yield "|---|---|" + "---|" * len(TOKENS)
    for name in ROWS:
        found = [results.get(key(name, tokens, kind)) for tokens in TOKENS]
        if any(found):
            parameters = next(row["parameters"] for row in found if row)
            cells = [cell(row) if row else "" for row in found]
            yield f"| {name} | {parameters / 1e6:.2f}M | {' | '.join(cells)} |"


def cell(row: dict[str, Any]) -> str:
    milliseconds = next(row[name] for name in ("ms", "train_ms", "evaluation_ms") if name in row)
    memory = row["temporary_gb"] if "temporary_gb" in row else (row.get("compiled_bytes") or 0) / 1e9
    found = 1e3 * row["batch"] / milliseconds
    return (f"{found:,.0f}" if found >= 100 else f"{found:.3g}") + (f", {memory:.1f}" if memory else "")


def scores(results: dict[str, dict]) -> Iterable[str]:
    """Lines of the table of digits: mean over seeds and standard deviation."""
    yield "| mixer | parameters | seeds | Frechet distance | conditional accuracy |"
    yield "|---|---|---|---|---|"
    for name in ROWS:
        found = [results[f"{name}, seed {seed}"] for seed in SEEDS if f"{name}, seed {seed}" in results]
        if found:
            cells = [spread([row[field] for row in found]) for field in ("frechet", "conditional_accuracy")]
            yield f"| {name} | {found[0]['parameters']:,} | {len(found)} | {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    """Mean, sample standard deviation and the values."""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation} ({', '.join(f'{value:.3f}' for value in values)})"


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "time": timed,
    "compile": compiled,
    "score": scored,
    "render": rendered,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, choices=TOKENS)
    parser.add_argument("--what", nargs="+", default=WHATS, choices=WHATS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing else is begun")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("runs/mixers"), help="of the runs on digits"
    )
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="where to keep the last program's text")
    flags = parser.parse_args()
    if flags.command in ("compile", "score"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # for compile the plugin for CUDA is loaded all the same
    if flags.command == "compile" and importlib.util.find_spec("jax_cuda13_plugin") is None:
        sys.exit("error: XLA's compiler for GPUs must be installed (jax[cuda13]), found none: use make gpu-compile")
    sys.path.insert(0, str(ROOT))
    from benchmarks.released_gspn import ReleasedOptions
    from gspn_jax import cli
    from gspn_jax.tables import MIXERS

    logging.basicConfig(level="WARNING")
    MIXERS["released_gspn"] = ReleasedOptions
    with cli.user_errors():
        COMMANDS[flags.command](flags)


if __name__ == "__main__":
    main()
