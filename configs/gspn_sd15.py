"""Stable Diffusion 1.5 with GSPN in place of its self-attentions, distilled from itself at 512 pixels.

python -m gspn_jax.prepare captions --model SD15 --images IMAGES --output CAPTIONS              (once)
python -m gspn_jax.text_to_image distill --config configs/gspn_sd15.py --model.folder SD15 --data.path CAPTIONS
python -m gspn_jax.text_to_image export --run runs/gspn_sd15 --output gspn_sd15.safetensors
python -m gspn_jax.text_to_image --model SD15 --mixer gspn --gspn-layers gspn_sd15.safetensors --prompt ... \
    --output dog.png

The recipe of the released code (NVlabs/GSPN a97a4c0): 169,000 images of LAION aesthetics 6.5+ with BLIP captions,
batches of 96, AdamW at a constant 1e-4 without decay, the checkpoint of step 510,000 (by arithmetic 12 hours of 32 A100
at 40 %). Not run here. Ours besides: gradients are clipped at a norm of 1, images are cropped as ADM does, and the
layers have no skip term.
"""

from gspn_jax.config import OptimizerConfig, TrainConfig
from gspn_jax.text_to_image.config import CaptionsConfig, LayersConfig, StudentConfig
from gspn_jax.text_to_image.gspn_layers import LayerOptions

config = LayersConfig(
    run_dir="runs/gspn_sd15",
    model=StudentConfig(folder="models/stable-diffusion-v1-5", gspn=LayerOptions(form="pure", proxy_ratio=8)),
    data=CaptionsConfig(path="data/captions_sd15"),
    optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-4),
    train=TrainConfig(steps=510_000, batch_size=96, ema_decays=(0.0,), save_every=5000, keep_every=50_000),
)
