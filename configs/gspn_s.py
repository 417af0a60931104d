"""GSPN-S on ImageNet at 224 pixels, by the recipe of the release: 300 epochs of batches of 2,048.

python -m gspn_jax.prepare images --images IMAGENET/train --output RECORDS/train       (and val)
python -m gspn_jax.classify train --config configs/gspn_s.py --data.path RECORDS/train --eval.path RECORDS/val

50,037,218 parameters (published 50M), 11.6 GMAC (published 9.0, which does not follow from the released config),
published top-1 83.8 %. Not yet run.
Arithmetic: 26.9 EFLOP, 2.7 hours on 8 H100 at an assumed 35 % of 989 TFLOP/s (docs/classification.md).
"""

from gspn_jax.configs._classify import recipe

config = recipe("gspn_s", "GSPN-S", batch_size=2048, learning_rate=3e-4)
