"""Imports point one way, by package, as CONTRIBUTING.md's map says, and no modules import one another in a circle."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

from tests.source_files import ROOT, package, sources

LEAVES = ("diffusion", "data", "metrics", "autoencoder", "text", "unet")
COMMANDS = ("prepare", "evaluate", "convert", "classify", "text_to_image", "doctor", "plan", "demo", "train", "sample")

MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "foundation": set(),
    "cli": {"foundation"},
    "configs": {"foundation", "classify", "text_to_image"},
}
MAY_IMPORT |= {leaf: {"foundation"} for leaf in LEAVES}
MAY_IMPORT["models"] = {"foundation", "kernels"}
MAY_IMPORT["parallel"] = MAY_IMPORT["models"] | {"models"}
MAY_IMPORT["runs"] = MAY_IMPORT["parallel"] | {"parallel"}
MAY_IMPORT["sampling"] = MAY_IMPORT["runs"] | {"runs", *LEAVES}
MAY_IMPORT["training"] = MAY_IMPORT["sampling"] | {"sampling"}
MAY_IMPORT |= {command: {*MAY_IMPORT["training"], "training", "cli", *COMMANDS} for command in (*COMMANDS, "scripts")}
"""What each package may import beside itself, in any line, also one within a function."""


def imported(path: pathlib.Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of the project) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports are not followed"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:  # the name of a module, or of something in one
            module = name if name in known else name.rpartition(".")[0]
            if module in known:
                yield node.lineno, module


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[tuple[int, str]]]:
    found = sources()
    return {name: set(imported(path, found.keys())) for name, path in found.items()}


def test_every_package_has_its_place(arrows):
    assert {package(name) for name in arrows} <= set(MAY_IMPORT)
    places = {"gspn_jax.training.loop": "training", "sample": "scripts", "gspn_jax.config": "foundation"}
    places |= {"gspn_jax.kernels.api": "kernels", "gspn_jax.configs.digits": "configs"}
    assert places.items() <= {name: package(name) for name in arrows}.items()


def test_no_import_points_up(arrows):
    wrong = [
        f"{name}:{line} imports {other}: {package(name)} may import "
        f"{', '.join(sorted(MAY_IMPORT[package(name)])) or 'nothing of the project'}"
        for name, others in arrows.items()
        for line, other in sorted(others)
        if package(other) != package(name) and package(other) not in MAY_IMPORT[package(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another_in_a_circle(arrows):
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle of imports: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for _, other in sorted(arrows[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_no_test_module_imports_another():
    """Shared things stand in modules of their own, so that a test file can be run, moved or deleted alone."""
    files = (ROOT / "tests").rglob("*.py")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    tests = {name for name in modules if name.rpartition(".")[2].startswith("test_")}
    found = [f"{name}:{line} imports {other}" for name in modules for line, other in imported(modules[name], tests)]
    scripts = [
        f"{name} runs {other}"
        for name, path in modules.items()
        for other in tests - {name}
        if f"from {other} " in path.read_text()
    ]
    assert not found + scripts, "\n".join(found + scripts)
