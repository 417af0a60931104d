"""Named denoisers as data, and their merging with the overrides of a config into one complete `Architecture`."""

import dataclasses

from gspn_jax.config import ConfigError, Layout, MlpName, ModelConfig, NormName, Remat
from gspn_jax.models.mixers import MixerOptions
from gspn_jax.tables import MIXERS


@dataclasses.dataclass(frozen=True)
class Preset:
    """Architecture that a name such as "GSPN-XL/2" stands for. `heads` is None where no attention is foreseen."""

    layout: Layout
    mixer: str
    hidden: int
    depth: int
    patch: int
    heads: int | None = None
    mlp: MlpName = "gelu"
    norm: NormName = "layer"
    qk_norm: bool = False
    rope: bool = False
    bottleneck: int = 0


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

# LightningDiT, arXiv 2501.01423 (as its released XL/1 is set: no norm of queries and keys), and JiT, arXiv 2511.13720
# (hidden, depth, heads, bottleneck), whose 32 tokens of the class in the later blocks we leave out.
_JIT = {"B": (768, 12, 12, 128), "L": (1024, 24, 16, 128), "H": (1280, 32, 16, 256)}

PRESETS |= {
    f"LightningDiT-{size}/{patch}": Preset(
        "dit", "attention", *_DIT[size][:2], patch, _DIT[size][2], mlp="swiglu", norm="rms", rope=True
    )
    for size in ("B", "L", "XL")
    for patch in (1, 2)
} | {
    f"JiT-{size}/{patch}": Preset(
        "dit", "attention", hidden, depth, patch, heads,
        mlp="swiglu", norm="rms", qk_norm=True, rope=True, bottleneck=bottleneck,
    )
    for size, (hidden, depth, heads, bottleneck) in _JIT.items()
    for patch in (16, 32)
}  # fmt: skip

LOCAL_CHUNK = 2
GLOBAL_BLOCKS = 2
"""The paper layout scans locally, every 2 lines, except in its last two blocks."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A denoiser with every choice made.

    `options` are those of the mixer, which is named `mixer`. `chunks` has one entry a block in the order of execution:
    the local scan length, or None for a global scan. `learn_sigma` None leaves the choice to the training objective.
    """

    layout: Layout
    mixer: str
    options: MixerOptions
    hidden: int
    depth: int
    patch: int
    chunks: tuple[int | None, ...]
    drop_path: float
    learn_sigma: bool | None
    remat: Remat
    unroll: bool | None
    mlp: MlpName
    norm: NormName
    positions: bool
    """Sine-cosine positions are added to the tokens."""
    bottleneck: int
    """Width through which patches are embedded, 0 for one linear."""

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
    asked = model
    preset = dataclasses.asdict(PRESETS[model.preset])
    chosen = {name: value for name, value in preset.items() if getattr(model, name) is None}
    model = dataclasses.replace(model, **chosen)
    layout, mixer, hidden, depth = model.layout, MIXERS[model.mixer], model.hidden, model.depth
    if layout == "paper":
        free = [name for name, kind in MIXERS.items() if not kind.needs_positions]
        _check(model.mixer in free, "model.mixer", f"{_one_of(free)} with model.layout='paper'", model.mixer)
        _check(depth % 2 == 0, "model.depth", "even with model.layout='paper'", depth)
        _check(model.mlp == "gelu", "model.mlp", "None with model.layout='paper', which has no MLP", model.mlp)
        _check(model.norm == "layer", "model.norm", "'layer' or None with model.layout='paper'", model.norm)
    if model.mixer != "attention":
        for name in ("qk_norm", "rope"):
            found = getattr(asked, name)
            _check(not found, f"model.{name}", f"None or False with model.mixer={model.mixer!r}", found)
    positions = mixer.needs_positions if model.positions is None else model.positions
    expected = f"True or None with model.mixer={model.mixer!r}, which does not know positions otherwise"
    _check(positions or not mixer.needs_positions, "model.positions", expected, model.positions)
    if positions:
        _check(layout == "dit", "model.positions", "None or False with model.layout='paper'", model.positions)
        _check(hidden % 4 == 0, "model.hidden", "a multiple of 4 for the sine-cosine positions", hidden)
    if not mixer.has_chunks:
        expected = f"'preset' with model.mixer={model.mixer!r}"
        _check(model.chunk in ("preset", None), "model.chunk", expected, model.chunk)
    return Architecture(
        layout=layout, mixer=model.mixer, options=mixer.of(model), hidden=hidden, depth=depth, patch=model.patch,
        chunks=_chunks(model.chunk, layout, _blocks(layout, depth)), drop_path=model.drop_path,
        learn_sigma=model.learn_sigma, remat=model.remat, unroll=model.unroll, mlp=model.mlp, norm=model.norm,
        positions=positions, bottleneck=model.bottleneck,
    )  # fmt: skip


def _one_of(names: list[str]) -> str:
    return " or ".join(map(repr, names))


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
