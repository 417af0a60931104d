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
from gspn_jax.config.run import Config, RunConfig
from gspn_jax.config.saved import C, from_dict, task_of, to_dict
from gspn_jax.config.sections import (
    CHANGEABLE,
    Backend,
    DataConfig,
    DiffusionConfig,
    DistillConfig,
    EvalConfig,
    GuardConfig,
    Layout,
    LogConfig,
    MeshConfig,
    MetricName,
    MixerName,
    ModelConfig,
    ObjectiveName,
    OptimizerConfig,
    Precision,
    ProfileConfig,
    Remat,
    SamplerConfig,
    SamplerName,
    SourceName,
    TrainConfig,
)

__all__ = [
    "CHANGEABLE",
    "Backend",
    "C",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "DistillConfig",
    "EvalConfig",
    "GuardConfig",
    "Layout",
    "LogConfig",
    "MeshConfig",
    "MetricName",
    "MixerName",
    "ModelConfig",
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
