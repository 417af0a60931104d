"""The source files of all that is shipped, and what part of the house each belongs to."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]

FOUNDATION = (
    *(
        "bicubic",
        "config",
        "control_groups",
        "extras",
        "files",
        "machine",
        "pixels",
        "small_files",
        "state_dict",
        "tables",
    ),
    "tensor_files",
)
"""Modules that everything may import, and that import nothing of the project but one another."""


def sources() -> dict[str, pathlib.Path]:
    """{dotted module name: file} of all that is shipped."""
    found = {}
    for top, package in {"gspn_jax": ROOT, "kernels": ROOT / "gspn_jax", "configs": ROOT / "gspn_jax"}.items():
        for path in (ROOT / top).rglob("*.py"):  # which follows no links: gspn_jax/kernels is one, to kernels
            found[package / path.relative_to(ROOT)] = path
    names = {name.relative_to(ROOT).with_suffix("").parts: path for name, path in found.items()}
    names |= {(name,): ROOT / f"{name}.py" for name in ("train_dit", "sample")}
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in names.items()}


def package(module: str) -> str:
    """What a module belongs to: a package of gspn_jax, "foundation" or "scripts"."""
    top, *rest = module.split(".")
    if top == "gspn_jax":
        return "foundation" if not rest or rest[0] in FOUNDATION else rest[0]
    return "scripts"
