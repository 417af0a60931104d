"""The GPUs that the kernel is made for: what differs between their generations, and for which of them it is traced.

A number that a measurement on some GPU should change is a field of `Device`, and its value stands in `DEVICES`.
All of them have 65,536 registers a multiprocessor: 128 for each thread of a block of four warpgroups.
benchmarks/kernel_assembly.py assembles the kernel for each of them; the table is in docs/kernel_code.md.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.extend.backend import get_default_device

from gspn_jax.kernels import compat, sharding

KIB = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Tuning of the kernel for chunk=2."""

    slab: int = 8
    """Channels of a block, 8 or 16."""
    by_copies: bool = False
    """Whether the copy engine and wgmma do what threads and mma.sync do elsewhere."""

    @property
    def missing(self) -> str | None:
        """Reason why JAX cannot make it, or None."""
        if not (compat.RESHAPES_REFERENCES or compat.interpreting()):
            return f"needs JAX 0.11 or newer, and this is {jax.__version__}"
        if not (self.by_copies or compat.multiplies_registers()):
            return f"needs JAX 0.11.2 or newer on GPUs without wgmma, and this is {jax.__version__}"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depthwise:
    """Tuning of depthwise convolutions."""

    segment: int = 16
    """Columns that a warpgroup takes at most at a time: their sums are in registers."""
    strip: int = 8
    """Rows that a block takes at most: those it shares with the next one are loaded twice, if from the L2 cache."""
    blocks: int = 3
    """Blocks of one warpgroup that keep a multiprocessor busy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What the kernel may use on GPUs of one compute capability, and how it is cut for them."""

    capability: str
    examples: str
    shared_bytes: int
    """Of shared memory that a block may have, less 1 KiB that barriers and Pallas itself take."""
    scan_bytes: int
    """Of that, what a block takes that reads all terms from device memory; the rest is for the L1 cache."""
    joint_tile: int = 1024
    """Elements of a line computed at a time, 8 a thread, where the directions meet."""
    apart_tile: int = 512
    """The same where they do not: a warpgroup carries several tiles of a line, and with more of each the backward
    kernel would spill registers."""
    shared_joint: bool = True
    """Whether a block whose directions meet takes weights that its channels share; where it would spill registers,
    directions do not meet for them."""
    skip_joint: bool = True
    """The same for a skip term that is expanded in registers."""
    shared_tile: int | None = None
    """`apart_tile` for weights that channels share, if another one, lest the backward kernel spill."""
    local: Local = Local()
    depthwise: Depthwise = Depthwise()
    multiprocessors: int
    """Multiprocessors of the first of the examples, or of the GPU at hand; work is split so that few are idle."""
    oldest_jax: tuple[int, ...] = (0, 10, 2)
    """The first version whose Pallas can assemble for it."""


_AMPERE = (0, 11, 2)
"""JAX 0.10 waits at barriers with an instruction of compute capability 9.0, and under `shard_map` so do 0.11.0 and
0.11.1, which take every mesh for one of that capability."""

_LARGE = {"shared_bytes": 226 * KIB, "scan_bytes": 200 * KIB}
_SMALL = {"shared_bytes": 98 * KIB, "scan_bytes": 96 * KIB}

DEVICES = {
    device.capability: device
    for device in (
        Device(capability="8.0", examples="A100", shared_bytes=162 * KIB, scan_bytes=160 * KIB,
               joint_tile=512, apart_tile=256, shared_joint=False, skip_joint=False, multiprocessors=108,
               oldest_jax=_AMPERE),
        Device(capability="8.6", examples="RTX 3090, A10", **_SMALL, shared_tile=256, multiprocessors=82,
               oldest_jax=_AMPERE),
        Device(capability="8.9", examples="RTX 4090, L4, L40S", **_SMALL, shared_tile=256, multiprocessors=128,
               oldest_jax=_AMPERE),
        Device(capability="9.0", examples="H100, H200", **_LARGE, multiprocessors=132,
               local=Local(slab=16, by_copies=True)),
        Device(capability="10.0", examples="B200", **_LARGE, multiprocessors=148),
        Device(capability="10.3", examples="B300", **_LARGE, multiprocessors=148),
        Device(capability="12.0", examples="RTX 5090", **_SMALL, multiprocessors=170),
        Device(capability="12.1", examples="GB10", **_SMALL, multiprocessors=48),
    )
}  # fmt: skip
"""By compute capability."""

DEFAULT = "9.0"
"""What Pallas lowers for on a machine without a GPU."""

_asked = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def for_device(device: Device | str) -> Iterator[Device]:
    """Kernels traced and lowered inside are made for `device`, a compute capability of `DEVICES` or tuning of one's
    own, whatever this machine has; they run on GPUs of that compute capability only, or interpreted.

        with for_device("8.0"):
            jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))

    Functions that were traced before are traced anew.
    Raises ValueError for another capability.
    """
    if isinstance(device, str):
        if device not in DEVICES:
            raise ValueError(f"device must be a compute capability of {', '.join(DEVICES)}, found {device!r}.")
        device = DEVICES[device]
    compat.lower_for(_capability_asked_for)
    with _asked(device):
        yield device


def _capability_asked_for() -> tuple[int, int] | None:
    return None if _asked.value is None else tuple(map(int, _asked.value.capability.split(".")))


def current() -> Device:
    """The device that kernels traced now are made for: that of `for_device`, or else JAX's default device with the
    multiprocessors that it has, or DEFAULT where `missing` has a reason against it."""
    if _asked.value is not None:
        return _asked.value
    default = get_default_device()
    found = DEVICES.get(_capability(default))
    if found is None:
        return DEVICES[DEFAULT]
    return dataclasses.replace(found, multiprocessors=getattr(default, "core_count", found.multiprocessors))


def missing() -> str | None:
    """Why kernels traced now have no device to run on, or None."""
    if compat.interpreting():
        return None
    if _asked.value is not None:
        return _too_old(_asked.value)
    default = get_default_device()
    candidates = _candidates(default)
    for device in candidates:
        if device.platform != "gpu":
            return f"needs an NVIDIA GPU, and this machine's device is {device.device_kind!r}"
    found = list(dict.fromkeys(map(_capability, candidates)))
    if len(found) > 1:  # Pallas lowers for the default device
        return (
            f"needs GPUs of one compute capability, and found {' and '.join(found)}: CUDA_VISIBLE_DEVICES chooses "
            f"those of one kind"
        )
    if found[0] not in DEVICES:
        return (
            f"needs an NVIDIA GPU of compute capability {', '.join(DEVICES)}, and {default.device_kind!r} has "
            f"{found[0]}"
        )
    return _too_old(DEVICES[found[0]])


def _too_old(device: Device) -> str | None:
    if jax.__version_info__ >= device.oldest_jax:
        return None
    return (
        f"needs JAX {'.'.join(map(str, device.oldest_jax))} or newer on GPUs of compute capability "
        f"{device.capability}, and this is {jax.__version__}"
    )


def _candidates(default: jax.Device) -> list[jax.Device]:
    """The devices that a program traced now may run on: the mesh's, or the one that was chosen, or any."""
    mesh = sharding.current_mesh()
    if isinstance(mesh, jax.sharding.Mesh):  # that of an enclosing shard_map has no devices
        return [default, *mesh.devices.flat]
    return jax.devices() if jax.config.jax_default_device is None else [default]


def _capability(device: jax.Device) -> str:
    return str(getattr(device, "compute_capability", "none"))
