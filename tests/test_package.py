"""What pip installs: gspn_jax alone, with the operator, the configs and the commands; and what extras are for."""

import ast
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

from gspn_jax import evaluate, extras, sample, train
from gspn_jax.models import mixers
from gspn_jax.state_dict import read_state_dict
from tests.source_files import ROOT, package, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"


def copy_of_checkout(folder: pathlib.Path) -> pathlib.Path:
    """What git knows, links as links: to build in the checkout itself would leave files there."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    archive = folder / "checkout.tar"
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, names):
            if os.path.lexists(ROOT / name):
                tar.add(ROOT / name, name, recursive=False)
    return unpacked(archive, folder / "checkout")


def unpacked(archive: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="tar")
    return folder


def build(kind: str, source: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Builds a "wheel" or an "sdist" of the folder `source`."""
    output.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, kind, str(output)], cwd=source, check=True, capture_output=True)
    return next(output.iterdir())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    return copy_of_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a source distribution of the checkout."""
    folder = tmp_path_factory.mktemp("package")
    archive = build("sdist", checkout, folder / "sdist")
    inside = unpacked(archive, folder / "source") / archive.name.removesuffix(".tar.gz")
    return zipfile.ZipFile(build("wheel", inside, folder / "wheel"))


def test_a_wheel_holds_gspn_jax_alone_and_all_of_it(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"gspn_jax"}
    code = {name for name in files if name.endswith(".py")}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in code}
    assert modules == {name for name in sources() if name.startswith("gspn_jax")}
    assert files - code == {"gspn_jax/py.typed", "gspn_jax/kernels/py.typed"}


def test_what_a_wheel_installs_works_without_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = """
import sys
from importlib.metadata import distribution
import gspn_jax.kernels
assert "flax" not in sys.modules and "optax" not in sys.modules  # the operator needs JAX alone
from gspn_jax import cli
assert cli.load_config("digits").run_dir == "runs/digits"
for command in distribution("gspn-jax").entry_points:
    print(command.name, command.load().__module__, gspn_jax.kernels.__file__)
"""
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    file = tmp_path / "gspn_jax/kernels/__init__.py"
    assert set(shown.splitlines()) == {f"gspn-{name} gspn_jax.{name} {file}" for name in ("train", "sample")}


def test_kernels_in_a_checkout_is_the_operator_of_gspn_jax_not_a_second_one(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(ROOT)
    before = dict(sys.modules)
    import kernels.api
    from kernels.weights import stochastic_weights

    assert kernels.propagate_low_rank is mixers.propagate_low_rank
    assert kernels.api is sys.modules["gspn_jax.kernels.api"]
    assert stochastic_weights is sys.modules["gspn_jax.kernels"].stochastic_weights
    assert {id(module) for module in sys.modules.values()} == {id(module) for module in before.values()}
    for name in sys.modules.keys() - before.keys():
        monkeypatch.delitem(sys.modules, name)


# --- extras
CORE = ("kernels", "models", "diffusion", "parallel", "autoencoder", "unet", "text", "foundation")
"""Packages that import with the core dependencies alone."""


NAMES = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}
"""Distributions whose module has another name."""


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def required(*extras: str) -> set[str]:
    """Distributions that the core and these extras of the project name."""
    named = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {normal(re.match(r"[\w-]+", requirement)[0]) for requirement in itertools.chain(*named)}


def third_party(path: pathlib.Path, *, at_import: bool) -> set[str]:
    """Distributions that a file imports: in any line, or in those that run when it is imported."""
    tree = ast.parse(path.read_text())
    modules = set()
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    return {normal(NAMES.get(module, module)) for module in modules - sys.stdlib_module_names - {"gspn_jax"}}


def test_every_package_that_is_imported_is_a_dependency_or_of_an_extra():
    core, every = required(), required("train", "eval", "text", "parquet", "plot", "torch", "wandb")
    wrong = []
    for name, path in sources().items():
        wrong += [(name, found) for found in third_party(path, at_import=False) - every]
        if package(name) in CORE:
            wrong += [(name, found) for found in third_party(path, at_import=True) - core]
    assert not wrong


def absent(monkeypatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("main", "arguments", "program", "extra"),
    [
        (train.main, ["--config", "digits"], "gspn-train", "train"),
        (sample.main, ["--run", "runs/digits"], "gspn-sample", "train"),
        (evaluate.main, [], "python -m gspn_jax.evaluate", "eval"),
    ],
    ids=["train", "sample", "evaluate"],
)
def test_a_missing_extra_is_one_sentence_that_names_it(main, arguments, program, extra, monkeypatch, capsys):
    absent(monkeypatch, "tyro")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = f"error: {program} needs tyro, which is not installed: pip install 'gspn-jax[{extra}]'\n"
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(said)


def test_what_reads_a_pytorch_file_says_that_it_needs_pytorch(monkeypatch, tmp_path):
    absent(monkeypatch, "torch")
    (tmp_path / "w.bin").touch()
    with pytest.raises(ImportError, match=r"reading w.bin .* needs torch, .* pip install 'gspn-jax\[torch\]'"):
        read_state_dict(tmp_path / "w.bin")


def test_a_stand_in_counts_as_installed_and_a_part_of_what_is_missing_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "stands_in", type(sys)("stands_in"))
    extras.require("train", "stands_in", by="a test")
    with pytest.raises(extras.MissingExtra, match="a test needs no_such, which"):
        extras.require("train", "stands_in", "no_such.part", by="a test")


@pytest.mark.slow
def test_in_an_environment_of_its_own_beside_hugging_face_and_then_with_what_trains(wheel, tmp_path):
    """Downloads some 300 MB."""
    made = pathlib.Path(wheel.filename)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)

    def run(command: str, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [tmp_path / "venv" / "bin" / command, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    install = ("install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"))
    run("pip", *install, str(made), "transformers", "kernels")
    everything = ", ".join(name for name in sources() if package(name) in CORE and name != "gspn_jax.kernels")
    shown = run("python", "-c", f"import kernels, transformers, {everything}; print(kernels.get_kernel)")
    assert "<function get_kernel" in shown
    assert "pip install 'gspn-jax[train]'" in run("gspn-train", "--config", "digits", code=2)

    run("pip", *install, f"{made}[train]")
    few = ("--train.steps", "2", "--optimizer.warmup-steps", "1", "--model.depth", "2", "--model.hidden", "32")
    run("gspn-train", "--config", "digits", *few)
    run("gspn-sample", "--run", "runs/digits", "--per-class", "1", "--sampler.steps", "1")
    assert (tmp_path / "runs/digits/grid_0.png").is_file()
