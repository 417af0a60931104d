"""GSPN in the place of the self-attentions of `configs/unet_cifar10.py`'s U-Net, distilled from it; for two CPU cores.

python benchmarks/text_to_image_cifar10.py --images CIFAR/train --held-out CIFAR/test --work WORK        all of it, or
python -m gspn_jax.text_to_image distill --config configs/gspn_unet_cifar10.py --model.folder WORK/teacher \
    --data.path WORK/captions
python -m gspn_jax.text_to_image export --run runs/gspn_unet_cifar10 --output layers.safetensors
"""

from gspn_jax.config import OptimizerConfig, TrainConfig
from gspn_jax.text_to_image.config import CaptionsConfig, LayersConfig, StudentConfig
from gspn_jax.text_to_image.gspn_layers import LayerOptions

config = LayersConfig(
    run_dir="runs/gspn_unet_cifar10",
    model=StudentConfig(folder="models/cifar10_teacher", gspn=LayerOptions(form="pure", proxy_ratio=4, chunks=(0,))),
    data=CaptionsConfig(path="data/captions_cifar10"),
    optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=2e-5, warmup_steps=50),
    train=TrainConfig(
        steps=800,
        batch_size=32,
        precision="params=float32,compute=float32",
        ema_decays=(0.995,),
        log_every=10,
        save_every=200,
    ),
)
