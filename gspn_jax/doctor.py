"""Looks at a machine, and at the config of a run, before the run is started: says in plain words what will not work.

python -m gspn_jax.doctor                              the machine
python -m gspn_jax.doctor --config configs/digits.py   and a run: mesh, memory, disk, data set, files of weights
python -m gspn_jax.doctor --config configs/gspn_t.py   and one that trains a classifier

Exit codes: 0 nothing found that would stop the run, 1 something that would, 2 a config that cannot be used.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gspn_jax import cli
from gspn_jax.config import Config, ConfigError, RunConfig

if TYPE_CHECKING:
    from gspn_jax.text_to_image.config import LayersConfig
    from gspn_jax.training.task import Task

OLDEST, TOO_NEW = (0, 10, 2), (0, 13)
"""The versions of JAX that the tests run with: from the first, before the second."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
WRITTEN_BYTES = 2**26
REDUCED_VALUES = 2**22
KEPT_CHECKPOINTS = 3
"""The latest two and the one that is being written."""
TOLERANCE = 1e-4
"""Largest error of a backend's values and gradients against those of the scan, relative to the largest."""
BFLOAT16_TOLERANCE = 5e-2
"""The same where a backend computes in bfloat16 and the scan in float32."""
LOCAL = {"chunk": 2}


MARKS = {True: "ok     ", False: "PROBLEM", None: "note   "}


class Finding(NamedTuple):
    """`works` None: a note."""

    works: bool | None
    text: str


Findings = Iterator[Finding]


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    cli.setup()
    from gspn_jax.data import DataError
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError

    argv = cli.words(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    with cli.user_errors():
        argv = cli.join_other_hosts(argv)
        config = cli.parse_config(argv, program="gspn_jax.doctor", description=__doc__, cls=RunConfig) if argv else None
    checks: dict[str, Callable[[], Findings]] = {
        "versions": versions,
        "devices": devices,
        "kernels": kernels,
        "attention": attention,
    }
    if config:
        checks |= {
            "beginning": lambda: beginning(config),
            "mesh": lambda: mesh(config),
            "memory": lambda: memory(config),
            "disk": lambda: disk(config),
            "data": lambda: data_set(config),
            "files": lambda: files_of(config),
        }
    wrong = []
    for name, check in checks.items():
        print(f"{name}:", flush=True)
        try:
            for finding in check():
                print(" ", MARKS[finding.works], finding.text, flush=True)
                if finding.works is False:
                    wrong.append(finding.text)
        except (ConfigError, DataError, CheckpointError, WeightsError, OSError, ImportError) as error:
            print(" ", MARKS[False], error, flush=True)
            wrong.append(str(error))
    if wrong:
        print(f"{len(wrong)} of these would stop the run or make it wrong:", *wrong, sep="\n  ")
        sys.exit(1)
    print("nothing was found that would stop a run" + ("" if config else "; --config CONFIG looks at one run"))


def versions() -> Findings:
    import jax

    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            advice = ": what trains needs data.in_memory" if name == "grain" else ""
            yield Finding(None if name == "grain" else False, f"{name} is not installed{advice}")
    yield Finding(sys.version_info >= (3, 11), f"Python {sys.version.split()[0]} (3.11 or newer is needed)")
    number = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())
    yield Finding(OLDEST <= number < TOO_NEW, f"JAX {jax.__version__} (0.10.2 to 0.12 are supported)")
    yield Finding(None, ", ".join(f"{name} {version}" for name, version in found.items()))


def devices() -> Findings:
    import jax

    found = jax.devices()
    yield Finding(
        None,
        f"{len(found)} {found[0].device_kind} by {jax.default_backend()}, "
        f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}",
    )
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        yield Finding(
            False,
            "this machine has nvidia-smi, but JAX sees no GPU: install jax[cuda13], or look at what "
            "`python -c 'import jax; jax.devices()'` says",
        )
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        used = stats["bytes_in_use"] / stats["bytes_limit"]
        yield Finding(used < 0.1, f"{stats['bytes_limit'] / 1e9:.1f} GB of memory a device, {used:.0%} in use")
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    for device in jax.local_devices():
        y = np.asarray(jax.device_put(x, device) @ jax.device_put(x.T, device))
        wrong = np.abs(y - x.astype(np.float64) @ x.T.astype(np.float64)).max()
        if wrong > 1:  # TF32 is at about 0.05
            yield Finding(False, f"{device} multiplies matrices wrongly (off by {wrong:.3g}): it may be faulty")
    yield Finding(True, "every device multiplies matrices as NumPy does")


