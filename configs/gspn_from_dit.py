"""A GSPN that learns from a trained DiT, on scikit-learn's digits: the DiT's blocks with line scans for attention.

python train_dit.py --config configs/digits.py --model.preset DiT-S/2 --model.heads 4 --run-dir runs/dit_digits
python train_dit.py --config configs/gspn_from_dit.py --distill.teacher runs/dit_digits

The student begins with all weights of the teacher but those of the mixers, and learns from its predictions and from its
tokens after every block, in a fifth of its steps. For another teacher, model and data are its own with --model.mixer
gspn (docs/recipes.md). Not yet run in full.
"""

from gspn_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)

config = Config(
    run_dir="runs/gspn_from_dit",
    model=ModelConfig(preset="DiT-S/2", mixer="gspn", hidden=96, depth=6, drop_path=0.0),
    data=DataConfig(source="digits", image_size=8, channels=1, num_classes=10),
    diffusion=DiffusionConfig(objective="flow"),
    sampler=SamplerConfig(steps=10, guidance_scale=1.25),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=10),
    train=TrainConfig(
        steps=160,
        batch_size=64,
        precision="params=float32,compute=float32",
        ema_decays=(0.95,),
        log_every=10,
        sample_every=80,
        save_every=80,
    ),
    distill=DistillConfig(features=(0, 1, 2, 3, 4, 5)),
)
