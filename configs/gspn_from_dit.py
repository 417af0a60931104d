"""A GSPN that learns from a trained DiT, on scikit-learn's digits: the DiT's blocks with line scans for attention.

python train_dit.py --config configs/digits.py --model.preset DiT-S/2 --model.heads 4 --run-dir runs/dit_digits
python train_dit.py --config configs/gspn_from_dit.py --distill.teacher runs/dit_digits

The student begins with all weights of the teacher but those of the mixers, on tokens with the teacher's positions, and
learns from its predictions and from its tokens after every block, in a fifth of its steps. For another teacher, model
and data are its own with --model.mixer gspn --model.positions True (docs/recipes.md). Not yet run in full.
"""

import dataclasses

from gspn_jax.config import DistillConfig
from gspn_jax.configs.digits import config as digits

config = dataclasses.replace(
    digits,
    run_dir="runs/gspn_from_dit",
    model=dataclasses.replace(digits.model, preset="DiT-S/2", mixer="gspn", positions=True),
    optimizer=dataclasses.replace(digits.optimizer, warmup_steps=10),
    train=dataclasses.replace(digits.train, steps=160, ema_decays=(0.95,), sample_every=80, save_every=80),
    distill=DistillConfig(features=(0, 1, 2, 3, 4, 5)),
)