def kernels() -> Findings:
    """The scan against a loop in float64, every other backend against the scan: each operator, with gradients."""
    import jax
    import jax.numpy as jnp

    from gspn_jax.kernels import (
        available_backends,
        backend_caveats,
        depthwise,
        depthwise_conv,
        line_scan,
        propagate,
        propagate_low_rank,
        stochastic_weights,
    )

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def run(operator: Callable, arrays: list, dtype=jnp.float32, **options) -> list[np.ndarray]:
        """The value and what every array gets from a cotangent that is the value."""

        def both(arrays):
            y, pull = jax.vjp(lambda arrays: operator(*arrays, **options), arrays)
            return [y, *pull(y)[0]]

        return [np.asarray(a, np.float64) for a in jax.jit(both)([jnp.asarray(a, dtype) for a in arrays])]

    def scan_down(x, gates, **options):
        return line_scan(x, *stochastic_weights(gates, direction="down"), direction="down", **options)

    def grouped(x, taps):
        return jax.lax.conv_general_dilated(
            x, taps[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[3], precision="highest",
        )  # fmt: skip

    def rounded(arrays: list, dtype) -> list[np.ndarray]:
        """The numbers that a backend of `dtype` gets, in float32."""
        return [np.asarray(jnp.asarray(a, dtype), np.float32) for a in arrays]

    x, merge = normal(4, 16, 16, 64), np.full(4, 0.25, np.float32)
    one = [x, normal(4, 16, 16, 3, 64)]
    four = [x, normal(4, 16, 16, 4, 3, 64), normal(4, 16, 16, 4, 64), normal(4, 16, 16, 4, 64), merge]
    low_rank = [x, normal(4, 16, 16, 32), *(0.2 * normal(32, 4, *shape) for shape in ((3, 64), (64,), (64,))), merge]

    left, center, right = (np.asarray(w, np.float64) for w in stochastic_weights(jnp.asarray(one[1]), direction="down"))
    h, wanted = np.zeros((4, 18, 64)), []
    for t in range(16):
        h[:, 1:-1] = left[:, t] * h[:, :-2] + center[:, t] * h[:, 1:-1] + right[:, t] * h[:, 2:] + x[:, t]
        wanted.append(h[:, 1:-1].copy())
    yield _same("the 'scan' backend", "a float64 loop", run(scan_down, one, backend="scan")[:1], [np.stack(wanted, 1)])
    for backend in available_backends():
        if backend in ("scan", "reference"):
            continue
        for name, operator, arrays, dtype, tolerance, options in (
            ("line_scan", scan_down, one, jnp.float32, TOLERANCE, {}),
            ("propagate", propagate, four, jnp.float32, TOLERANCE, {}),
            ("propagate_low_rank", propagate_low_rank, low_rank, jnp.bfloat16, BFLOAT16_TOLERANCE, {}),
            # with chunk=2 it has a kernel of its own
            ("propagate_low_rank, chunk=2,", propagate_low_rank, low_rank, jnp.bfloat16, BFLOAT16_TOLERANCE, LOCAL),
        ):
            yield _same(
                f"{name} by the {backend!r} backend",
                "the scan, with gradients,",
                run(operator, arrays, dtype, backend=backend, **options),
                run(operator, rounded(arrays, dtype), backend="scan", **options),
                tolerance,
            )
    convolved = [normal(2, 8, 16, 256), normal(7, 7, 256)]
    reason = depthwise.refusal(*(jnp.asarray(a, jnp.bfloat16) for a in convolved))
    if reason:
        yield Finding(None, f"depthwise convolutions are XLA's: our kernel {reason}")
    else:
        yield _same(
            "depthwise_conv by our kernel",
            "XLA's, with gradients,",
            run(depthwise_conv, convolved, jnp.bfloat16),
            run(grouped, rounded(convolved, jnp.bfloat16)),
            BFLOAT16_TOLERANCE,
        )
    for backend, caveat in backend_caveats().items():
        yield Finding(None, f"the {backend!r} backend {caveat}")


def attention() -> Findings:
    """Attention of the models in bfloat16 against a float64 softmax, with gradients against XLA's in float32."""
    import jax
    import jax.numpy as jnp

    from gspn_jax.models import attention

    rng = np.random.default_rng(0)
    rounded = [jnp.asarray(rng.standard_normal((2, 256, 4, 72)), jnp.bfloat16) for _ in range(3)]
    choice = attention.choose((2, 256, 4, 72), rounded[0].dtype)
    q, k, v = (np.asarray(a, np.float64) for a in rounded)
    weights = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]))
    truth = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)

    def run(arrays: list) -> list[np.ndarray]:
        def both(q, k, v):
            y, pull = jax.vjp(attention.attention, q, k, v)
            return [y, *pull(y)]

        return [np.asarray(a, np.float64) for a in jax.jit(both)(*arrays)]

    what = f"attention by {choice.implementation!r}"
    found, exact = run(rounded), run([a.astype(jnp.float32) for a in rounded])
    yield _same(what, "a float64 softmax", found[:1], [truth], BFLOAT16_TOLERANCE)
    yield _same(what, "itself in float32, with gradients,", found, exact, BFLOAT16_TOLERANCE)
    if choice.reason:
        yield Finding(None, f"cuDNN's flash attention {choice.reason}")


