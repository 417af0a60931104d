"""Training: state, step, a loop of hooks, guard, logs."""

from gspn_jax import extras

extras.require("train", "optax", "PIL", "tqdm", by=__name__)
