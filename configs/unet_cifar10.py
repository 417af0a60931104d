"""A U-Net of 3.1M parameters with attention, of the pixels of CIFAR-10 and captions made from its classes; for two CPU
cores.

python benchmarks/text_to_image_cifar10.py --images CIFAR/train --held-out CIFAR/test --work WORK        all of it, or
python -m gspn_jax.text_to_image train --config configs/unet_cifar10.py --model.folder WORK/untrained \
    --data.path WORK/captions
python -m gspn_jax.text_to_image export --run runs/unet_cifar10 --output teacher

The benchmark writes the folder, which has no autoencoder, a text tower of random weights, and the sizes of the U-Net:
widths 16, 32, 64 and 128, attention at 16x16 and 8x8.
"""

from gspn_jax.config import OptimizerConfig, TrainConfig
from gspn_jax.text_to_image.config import CaptionsConfig, NetworkConfig, UNetTrainingConfig

config = UNetTrainingConfig(
    run_dir="runs/unet_cifar10",
    model=NetworkConfig(folder="models/cifar10_untrained", start="fresh"),
    data=CaptionsConfig(path="data/captions_cifar10"),
    optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=2e-5, warmup_steps=200, clip_norm=1.0),
    train=TrainConfig(
        steps=2400,
        batch_size=32,
        precision="params=float32,compute=float32",
        ema_decays=(0.998,),
        log_every=20,
        save_every=300,
    ),
)