def _same(
    what: str, reference: str, found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float = TOLERANCE
) -> Finding:
    off = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True))
    return Finding(bool(off < tolerance), f"{what} agrees with {reference} to {off:.1e} (at most {tolerance:.0e})")


def task_of(config: RunConfig) -> "Task":
    """The task that the config is of."""
    from gspn_jax.classify.config import ClassifyConfig
    from gspn_jax.classify.task import ClassificationTask
    from gspn_jax.text_to_image.config import LayersConfig
    from gspn_jax.text_to_image.distillation import LayersTask
    from gspn_jax.training.train import diffusion_task

    if isinstance(config, ClassifyConfig):
        return ClassificationTask(config)
    if isinstance(config, LayersConfig):
        return LayersTask(config)
    assert isinstance(config, Config), "the command line reads no other"
    return diffusion_task(config)


def mesh(config: RunConfig) -> Findings:
    """Builds the mesh and sums over all of it, checking the values and taking the time."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from gspn_jax.parallel import sharding

    found = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, found)
    yield Finding(True, "mesh " + " x ".join(f"{name} {size}" for name, size in found.shape.items()))
    count = len(jax.devices())
    if count == 1:
        return
    split = NamedSharding(found, PartitionSpec(found.axis_names))
    values = jax.jit(
        lambda: jax.numpy.broadcast_to(
            jax.numpy.arange(count, dtype=jax.numpy.float32)[:, None], (count, REDUCED_VALUES)
        ),
        out_shardings=split,
    )()
    reduce = jax.jit(lambda a: a.sum(0), out_shardings=NamedSharding(found, PartitionSpec()))
    total = jax.block_until_ready(reduce(values))
    right = bool((np.asarray(total.addressable_data(0)) == count * (count - 1) / 2).all())
    start = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(reduce(values))
    seconds = (time.perf_counter() - start) / 3
    size = 4 * REDUCED_VALUES
    yield Finding(
        right,
        f"an all-reduce of {size / 1e6:.0f} MB over {count} devices is "
        f"{'right' if right else 'WRONG'} and takes {1e3 * seconds:.1f} ms "
        f"({2 * (count - 1) / count * size / seconds / 1e9:.1f} GB/s a device)",
    )


def memory(config: RunConfig) -> Findings:
    """The state of training against the memory of a device; activations come on top."""
    import jax

    from gspn_jax.parallel import sharding
    from gspn_jax.training.state import abstract_state

    state = abstract_state(task_of(config), sharding.make_mesh(config.mesh))
    share = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    text = f"the state takes {share / 1e9:.2f} GB a device, gradients and activations come on top"
    # a gradient of the parameters is held beside the state, which has about four copies of them
    yield Finding(
        None if limit is None else bool(1.25 * share < limit),
        text + (f" (the device has {limit / 1e9:.1f} GB)" if limit else ""),
    )


def disk(config: RunConfig) -> Findings:
    """Writes and reads a file in the run directory, and compares the free space with what checkpoints take."""
    import jax

    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints, readback
    from gspn_jax.training.state import abstract_state

    run_dir = pathlib.Path(config.run_dir)
    try:
        readback.check_path(run_dir, "run_dir")
    except ConfigError as error:
        yield Finding(False, str(error))
        return
    parent = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
    content = os.urandom(WRITTEN_BYTES)
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(tempfile.NamedTemporaryFile(dir=parent))
        except OSError as error:
            yield Finding(False, f"run_dir {config.run_dir} cannot be written: {error.strerror} in {parent}")
            return
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        write = time.perf_counter() - start
        with contextlib.suppress(OSError):  # forget what is cached, where the system can
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        same = pathlib.Path(file.name).read_bytes() == content
        read = time.perf_counter() - start
    yield Finding(
        same,
        f"{parent} is written at {WRITTEN_BYTES / write / 1e6:.0f} MB/s and read at "
        f"{WRITTEN_BYTES / read / 1e6:.0f} MB/s" + ("" if same else ", but what is read is not what was written"),
    )
    state = abstract_state(task_of(config), sharding.make_mesh(config.mesh))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    periodic = config.train.steps // config.train.keep_every if config.train.keep_every else 0
    snapshots = config.train.steps // config.train.snapshot_every if config.train.snapshot_every else 0
    averages = len(config.train.ema_widths) * sum(4 * leaf.size for leaf in jax.tree.leaves(state.exported))
    needed = (KEPT_CHECKPOINTS + periodic) * size + snapshots * averages
    free = shutil.disk_usage(parent).free
    yield Finding(
        free > needed,
        f"{KEPT_CHECKPOINTS + periodic} checkpoints of {size / 1e9:.2f} GB "
        + (f"and {snapshots} snapshots of {averages / 1e9:.2f} GB " if snapshots else "")
        + f"need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        + (f" ({periodic} of them by train.keep_every)" if periodic else "")
        + f"; saving one takes about {size * write / WRITTEN_BYTES:.0f} s beside the training",
    )
    found = checkpoints.newest_whole(run_dir)
    if found:
        step, wrong = found
        yield Finding(
            None,
            f"{run_dir} has a run: training goes on from step {step}"
            + (f"; newer ones that are not whole: {wrong}" if wrong else ""),
        )


def data_set(config: RunConfig) -> Findings:
    """Opens the set and reads batches for a moment, as they are trained on."""
    import jax

    task = task_of(config)
    source = task.source()
    yield Finding(True, f"{len(source):,} images of {len(source.class_names)} classes")
    hosts = jax.process_count()
    with task.loader(source, seed=config.train.seed, num_hosts=hosts, host=jax.process_index()) as loader:
        next(loader)
        start, count = time.perf_counter(), 0
        while count < 3 or (time.perf_counter() - start < 2 and count < 50):
            next(loader)
            count += 1
        rate = count * config.train.batch_size / hosts / (time.perf_counter() - start)
    yield Finding(None, f"this host reads {rate:,.0f} images/s")


def files_of(config: RunConfig) -> Findings:
    """The files beside its data that a run of any task needs."""
    from gspn_jax.text_to_image.config import LayersConfig

    if isinstance(config, Config):
        return weight_files(config)
    return teacher_files(config) if isinstance(config, LayersConfig) else classifier_files(config)


def teacher_files(config: "LayersConfig") -> Findings:
    """The U-Net whose self-attentions are distilled."""
    from gspn_jax.text_to_image.distillation import with_teacher

    digest = with_teacher(config).model.unet_sha256
    yield Finding(True, f"the U-Net in {config.model.folder}, SHA-256 {digest}")


def weight_files(config: Config) -> Findings:
    """The files that evaluation during training needs, if the config asks for it."""
    from gspn_jax import autoencoder
    from gspn_jax.metrics.networks import read_networks
    from gspn_jax.metrics.reference import read_reference

    settings = config.eval
    if not settings.every:
        yield Finding(None, "none is needed: eval.every is 0")
        return
    weights = read_networks(settings.metrics, settings.inception, settings.networks, "--eval.")
    for name, one in weights.items():
        yield Finding(True, f"{name.capitalize()} weights {one.path}")
    if settings.reference:
        reference = read_reference(settings.reference, "eval.reference")
        reference.check(settings.metrics)
        for name, one in weights.items():
            reference.check_weights(name, one.digest)
        yield Finding(True, f"reference statistics {settings.reference} for {', '.join(settings.metrics)}")
    if config.data.latents and not settings.vae:
        yield Finding(False, "eval.vae must be the autoencoder's weights, which decode the samples of a run on latents")
    if settings.vae:
        autoencoder.load(settings.vae)
        yield Finding(True, f"autoencoder {settings.vae}")


def classifier_files(config: RunConfig) -> Findings:
    """The images that are evaluated on."""
    from gspn_jax.classify.config import ClassifyConfig
    from gspn_jax.classify.scoring import validation_source

    assert isinstance(config, ClassifyConfig), "the command line reads no other"
    if not config.eval.every:
        yield Finding(None, "nothing is evaluated: eval.every is 0")
        return
    images = validation_source(config, task_of(config).source().class_names)
    yield Finding(True, f"{len(images):,} images to evaluate on, of the same classes")


def beginning(config: RunConfig) -> Findings:
    """The weights that a new run begins with, by their shapes, and the part that is trained."""
    from gspn_jax.training import only, start

    task = task_of(config)
    given = task.given()
    if given is None:
        yield Finding(None, "the parameters of a new run are fresh")
    else:
        lines = start.plan(given, task.shapes)
        anew = sum(line.origin == "anew" for line in lines)
        yield Finding(True, f"a new run begins with {given.said}: {len(lines) - anew} tensors fit, {anew} begin anew")
    only.trained(config.train, task.shapes)


if __name__ == "__main__":
    main()
