"""Samples a checkpoint: python sample.py --run runs/digits [--classes 0 1 2 ...]; see `gspn_jax.sample`."""

from gspn_jax.sample import main

if __name__ == "__main__":
    main(program="sample.py")
