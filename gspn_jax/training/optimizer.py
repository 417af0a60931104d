"""The optimizer and its schedule, as `OptimizerConfig` says."""

from typing import Any

import optax

from gspn_jax.config import OptimizerConfig, RunConfig
from gspn_jax.training.muon import muon_and_adamw


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from `warmup_start`, then half a cosine down to `final_learning_rate` at `decay_steps`, by default
    `steps`."""
    steps = config.decay_steps or steps
    if config.warmup_steps >= steps:  # nothing is left to decay over
        return optax.linear_schedule(config.warmup_start, config.learning_rate, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        config.warmup_start if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        config.warmup_steps,
        steps,
        config.final_learning_rate,
    )


def jump(before: RunConfig, now: RunConfig, step: int) -> str | None:
    """Sentence on a run that was trained to `step` with the schedule of `before` and goes on with that of `now`;
    None where its learning rate does not change by more than a percent."""
    old, new = (float(learning_rate(one.optimizer, one.train.steps)(step)) for one in (before, now))
    if abs(new - old) <= 0.01 * max(new, old):
        return None
    said = f"the learning rate goes from {old:.3g} to {new:.3g} in one step, after step {step}"
    end = before.optimizer.decay_steps or before.train.steps
    if now.train.steps != before.train.steps and now.optimizer.decay_steps is None:
        said += (
            f", because its decay now ends at step {now.train.steps} and ended at {end}: --optimizer.decay-steps {end} "
            "goes on without this"
        )
    return said


def make_optimizer(
    config: OptimizerConfig, steps: int, decayed: Any = None, shapes: Any = None
) -> optax.GradientTransformation:
    """AdamW, or Muon and AdamW, behind a clip of the gradient's global norm.

    `decayed` says which parameters weight decay is of: a tree of True and False like them, None for all. `shapes` are
    their own shapes, which Muon needs.
    """
    rate = learning_rate(config, steps)
    if config.name == "muon":
        moved = muon_and_adamw(config, rate, shapes, decayed)
    else:
        moved = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), moved)
