"""Training: state, step, a loop of hooks, guard, logs."""
