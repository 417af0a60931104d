"""Compiles Mosaic GPU kernels to PTX and machine code on a machine without a GPU.

    with toolchain.for_device("10.0"):                   # one compute capability a process
        for module in toolchain.lower(function, *shapes):
            found = toolchain.assemble(module)
            print(found.registers, found.spilled_bytes, found.shared_bytes, len(found.ptx))

The wheels of JAX's CUDA plugin, of the version of jaxlib, and of ptxas are fetched with pip on first use (250 MB, into
~/.cache/gspn_jax/cuda) and unpacked, not installed. A stand-in for NVIDIA's driver (emulator/stand_in_driver.cc) tells
the plugin which GPU to compile for. Nothing runs on a device. Needs Linux, g++, and JAX 0.11 or newer on CPU.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.mosaic.gpu.core as mosaic
import jaxlib

from gspn_jax.kernels import devices

NVCC = "nvidia-cuda-nvcc-cu12==12.9.86"
"""The wheel that has ptxas."""
NVDISASM = "nvidia-cuda-nvdisasm==13.5.37"
"""The wheel that has the disassembler; there is none of CUDA 12."""
SOURCES = pathlib.Path(__file__).resolve().parent / "emulator"
DRIVER = "libcuda.so.1"
_COMPILER = ("g++", "-O2", "-march=native", "-std=c++17", "-Wall", "-shared", "-fPIC")


_HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_void_p),
)
_capabilities: dict[str, float] = {}


class ToolchainError(RuntimeError):
    """What is missing to compile kernels here."""


def home() -> pathlib.Path:
    """The folder of what is fetched and built, one for each version of jaxlib."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "gspn_jax" / "cuda" / jaxlib.__version__


def fetch() -> pathlib.Path:
    """The folder with the unpacked wheels, fetched on first use.

    Raises `ToolchainError` under JAX 0.10, which lays the interface of compiled kernels out in another way, and where
    pip cannot have the wheels.
    """
    if jax.__version_info__ < (0, 11):
        raise ToolchainError(f"compiling kernels without a GPU needs JAX 0.11 or newer, this is {jax.__version__}")
    packages = home() / "packages"
    home().mkdir(parents=True, exist_ok=True)
    with open(home() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not packages.exists():
            version = jaxlib.__version__
            _unpack([f"jax-cuda12-pjrt=={version}", f"jax-cuda12-plugin=={version}", NVCC], packages)
    return packages


def fetch_disassembler() -> None:
    """Puts nvdisasm beside ptxas, where Mosaic GPU looks for it; raises `ToolchainError` where pip cannot have it."""
    target = fetch() / "nvidia/cuda_nvcc/bin/nvdisasm"
    with open(home() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unpacked = home() / "nvdisasm"
            _unpack([NVDISASM], unpacked)
            (unpacked / "nvidia/cu13/bin/nvdisasm").rename(target)


def _unpack(requirements: list[str], target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheels, unpacked = pathlib.Path(folder, "wheels"), pathlib.Path(folder, "packages")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *requirements]
        said = subprocess.run(pip, capture_output=True, text=True)
        if said.returncode:
            reason = (said.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ToolchainError(f"pip could not fetch {', '.join(requirements)}: {reason}")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        for program in unpacked.glob("nvidia/*/bin/*"):
            program.chmod(0o755)
        unpacked.rename(target)


def build(source: str, soname: str | None = None) -> pathlib.Path:
    """The shared library of a C++ file of `emulator/`, compiled on this machine if it or a file there is new.

    Raises `ToolchainError` with what the compiler says, or if there is none.
    """
    command = [*_COMPILER, *([f"-Wl,-soname,{soname}"] if soname else [])]
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*texts, " ".join(command).encode(), platform.node().encode()])).hexdigest()[:16]
    library = home() / f"{pathlib.Path(source).stem}-{key}.so"
    if not library.exists():
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home()) as folder:
            built = pathlib.Path(folder, "library.so")
            command += ["-o", str(built), str(SOURCES / source)]
            try:
                said = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise ToolchainError("compiling kernels without a GPU needs g++, and there is none here") from error
            if said.returncode:
                raise ToolchainError(f"{source} does not compile:\n{said.stderr}")
            built.rename(library)
    return library


@functools.cache
def driver() -> ctypes.CDLL:
    """The stand-in for libcuda.so.1: whoever asks for that name from now on finds it, so it is loaded first."""
    found = ctypes.CDLL(str(build("stand_in_driver.cc", soname=DRIVER)), mode=ctypes.RTLD_GLOBAL)
    found.stand_in_said.restype = ctypes.c_char_p
    return found


@functools.cache
def _plugin() -> ctypes.CDLL:
    """The CUDA plugin, whose compiler of kernels is called without a client of it."""
    packages = fetch()
    driver()
    cuda = packages / "nvidia/cuda_nvcc"
    os.environ.update(  # after the import of Mosaic GPU, which writes the first two
        MOSAIC_GPU_CUDA_ROOT=str(cuda),
        MOSAIC_GPU_RUNTIME_LIB_PATH=str(packages / "jax_cuda12_plugin/libmosaic_gpu_runtime.so"),
        PATH=f"{cuda / 'bin'}:{os.environ['PATH']}",
    )
    plugin = ctypes.CDLL(str(packages / "jax_plugins/xla_cuda12/xla_cuda_plugin.so"))
    plugin.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    plugin.MosaicGpuCompile.restype = ctypes.c_void_p
    return plugin


