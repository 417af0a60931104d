"""Training: mesh and sharding rules, state, step, EMA, checkpoints, logs, loop."""
