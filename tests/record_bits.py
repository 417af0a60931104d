"""Record of what a change of structure must not change: losses, parameters, samples, metrics and latents, as digests.

python -m tests.record_bits write       measures and writes tests/record_bits.json
python -m tests.record_bits compare     measures again and names every entry that differs (exit code 1)
python -m tests.record_bits old-run     writes the run directory tests/runs/old_run anew (only for another format)

Digests are those of one machine and one version of JAX: compare on the machine that wrote them. Runs are tiny (hidden
64, depth 2, images of 8x8, 20 steps); each mesh has a process of its own with as many virtual CPU devices.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from tests.quick_compile import QUICK_COMPILE

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "record_bits.json"
OLD_RUN = ROOT / "tests" / "runs" / "old_run"
STEPS = 20
MESHES = {1: (1, 1, 1), 4: (1, 4, 1), 8: (2, 2, 2)}
"""Devices of a process -> ("data", "fsdp", "tensor")."""
KINDS = {
    "paper": {"preset": "GSPN-S/2"},
    "dit": {"preset": "DiT-S/2", "heads": 4},
    "dit-gspn": {"preset": "DiT-S/2", "mixer": "gspn", "chunk": 2},
}
SAMPLERS = {
    "ddpm": ("ddpm", {"guidance_interval": (0.2, 0.8)}),
    "ddim": ("ddpm", {"ddim_eta": 0.5}),
    "dpm++": ("ddpm", {"clip_denoised": True}),
    "euler": ("flow", {"guidance_channels": "first3"}),
    "heun": ("flow", {}),
}


def config(run_dir: pathlib.Path, kind: str, objective: str, *, accumulate: int = 1, mesh=(1, 1, 1), **train):
    """One of the runs that are recorded; "ddpm" computes in bfloat16, "flow" in float32."""
    from gspn_jax.config import (
        Config,
        DataConfig,
        DiffusionConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        SamplerConfig,
        TrainConfig,
    )

    compute = {"ddpm": "bfloat16", "flow": "float32"}[objective]
    settings = {
        "steps": STEPS,
        "batch_size": 16,
        "accumulate": accumulate,
        "log_every": 1,
        "sample_every": STEPS,
        "save_every": STEPS,
        "ema_decays": (0.9, 0.99),
        "precision": f"params=float32,compute={compute}",
    } | train
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(hidden=64, depth=2, drop_path=0.1, **KINDS[kind]),
        data=DataConfig(),
        diffusion=DiffusionConfig(objective=objective),
        sampler=SamplerConfig(steps=3),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        mesh=MeshConfig(*mesh),
        train=TrainConfig(**settings),
    )


def digest(tree: Any) -> str:
    """16 hex digits over the leaves of a tree, or over bytes."""
    import jax

    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(leaf if isinstance(leaf, bytes) else np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return total.hexdigest()[:16]


def trained(settings) -> dict[str, Any]:
    """Losses and gradient norms of every step, evaluations, the digest of what was saved and of the grid's pixels."""
    import jax
    from PIL import Image

    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints
    from gspn_jax.training.train import train

    run_dir = train(settings)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keep = ("loss", "grad_norm", "eval/fid", "eval/is", "eval/kid", "eval/precision", "eval/recall", "eval/sfid")
    one = sharding.make_mesh(settings.mesh)
    saved = {
        decay: checkpoints.restore_params(run_dir, settings.train.steps, settings, one, ema_decay=decay)
        for decay in (0.0, *settings.train.ema_decays)
    }
    grids = {path.name: digest(Image.open(path).tobytes()) for path in sorted((run_dir / "samples").glob("*.png"))}
    metrics = [{"step": line["step"]} | {name: line[name] for name in keep if name in line} for line in lines]
    return {
        "metrics": metrics,
        "grids": grids,
        "parameters": {str(decay): digest(jax.device_get(params)) for decay, params in saved.items()},
    }


