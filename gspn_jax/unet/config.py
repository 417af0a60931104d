"""Sizes of a U-Net of Stable Diffusion, read from the `config.json` of diffusers' `UNet2DConditionModel`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gspn_jax.config import ConfigError

_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
"""Options of diffusers' that Stable Diffusion leaves at one value, which is all that is built here."""

_READ = (
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "in_channels",
    "out_channels",
    "norm_num_groups",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
_WITHOUT_EFFECT = ("sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads")
"""The size trained at, of training alone, softmax in float32 (always so here), and of another embedding."""

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
"""Kinds of level, and whether they have transformers."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The defaults are those of Stable Diffusion 1: 859,520,964 parameters. Tuples have an entry for each level."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Between levels the map is halved."""
    layers: int = 2
    """Residual blocks of each level on the way down; there is one more on the way up."""
    depths: tuple[int, ...] = (1, 1, 1, 0)
    """Transformer blocks after each residual block of a level."""
    middle_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    """Width of the text states."""
    linear_projection: bool = False
    """Around transformers linears, not 1x1 convolutions; the function is the same, the shapes in a file are not."""
    in_channels: int = 4
    out_channels: int = 4
    groups: int = 32
    """Number of groups of every group normalisation."""
    added_width: int | None = None
    """Width of the pooled text and the sizes (SDXL), which are embedded and added to the time; None: not used."""
    added_size_width: int = 256
    """Numbers for each of the six sizes, within `added_width`."""

    def __post_init__(self):
        levels = len(self.channels)
        if not levels or len(self.depths) != levels or len(self.heads) != levels:
            raise ConfigError(
                f"the U-Net's channels, depths and heads must have an entry for each level, found "
                f"{self.channels}, {self.depths} and {self.heads}"
            )
        for width, heads in zip(self.channels, self.heads, strict=True):
            for name, parts in (("groups", self.groups), ("heads", heads)):
                if width % parts:
                    raise ConfigError(
                        f"the U-Net's channels must be multiples of its {name}, found {width} and {parts}"
                    )
        if self.added_width is not None and self.pooled_width <= 0:
            raise ConfigError(
                f"the U-Net's projection_class_embeddings_input_dim must be greater than the "
                f"{6 * self.added_size_width} numbers of the sizes, found {self.added_width}"
            )

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text state; 0 where it is not used."""
        return 0 if self.added_width is None else self.added_width - 6 * self.added_size_width

    @property
    def time_width(self) -> int:
        """Width of the embedded time."""
        return 4 * self.channels[0]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "UNetConfig":
        """Reads a `config.json`. Raises ConfigError for an option of diffusers that Stable Diffusion does not use."""
        _refuse_other_options(content)
        channels = _levels(content, "block_out_channels")
        count = len(channels)
        blocks = _levels(content, "transformer_layers_per_block", count, 1)
        return cls(
            channels=channels,
            layers=_same(content, "layers_per_block", count, 2),
            heads=_levels(content, "attention_head_dim", count, 8),
            depths=tuple(depth if has else 0 for depth, has in zip(blocks, _with_transformers(content), strict=True)),
            middle_depth=blocks[-1],
            context_width=_same(content, "cross_attention_dim", count),
            linear_projection=bool(content.get("use_linear_projection", False)),
            in_channels=content.get("in_channels", 4),
            out_channels=content.get("out_channels", 4),
            groups=content.get("norm_num_groups", 32),
            **_added(content),
        )


STABLE_DIFFUSION_1 = UNetConfig()
STABLE_DIFFUSION_2 = UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True)
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    middle_depth=10,
    heads=(5, 10, 20),
    context_width=2048,
    linear_projection=True,
    added_width=2816,
)


def _refuse_other_options(content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if name in _FIXED:
            if value != _FIXED[name]:
                raise ConfigError(f"the U-Net's {name} must be {_FIXED[name]!r}, found {value!r}")
        elif value and name not in (*_READ, *_WITHOUT_EFFECT) and not name.startswith("_"):
            raise ConfigError(f"the U-Net's {name} must be left out, as in Stable Diffusion, found {value!r}")


def _added(content: Mapping[str, Any]) -> dict[str, int]:
    kind = content.get("addition_embed_type")
    if kind is None:
        return {}
    if kind != "text_time":
        raise ConfigError(f"the U-Net's addition_embed_type must be None or 'text_time', found {kind!r}")
    names = {"added_width": "projection_class_embeddings_input_dim", "added_size_width": "addition_time_embed_dim"}
    for name in names.values():
        if not isinstance(content.get(name), int):
            raise ConfigError(f"the U-Net's {name} must be an integer, found {content.get(name)!r}")
    return {ours: content[theirs] for ours, theirs in names.items()}


def _levels(content: Mapping[str, Any], name: str, count: int | None = None, default: Any = None) -> tuple:
    """A field with an entry for each level; a single number holds for all."""
    value = content.get(name, default)
    if count is not None and isinstance(value, int):
        value = (value,) * count
    kind = str if name.endswith("_types") else int
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(entry, kind) for entry in value):
        raise ConfigError(f"the U-Net's {name} must be a list with an entry for each level, found {value!r}")
    if count is not None and len(value) != count:
        raise ConfigError(f"the U-Net's {name} must have {count} entries as block_out_channels, found {value!r}")
    return tuple(value)


def _same(content: Mapping[str, Any], name: str, count: int, default: int | None = None) -> int:
    values = _levels(content, name, count, default)
    if len(set(values)) != 1:
        raise ConfigError(f"the U-Net's {name} must be the same at every level, found {values}")
    return values[0]


def _with_transformers(content: Mapping[str, Any]) -> list[bool]:
    """Of each level, whether it has transformers; the same on the way down and up."""
    found = []
    for name, kinds in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        names = _levels(content, name)
        if unknown := [kind for kind in names if kind not in kinds]:
            raise ConfigError(f"the U-Net's {name} must be of {', '.join(kinds)}, found {unknown[0]!r}")
        found.append([kinds[kind] for kind in names])
    if found[0] != found[1][::-1] or len(found[0]) != len(content["block_out_channels"]):
        raise ConfigError(
            "the U-Net's down_block_types and up_block_types must mirror each other, one for each level, "
            f"found {content['down_block_types']} and {content['up_block_types']}"
        )
    return found[0]
