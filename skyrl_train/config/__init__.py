"""Configuration: Hydra composes, a typed and frozen schema validates, `--explain` shows what came from where."""

from skyrl_train.config.load import LoadedConfig, load_config
from skyrl_train.config.schema import Config
from skyrl_train.errors import ConfigError

__all__ = ["Config", "ConfigError", "LoadedConfig", "load_config"]