def measure_training(folder: pathlib.Path, devices: int) -> dict[str, Any]:
    """Entries of every kind of model on the mesh of `devices`; one of them in micro-batches."""
    mesh = MESHES[devices]
    runs = [(kind, objective, 1) for kind in KINDS for objective in ("ddpm", "flow")]
    runs += [(kind, "flow", 2) for kind in KINDS]
    if devices > 1:
        runs = [("paper", "ddpm", 1), ("dit", "ddpm", 1), ("dit-gspn", "flow", 2)]
    entries = {}
    for kind, objective, accumulate in runs:
        name = f"{kind} {objective} accumulate {accumulate} on {'x'.join(map(str, mesh))}"
        entries[name] = trained(
            config(folder / name.replace(" ", "_"), kind, objective, accumulate=accumulate, mesh=mesh)
        )
    return entries


def measure_samples(folder: pathlib.Path) -> dict[str, Any]:
    """Digests of images of every sampler, from the runs that were just trained."""
    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints
    from gspn_jax.sampling.sampler import Sampler

    entries = {}
    for name, (objective, options) in SAMPLERS.items():
        settings = config(folder / f"paper_{objective}_accumulate_1_on_1x1x1", "paper", objective)
        sampler = dataclasses.replace(settings.sampler, name=name, steps=4, guidance_scale=1.5, **options)
        settings = dataclasses.replace(settings, sampler=sampler)
        mesh = sharding.make_mesh(settings.mesh)
        params = checkpoints.restore_params(settings.run_dir, STEPS, settings, mesh)
        entries[f"samples of {name}"] = digest(Sampler(settings, mesh)(params, np.arange(8), np.arange(8)))
    return entries


def measure_metrics(folder: pathlib.Path) -> dict[str, Any]:
    """Scores during training, of that run by the command and of a fixed .npz; Inception has random weights."""
    from safetensors.numpy import save_file

    from gspn_jax import evaluate
    from gspn_jax.config import EvalConfig
    from gspn_jax.metrics import inception

    weights, reference, samples = folder / "inception.safetensors", folder / "reference.npz", folder / "samples.npz"
    save_file(inception.random_state_dict(0), weights)
    for seed, path in enumerate((reference, samples)):
        np.savez(path, arr_0=np.random.default_rng(seed).integers(0, 256, (12, 8, 8, 3), np.uint8))
    metrics = ("fid", "is", "kid", "precision", "recall")
    settings = dataclasses.replace(
        config(folder / "evaluated", "dit", "flow", steps=4, save_every=2, sample_every=0),
        eval=EvalConfig(
            every=2, num_samples=13, metrics=metrics, reference=str(reference), inception=str(weights), batch_size=8
        ),
    )
    entries = {"evaluation in training": trained(settings)}
    common = ("--inception", str(weights), "--reference", str(reference), "--batch-size", "8")
    evaluate.main(["--samples", str(samples), "--output", str(folder / "samples.json"), *common])
    evaluate.main(["--run", settings.run_dir, "--num-samples", "13", "--output", str(folder / "run.json"), *common])
    for name in ("samples", "run"):
        result = json.loads((folder / f"{name}.json").read_text())
        entries[f"metrics of {name}"] = {"metrics": result["metrics"], "warnings": result["warnings"]}
    return entries


def measure_latents(folder: pathlib.Path) -> dict[str, Any]:
    """Latents of fixed images, the batches drawn from them, a run on them, and its samples decoded."""
    from PIL import Image
    from safetensors.numpy import save_file

    import sample
    from gspn_jax import prepare
    from gspn_jax.config import DataConfig
    from gspn_jax.data import make_loader, make_source
    from tests.autoencoder import numpy_vae

    save_file(numpy_vae.random_state_dict(), folder / "vae.safetensors")
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / "images" / str(i % 10) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (11 + i, 24, 3), np.uint8)).save(path)
    prepare.main(
        [
            "latents",
            "--vae",
            str(folder / "vae.safetensors"),
            "--output",
            str(folder / "latents"),
            "--images",
            str(folder / "images"),
            "--image-size",
            "16",
            "--shard-size",
            "8",
            "--batch-size",
            "4",
        ]
    )
    data = DataConfig(source="latents", path=str(folder / "latents"), image_size=8, channels=4, flip=True)
    source = make_source(data)
    with make_loader(data, source, batch_size=6, seed=0) as loader:
        batches = [next(loader) for _ in range(5)]
    settings = dataclasses.replace(config(folder / "on_latents", "paper", "ddpm", steps=5, save_every=5), data=data)
    entries = {
        "latents": {
            "records": digest([source[i] for i in range(len(source))]),
            "batches": digest(batches),
            "fingerprint": source.fingerprint,
            "run": trained(settings),
        }
    }
    sample.main(
        [
            "--run",
            settings.run_dir,
            "--num-samples",
            "6",
            "--output",
            str(folder / "decoded.npz"),
            "--vae",
            str(folder / "vae.safetensors"),
            "--batch-size",
            "4",
        ]
    )
    with np.load(folder / "decoded.npz") as file:
        entries["latents"]["decoded"] = digest([file["arr_0"], file["arr_1"]])
    return entries


