"""GSPN image models in JAX: training, sampling, evaluation."""

__version__ = "0.1.0"
