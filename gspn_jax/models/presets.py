"""Named denoisers as data, and their merging with the overrides of a config into one complete `Architecture`."""

import dataclasses

from gspn_jax.config import ConfigError, Layout, Mixer, ModelConfig, Remat
from gspn_jax.kernels import available_backends


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a name such as "GSPN-XL/2" stands for. `heads` is None where no attention is foreseen."""

    layout: Layout
    mixer: Mixer
    hidden: int
    depth: int
    patch: int
    heads: int | None = None


# (hidden, depth) of arXiv 2501.12381 and (hidden, depth, heads) of DiT, arXiv 2212.09748, table 1.
_GSPN = {"S": (368, 24), "B": (900, 30), "L": (1200, 56), "XL": (1500, 56)}
_DIT = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

PRESETS: dict[str, Preset] = {
    f"GSPN-{size}/{patch}": Preset("paper", "gspn", hidden, depth, patch)
    for size, (hidden, depth) in _GSPN.items()
    for patch in (2, 4)
} | {
    f"DiT-{size}/{patch}": Preset("dit", "attention", hidden, depth, patch, heads)
    for size, (hidden, depth, heads) in _DIT.items()
    for patch in (2, 4, 8)
}

LOCAL_CHUNK = 2
GLOBAL_BLOCKS = 2
"""The paper layout scans locally, every 2 lines, except in its last two blocks."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A denoiser with every choice made.

    `chunks` has one entry a block in the order of execution: the local scan length, or None for a global scan.
    `groups` is the number of sets of propagation weights and `proxy` the width of the bottleneck they come from.
    `learn_sigma` None leaves the choice to the training objective.
    """

    layout: Layout
    mixer: Mixer
    hidden: int
    depth: int
    patch: int
    heads: int | None
    chunks: tuple[int | None, ...]
    groups: int
    proxy: int
    skip: bool
    drop_path: float
    learn_sigma: bool | None
    remat: Remat
    backend: str | None

    @property
    def blocks(self) -> int:
        """Residual blocks: `depth`, and in the paper layout one more in the middle."""
        return _blocks(self.layout, self.depth)


def resolve(model: ModelConfig) -> Architecture:
    """Merges the preset named by `model` with its overrides.

    Raises ConfigError for an unknown preset and for settings that do not fit together.
    """
    if model.preset not in PRESETS:
        raise ConfigError(f"model.preset must be one of {', '.join(PRESETS)}, found {model.preset!r}")
    preset = PRESETS[model.preset]

    def choose(name: str):
        override = getattr(model, name)
        return getattr(preset, name) if override is None else override

    layout, mixer, hidden, depth, heads = (choose(name) for name in ("layout", "mixer", "hidden", "depth", "heads"))
    _check(mixer == "gspn" or layout == "dit", "model.mixer", "'gspn' with model.layout='paper'", mixer)
    _check(layout == "dit" or depth % 2 == 0, "model.depth", "even with model.layout='paper'", depth)
    if mixer == "attention":
        _check(heads is not None and hidden % heads == 0, "model.heads", f"a divisor of model.hidden ({hidden})", heads)
        _check(hidden % 4 == 0, "model.hidden", "a multiple of 4 for the sine-cosine positions", hidden)
        _check(model.chunk in ("preset", None), "model.chunk", "'preset' with model.mixer='attention'", model.chunk)
        _check(model.groups is None, "model.groups", "None with model.mixer='attention'", model.groups)
    backends = available_backends()
    _check(
        model.backend in (None, *backends),
        "model.backend",
        f"None or one of {', '.join(map(repr, backends))} here",
        model.backend,
    )
    groups = hidden if model.groups is None else model.groups
    _check(hidden % groups == 0, "model.groups", f"a divisor of model.hidden ({hidden})", groups)
    _check(model.proxy_ratio <= hidden, "model.proxy_ratio", f"at most model.hidden ({hidden})", model.proxy_ratio)
    return Architecture(
        layout=layout, mixer=mixer, hidden=hidden, depth=depth, patch=choose("patch"), heads=heads,
        chunks=_chunks(model.chunk, layout, _blocks(layout, depth)), groups=groups, proxy=hidden // model.proxy_ratio,
        skip=model.skip, drop_path=model.drop_path, learn_sigma=model.learn_sigma, remat=model.remat,
        backend=model.backend,
    )  # fmt: skip


def _blocks(layout: Layout, depth: int) -> int:
    return depth + 1 if layout == "paper" else depth


def _chunks(chunk: int | str | tuple[int | None, ...] | None, layout: Layout, blocks: int) -> tuple[int | None, ...]:
    if chunk == "preset":
        local = max(blocks - GLOBAL_BLOCKS, 0) if layout == "paper" else 0
        return (LOCAL_CHUNK,) * local + (None,) * (blocks - local)
    pattern = tuple(chunk) if isinstance(chunk, tuple | list) else (chunk,) * blocks
    _check(len(pattern) == blocks, "model.chunk", f"'preset', None, an int, or {blocks} entries, one a block", chunk)
    _check(
        all(lines is None or lines > 0 for lines in pattern),
        "model.chunk",
        "None (global) or 1 or more lines in every block",
        chunk,
    )
    return pattern


def _check(condition: bool, field: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{field} must be {expected}, found {found!r}")
