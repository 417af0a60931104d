"""AdamW and its schedule, as `OptimizerConfig` says."""

from typing import Any

import optax

from gspn_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then half a cosine down to `final_learning_rate` at `steps`."""
    if config.warmup_steps >= steps:  # nothing is left to decay over
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        config.warmup_steps,
        steps,
        config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int, decayed: Any = None) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm.

    `decayed` says which parameters weight decay is of: a tree of True and False like them, None for all.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
        ),
    )
