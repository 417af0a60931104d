"""Prompts to what the U-Net is told of them, by one text tower or the two of SDXL."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gspn_jax import text
from gspn_jax.text_to_image.folder import TextPart

log = logging.getLogger(__name__)

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


def condition_of(
    parts: Sequence[TextPart], prompts: Sequence[str], what: str = "the prompt"
) -> dict[str, Float[np.ndarray, "B ..."]]:
    """The states of prompts by what they are to the U-Net: "context", and of SDXL "pooled".

    Says of each prompt that is longer than the text towers take what of it they do not see; `what` names it.
    """
    found = encode_prompts(parts, prompts)
    for prompt, cut in dict(zip(prompts, found.cut, strict=True)).items():
        if cut:
            log.warning("%s %r is longer than the 77 tokens that are read, cut off: %r", what, prompt[:40], cut)
    condition = {"context": np.asarray(found.context)}
    if found.pooled is not None:
        condition["pooled"] = np.asarray(found.pooled)
    return condition


def null_condition(
    parts: Sequence[TextPart], negative: str | None, *, zero: bool
) -> dict[str, Float[np.ndarray, "..."]]:
    """The states that guidance leads away from, of one image, without its axis: those of the negative prompt, of an
    empty text where there is none, or then, with `zero`, zeros."""
    found = condition_of(parts, [negative or ""], "--negative")
    unconditional = negative is None and zero
    return {name: np.zeros_like(value[0]) if unconditional else value[0] for name, value in found.items()}
