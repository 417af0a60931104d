r"""GSPN-L/2 (445M parameters) on ImageNet 256 in latents, by the recipe of the GSPN paper (arXiv 2501.12381).

python -m gspn_jax.prepare latents --images IMAGENET/train --vae VAE.safetensors --output LATENTS     (once; 42 GB)
python train_dit.py --config configs/gspn_l_2.py --data.path LATENTS     (a node of 8 GPUs)
srun --nodes=8 --ntasks-per-node=1 python train_dit.py --config configs/gspn_l_2.py --data.path LATENTS \
    --train.batch-size 1024 --optimizer.warmup-steps 6256     (64 GPUs, the batch of the GSPN paper)

400,000 steps of 256 images (80 epochs); warm-up over 5 epochs, 25,025 steps, then half a cosine.
Each GPU holds the whole state (7.1 GB in float32 with Adam and EMA) and 32 images of each step; the backward pass
computes norms, 3x3 convolutions and activations again (remat) and finds the rest in about 9 GB, by the compiler's
plan. More than 128 images a GPU of 80 GB need --model.remat full.
Hardware, time and result: not yet run. Expected at 400,000 steps, without guidance, from the paper (global
batch 1024 on 64 A100): FID-50K 17.25, IS 77.37.
"""

from gspn_jax.config import ModelConfig
from gspn_jax.configs._imagenet import GSPN_OPTIMIZER, recipe

model = ModelConfig(preset="GSPN-L/2", drop_path=0.1, remat="names")
config = recipe("gspn_l_2", model, GSPN_OPTIMIZER)