@contextlib.contextmanager
def for_device(device: devices.Device | str) -> Iterator[devices.Device]:
    """`gspn_jax.kernels.devices.for_device`, and kernels are assembled for that compute capability too ("9.0" without).

    The compiler keeps the GPU of the first kernel that a process assembles, so `assemble` refuses another one.
    """
    with devices.for_device(device) as device:
        _set_capability(device.capability)
        try:
            yield device
        finally:
            _set_capability(devices.DEFAULT)


def _set_capability(capability: str) -> None:
    driver().stand_in_set_capability(*map(int, capability.split(".")))


def lower(function: Callable, *shapes: Any) -> list[bytes]:
    """The Mosaic GPU modules of `function`, each once, at arguments of these shapes (`jax.ShapeDtypeStruct`)."""
    mosaic.KNOWN_KERNELS.clear()
    jax.jit(lambda *arrays: function(*arrays)).trace(*shapes).lower(lowering_platforms=("cuda",))
    return list(mosaic.KNOWN_KERNELS.values())


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A kernel as the compiler of Mosaic GPU and ptxas left it."""

    ptx: str
    report: str
    """What ptxas says of the kernel."""
    handle: int
    """Address of the compiled kernel."""
    sass: str
    """The machine code, if it was asked for."""

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._number(r"Used (\d+) registers")

    @property
    def spilled_bytes(self) -> int:
        """Bytes that a thread spills, stores and loads together."""
        return self._number(r"(\d+) bytes spill stores") + self._number(r"(\d+) bytes spill loads")

    @property
    def static_shared_bytes(self) -> int:
        """Shared memory of a block, without what it asks for at its launch."""
        return self._number(r"(\d+) bytes smem")

    def launch(self, arrays: list[int], handler: Callable[[tuple, int, int, list[int]], None]) -> None:
        """Runs the kernel's host code on arrays at these addresses, inputs and then outputs.

        `handler` gets the launches that it makes: (grid, threads of a block, bytes of shared memory, addresses of the
        parameters).
        """
        launched = []

        @_HANDLER
        def on_launch(grid, block, shared_bytes, parameters):
            launched.append(tuple(grid[:3]))
            handler(launched[-1], block[0] * block[1] * block[2], shared_bytes, parameters)
            return 0

        driver().stand_in_set_handler(on_launch)
        pointer = ctypes.c_void_p
        context, host, kernel = (pointer * 3).from_address(self.handle)
        buffers = (pointer * len(arrays))(*arrays)
        if jax.__version_info__ >= (0, 12):  # (kernel, context, stream, buffers, number of the device)
            function = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer, ctypes.c_int)(host)
            function(kernel, context, None, ctypes.addressof(buffers), 0)
        else:
            function = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer)(host)
            function(context, None, ctypes.addressof(buffers))
        if not launched:
            raise ToolchainError(f"the kernel's host code launched nothing: {driver().stand_in_said().decode()}")

    def _number(self, pattern: str) -> int:
        return max(map(int, re.findall(pattern, self.report)), default=0)


def assemble(module: bytes, *, disassemble: bool = False) -> Assembled:
    """Compiles a module of `lower`. Raises `ToolchainError` with what the compiler or ptxas says."""
    if disassemble:
        fetch_disassembler()
    plugin, capability = _plugin(), driver().stand_in_capability() / 10
    first = _capabilities.setdefault("first", capability)
    if capability != first:
        raise ToolchainError(
            f"the first kernel of this process was assembled for compute capability {first}, and so "
            f"would be this one for {capability}: assemble it in another process"
        )
    with tempfile.TemporaryDirectory(prefix="kernel-") as name:
        folder = pathlib.Path(name)
        with _dumping_to(folder, sass=disassemble), _output_to(folder / "log.txt"):
            handle = plugin.MosaicGpuCompile(module, len(module))
        programs, reports = sorted(folder.glob("*.ptx")), sorted(folder.glob("*.ptxas"))
        if not handle or len(programs) != 1:
            raise ToolchainError(f"the kernel does not compile: {(folder / 'log.txt').read_text()[-2000:]}")
        said, sass = ("".join(path.read_text() for path in paths) for paths in (reports, folder.glob("*.sass*")))
        return Assembled(programs[0].read_text(), said, handle, sass)


@contextlib.contextmanager
def _dumping_to(folder: pathlib.Path, *, sass: bool) -> Iterator[None]:
    """Makes the compiler leave the PTX, what ptxas says and perhaps the machine code in `folder`; the lowering in
    Python would dump there too."""
    wanted = dict(MOSAIC_GPU_DUMP_TO=str(folder), MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1")
    if sass:
        wanted["MOSAIC_GPU_DUMP_SASS"] = "1"
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]


@contextlib.contextmanager
def _output_to(path: pathlib.Path) -> Iterator[None]:
    """Sends what C++ writes to both outputs of this process to a file."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with open(path, "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            yield
    finally:
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    try:
        print(f"compiler of kernels in {fetch()}")
        build("stand_in_driver.cc", soname=DRIVER), build("emulator.cc")
    except ToolchainError as error:
        sys.exit(str(error))
