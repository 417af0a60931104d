"""Settings that the ImageNet classifiers share: the recipe of the release, which is Swin's with an average of 0.9999.

Not an experiment itself. AdamW, 20 of 300 epochs of warm-up, RandAugment, Mixup, CutMix and erasing at 224 pixels, from
the release's configs (NVlabs/GSPN a97a4c0).
"""

from gspn_jax.classify.config import ClassifierConfig, ClassifyConfig, Preset, ValidationConfig
from gspn_jax.config import DataConfig, OptimizerConfig, TrainConfig

IMAGES = 1_281_167
FOR_A_BATCH_OF = 512
"""Images that the learning rates of the recipe are for; they grow in proportion."""


def recipe(name: str, preset: Preset, *, batch_size: int, learning_rate: float) -> ClassifyConfig:
    """300 epochs of whole batches; `learning_rate` is that for a batch of 512, `name` that of the run directory."""
    epoch, scale = IMAGES // batch_size, batch_size / FOR_A_BATCH_OF
    return ClassifyConfig(
        run_dir=f"runs/{name}",
        model=ClassifierConfig(preset=preset, remat="names"),
        data=DataConfig(source="records", path="data/imagenet/train", image_size=224, channels=3, num_classes=1000),
        optimizer=OptimizerConfig(
            learning_rate=scale * learning_rate,
            final_learning_rate=scale * learning_rate / 100,
            warmup_steps=20 * epoch,
            warmup_start=scale * 5e-7,
            weight_decay=0.05,
            clip_norm=5.0,
        ),
        train=TrainConfig(
            steps=300 * epoch, batch_size=batch_size, ema_decays=(0.9999,), save_every=epoch, keep_every=50 * epoch
        ),
        eval=ValidationConfig(every=epoch, path="data/imagenet/val", batch_size=1024),
    )
