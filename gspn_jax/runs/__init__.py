"""A run directory: its config, checkpoints with manifests, averages, record of evaluations; read without training."""
