"""A small GSPN classifier on CIFAR-10 pixels: 8x8 and 4x4 tokens, for two CPU cores; beside attention and neither.

python -m gspn_jax.classify train --config configs/classify_cifar10.py --data.path CIFAR/train --eval.path CIFAR/test
python -m gspn_jax.classify compare --config configs/classify_cifar10.py --data.path CIFAR/train --eval.path CIFAR/test

CIFAR is one folder of JPEG or PNG files a class. `compare` trains line scans, attention and neither in turn, of 866,
860 and 863 thousand parameters, and draws accuracy against images seen and the confusion matrices into
runs/classify_cifar10.
"""

from gspn_jax.classify.config import AugmentConfig, ClassifierConfig, ClassifyConfig, ValidationConfig
from gspn_jax.config import DataConfig, OptimizerConfig, TrainConfig

config = ClassifyConfig(
    run_dir="runs/classify_cifar10",
    model=ClassifierConfig(preset="GSPN-mini"),
    data=DataConfig(source="folder", path="data/cifar10/train", image_size=32, channels=3, num_classes=10),
    augment=AugmentConfig(
        crop_area=(0.6, 1.0),
        rand_layers=0,
        erasing=0.0,
        mix_probability=0.0,
        mean=(0.491, 0.482, 0.447),
        deviation=(0.247, 0.244, 0.262),
    ),
    optimizer=OptimizerConfig(
        learning_rate=3e-3, final_learning_rate=3e-5, warmup_steps=100, weight_decay=0.05, clip_norm=5.0
    ),
    train=TrainConfig(
        steps=1560,
        batch_size=128,
        precision="params=float32,compute=float32",
        ema_decays=(0.995,),
        log_every=20,
        save_every=390,
    ),
    eval=ValidationConfig(every=390, path="data/cifar10/test", crop=1.0, batch_size=500),
)
