"""Settings that the ImageNet recipes share: latents of the Stable Diffusion VAE, DiT's diffusion, batch and length.

Not an experiment itself. The recipes are those of DiT (arXiv 2212.09748, section 4) and GSPN (arXiv 2501.12381).
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

DIT_OPTIMIZER = OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-4)
"""A constant learning rate, no warm-up."""
GSPN_OPTIMIZER = OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-6, warmup_steps=25_025)
"""Warm-up over 5 epochs of 256 images a step, then half a cosine."""


def recipe(name: str, model: ModelConfig, optimizer: OptimizerConfig, *, pixels: int = 256) -> Config:
    """400,000 steps of 256 images of `pixels` (256 or 512) to a side; `name` is that of the run directory."""
    return Config(
        run_dir=f"runs/{name}",
        model=model,
        data=DataConfig(
            source="latents",
            path=f"data/imagenet{pixels}_latents",
            image_size=pixels // 8,
            channels=4,
            num_classes=1000,
            flip=True,
        ),
        diffusion=DiffusionConfig(objective="ddpm", label_dropout=0.1),
        sampler=SamplerConfig(name="ddpm", steps=250),
        optimizer=optimizer,
        train=TrainConfig(
            steps=400_000,
            batch_size=256,
            precision="params=float32,compute=bfloat16",
            ema_decays=(0.9999,),
            log_every=100,
            sample_every=10_000,
            save_every=5_000,
            keep_every=50_000,
        ),
    )
