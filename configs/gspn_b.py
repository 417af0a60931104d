"""GSPN-B on ImageNet at 224 pixels, by the recipe of the release: 300 epochs of batches of 1,024.

python -m gspn_jax.prepare images --images IMAGENET/train --output RECORDS/train       (and val)
python -m gspn_jax.classify train --config configs/gspn_b.py --data.path RECORDS/train --eval.path RECORDS/val

92,462,068 parameters (published 89M, which does not follow from the released config), 15.5 GMAC (published 15.9),
published top-1 84.3 %. Not yet run.
Arithmetic: 36.1 EFLOP, 3.6 hours on 8 H100 at an assumed 35 % of 989 TFLOP/s (docs/classification.md).
"""

from gspn_jax.configs._classify import recipe

config = recipe("gspn_b", "GSPN-B", batch_size=1024, learning_rate=5e-4)
