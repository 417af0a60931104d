r"""GSPN-XL/2 (692M parameters) on ImageNet 512 in latents, by the recipe for 256 pixels.

python -m gspn_jax.prepare latents --images IMAGENET/train --vae VAE.safetensors --image-size 512 \
    --output LATENTS     (once; 168 GB)
python train_dit.py --config configs/gspn_xl_2_512.py --data.path LATENTS     (a node of 8 GPUs)
srun --nodes=8 --ntasks-per-node=1 python train_dit.py --config configs/gspn_xl_2_512.py --data.path LATENTS \
    --train.batch-size 1024 --optimizer.warmup-steps 6256     (64 GPUs, 16 images each)

Latents of 64x64: 1,024 tokens, four times those of 256 pixels, as are the arithmetic and the activations of an image;
the parameters are the same, as no position is embedded. 400,000 steps of 256 images (80 epochs); warm-up over 5
epochs, 25,025 steps, then half a cosine. Each GPU holds the whole state (11.1 GB in float32 with Adam and EMA) and 32
images of each step; blocks are recomputed in the backward pass (remat).
Hardware, time and result: not yet run. The paper has no class-conditional result at 512 pixels.
"""

from gspn_jax.config import ModelConfig
from gspn_jax.configs._imagenet import GSPN_OPTIMIZER, recipe

model = ModelConfig(preset="GSPN-XL/2", drop_path=0.1, remat="full")
config = recipe("gspn_xl_2_512", model, GSPN_OPTIMIZER, pixels=512)
