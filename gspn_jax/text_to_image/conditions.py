"""Prompts to what the U-Net is told of them, by one text tower or the two of SDXL."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gspn_jax import text
from gspn_jax.text_to_image.folder import TextPart

_encode = jax.jit(text.encode, static_argnums=1)


class TextConditions(NamedTuple):
    """Text states of prompts, and what of them was too long."""

    context: Float[Array, "B N D"]
    pooled: Float[Array, "B P"] | None
    """None with a single text tower."""
    cut: tuple[str, ...]
    """End of each prompt that a tower does not see; "" where all of it fits."""


def encode_prompts(
    parts: Sequence[TextPart], prompts: Sequence[str], place: Callable[[Any], Any] = lambda ids: ids
) -> TextConditions:
    """States of prompts: of one tower those after its last norm; of two (SDXL) those before their last layers, side by
    side, and the pooled state of the second. `place` puts token ids where they are encoded."""
    tokens = [part.tokenizer(prompts) for part in parts]
    states = [_encode(part.params, part.config, place(found.ids)) for part, found in zip(parts, tokens, strict=True)]
    cut: tuple[str, ...] = tuple(max(ends, key=len) for ends in zip(*(found.cut for found in tokens), strict=True))
    if len(parts) == 1:
        return TextConditions(states[0].last, None, cut)
    context = jnp.concatenate([state.penultimate for state in states], axis=-1)
    return TextConditions(context, states[-1].pooled, cut)
