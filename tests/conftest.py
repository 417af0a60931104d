"""Eight CPU devices and a compilation cache, set before JAX is imported; strict dtype promotion in our arithmetic."""

import gc
import os
import pathlib
import signal

import jaxtyping
import pytest

from tests.quick_compile import QUICK_COMPILE

ROOT = pathlib.Path(__file__).resolve().parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 " + QUICK_COMPILE
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# what is started in the background, or by nohup, ignores these, and so would all that it starts
for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

if os.environ.get("GSPN_CHECK_SHAPES") == "1":
    import tests.shapes  # noqa: F401 - for the next line, and after the environment above, as it imports JAX

    jaxtyping.install_import_hook("gspn_jax", "tests.shapes.checked")

LONG = (
    *("training/test_tensor_cores.py", "training/test_loop.py", "training/test_bare_machine.py"),
    *("training/test_step.py", "training/test_evaluation.py", "training/test_wandb.py", "evaluate/test_evaluate.py"),
    *("seams/test_task.py", "seams/test_seams.py", "classify/test_task.py", "benchmarks/test_train_step.py"),
    *("parallel/test_sharding.py", "sampling/test_sample_latents.py", "prepare/test_prepare.py"),
    *("runs/test_old_runs.py", "data/test_memory.py", "models/test_image_classifier.py"),
)
"""Files of tests that take longest: they come first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items):
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


STRICT = ("kernels", "models", "diffusion", "text", "unet", "text_to_image")
"""Optax mixes integer counts with floats, so what trains is tested under JAX's own rules."""


gc.set_threshold(20_000, 20)  # tracing makes many objects that stay; by default looking at them is a tenth of the time


@pytest.fixture(autouse=True, scope="module")
def objects_of_earlier_files():
    """Objects that earlier files have left are not looked at again by the garbage collector."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def strict_promotion(request):
    import jax  # after the environment above

    with jax.numpy_dtype_promotion("strict" if request.path.parent.name in STRICT else "standard"):
        yield


@pytest.fixture(autouse=True)
def shapes_are_checked(request, monkeypatch):
    """But where a test hands over wrong ones, to see what the function itself says of them."""
    if request.node.get_closest_marker("wrong_shapes"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def kernels_of_this_test():
    """Kernels that a test has changed are its own."""
    from gspn_jax.kernels import compat

    yield
    compat.forget_kernels()
