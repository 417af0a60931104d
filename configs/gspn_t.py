"""GSPN-T on ImageNet at 224 pixels, by the recipe of the release: 300 epochs of batches of 2,048.

python -m gspn_jax.prepare images --images IMAGENET/train --output RECORDS/train       (and val)
python -m gspn_jax.classify train --config configs/gspn_t.py --data.path RECORDS/train --eval.path RECORDS/val

31,279,868 parameters (published 30M), 5.2 GMAC (published 5.3),
published top-1 83.0 %. Not yet run.
Arithmetic: 12.0 EFLOP, 1.2 hours on 8 H100 at an assumed 35 % of 989 TFLOP/s (docs/classification.md).
"""

from gspn_jax.configs._classify import recipe

config = recipe("gspn_t", "GSPN-T", batch_size=2048, learning_rate=5e-4)
