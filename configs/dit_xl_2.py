r"""DiT-XL/2 (675M parameters), the baseline with attention, on ImageNet 256 in latents, by DiT's recipe.

python -m gspn_jax.prepare latents --images IMAGENET/train --vae VAE.safetensors --output LATENTS     (once; 42 GB)
python train_dit.py --config configs/dit_xl_2.py --data.path LATENTS     (a node of 8 GPUs)
srun --nodes=8 --ntasks-per-node=1 python train_dit.py --config configs/dit_xl_2.py --data.path LATENTS \
    --train.batch-size 1024     (64 GPUs, the batch of the GSPN paper)

400,000 steps of 256 images (80 epochs), a constant learning rate of 1e-4, no warm-up, no drop path.
Each GPU holds the whole state (10.8 GB in float32 with Adam and EMA) and 32 images of each step; all but the
matrix products is recomputed in the backward pass (remat).
Hardware, time and result: not yet run. Expected at 400,000 steps, without guidance, from the
GSPN paper's own run of it: FID-50K 20.05, IS 64.74.
"""

from gspn_jax.config import ModelConfig
from gspn_jax.configs._imagenet import DIT_OPTIMIZER, recipe

model = ModelConfig(preset="DiT-XL/2", drop_path=0.0, remat="dots")
config = recipe("dit_xl_2", model, DIT_OPTIMIZER)
