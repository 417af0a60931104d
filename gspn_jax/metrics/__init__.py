"""Metrics of samples: Frechet distance; the digits demo's classifier."""
