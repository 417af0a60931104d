"""The configuration of a run: frozen dataclasses, validated when built.

`RunConfig` is what every run has, `Config` that of a diffusion model; another task has another class. A config file
under `configs/` builds one; the command line overrides any field of it by its dotted name.
Every error is a `ConfigError` whose message is one sentence naming the field, what was expected and what was found.
"""

from gspn_jax.config.checks import (
    ConfigError,
    check_numbers,
    require,
    require_fraction,
    require_one_of,
    require_positive,
    require_width,
    whole_number,
)
from gspn_jax.config.data import DataConfig, SourceName
from gspn_jax.config.diffusion import DiffusionConfig, DiffusionForm, ObjectiveName, SamplerConfig, SamplerName
from gspn_jax.config.evaluation import EvalConfig, MetricName
from gspn_jax.config.model import Backend, Layout, MixerName, MlpName, ModelConfig, NormName, Remat
from gspn_jax.config.run import Config, RunConfig
from gspn_jax.config.saved import C, from_dict, task_of, to_dict
from gspn_jax.config.teaching import AlignConfig, DistillConfig
from gspn_jax.config.training import (
    CHANGEABLE,
    GuardConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    Precision,
    ProfileConfig,
    TrainConfig,
)

__all__ = [
    "CHANGEABLE",
    "AlignConfig",
    "Backend",
    "C",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "DiffusionForm",
    "DistillConfig",
    "EvalConfig",
    "GuardConfig",
    "Layout",
    "LogConfig",
    "MeshConfig",
    "MetricName",
    "MixerName",
    "MlpName",
    "ModelConfig",
    "NormName",
    "ObjectiveName",
    "OptimizerConfig",
    "Precision",
    "ProfileConfig",
    "Remat",
    "RunConfig",
    "SamplerConfig",
    "SamplerName",
    "SourceName",
    "TrainConfig",
    "check_numbers",
    "from_dict",
    "require",
    "require_fraction",
    "require_one_of",
    "require_positive",
    "require_width",
    "task_of",
    "to_dict",
    "whole_number",
]