def old_run_config(run_dir: pathlib.Path):
    """The run of `OLD_RUN`: a paper layout of hidden 16, three steps of six."""
    settings = config(run_dir, "paper", "flow", sample_every=0, steps=3, save_every=3)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, hidden=16))


def measure_old_run(folder: pathlib.Path) -> dict[str, Any]:
    """What today's code makes of the run directory of the commit before: it goes on, and is exported."""
    from gspn_jax import convert

    entries = {}
    shutil.copytree(OLD_RUN, folder / "old_run")
    settings = old_run_config(folder / "old_run")
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=6))
    entries["old run goes on"] = trained(settings)
    convert.main(["export", "--run", str(OLD_RUN), "--output", str(folder / "exported")])
    entries["old run exported"] = digest((folder / "exported" / "model.safetensors").read_bytes()[-4096:])
    return entries


def measure(devices: int) -> dict[str, Any]:
    """All that is measured in a process of `devices` devices."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        entries = measure_training(folder, devices)
        if devices == 1:
            for more in (measure_samples, measure_metrics, measure_latents, measure_old_run):
                entries |= more(folder)
    return entries


def measure_all() -> dict[str, Any]:
    """The entries of all meshes, each measured in a process that has so many devices."""
    entries = {}
    for devices in MESHES:
        flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        }
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            subprocess.run(
                [sys.executable, "-m", "tests.record_bits", "measure", str(devices), file.name],
                cwd=ROOT,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            entries |= json.load(file)
    return entries


def about() -> dict[str, str]:
    import jax

    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {"jax": jax.__version__, "python": platform.python_version(), "cpu": cpu}


def different(recorded: Any, found: Any, name: str = "") -> list[str]:
    """A line for each value that is not the recorded one, to the bit."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        return [
            line
            for key in recorded.keys() | found.keys()
            for line in different(recorded.get(key), found.get(key), f"{name}/{key}")
        ]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        return [
            line for i, pair in enumerate(zip(recorded, found, strict=True)) for line in different(*pair, f"{name}/{i}")
        ]
    return [] if recorded == found else [f"{name}: recorded {recorded!r}, found {found!r}"]


def main(action: str, *arguments: str) -> None:
    if action == "measure":
        devices, path = arguments
        entries = measure(int(devices))
        pathlib.Path(path).write_text(json.dumps(entries))
    elif action == "old-run":
        from gspn_jax.training.train import train

        shutil.rmtree(OLD_RUN, ignore_errors=True)
        with tempfile.TemporaryDirectory() as name:
            train(old_run_config(pathlib.Path(name) / "old_run"))
            shutil.rmtree(pathlib.Path(name) / "old_run" / "tensorboard", ignore_errors=True)
            shutil.copytree(pathlib.Path(name) / "old_run", OLD_RUN)
    else:
        entries = json.loads(json.dumps(measure_all()))
        if action == "write":
            RECORD.write_text(json.dumps({"about": about(), "entries": entries}, indent=1) + "\n")
            print(f"{len(entries)} entries written to {RECORD}")
        else:
            recorded = json.loads(RECORD.read_text())
            lines = different(recorded["entries"], entries)
            print("\n".join(sorted(lines)) or f"all {len(entries)} entries are equal to the bit")
            print(f"recorded with {recorded['about']}, compared with {about()}")
            sys.exit(bool(lines))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["compare"]))
