"""Trains a denoiser: python train_dit.py --config configs/digits.py [--train.steps 2000 ...]; see `gspn_jax.train`."""

from gspn_jax.train import main

if __name__ == "__main__":
    main(program="train_dit.py")
