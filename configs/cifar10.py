"""GSPN on CIFAR-10 pixels: 32x32 in patches of 2, the same 16x16 tokens as ImageNet-256 latents.

python train_dit.py --config configs/cifar10.py --data.path CIFAR_FOLDER/train     (one folder a class, JPEG or PNG)

Not yet run in full. A trial on 2 CPU cores with --model.patch 4 --model.remat full --train.steps 1000
--train.ema-decays 0.99 0.995 took 31 minutes beside other work and reached a loss of 0.177 after 64,000 images:
blots of plausible colour, no objects (README).
"""

from gspn_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)

config = Config(
    run_dir="runs/cifar10",
    model=ModelConfig(preset="GSPN-S/2", hidden=128, depth=6, drop_path=0.0),
    data=DataConfig(
        source="folder", path="data/cifar10/train", image_size=32, channels=3, num_classes=10, flip=True, in_memory=True
    ),  # 154 MB
    diffusion=DiffusionConfig(objective="flow"),
    sampler=SamplerConfig(steps=20, guidance_scale=1.5),
    optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=100),
    train=TrainConfig(
        steps=6000,
        batch_size=64,
        precision="params=float32,compute=float32",
        ema_decays=(0.999, 0.9995),
        log_every=20,
        sample_every=500,
        save_every=500,
    ),
)
