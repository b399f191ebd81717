"""The whole key tree, typed and frozen. Each key has one default: here, or in base.yaml for the tuned numbers."""

from __future__ import annotations

from skyrl_train.config.fields import Group
from skyrl_train.config.schema_data import Data, Environment
from skyrl_train.config.schema_generator import Generator
from skyrl_train.config.schema_trainer import Trainer


class Config(Group):
    """Everything that a run needs to know."""

    trainer: Trainer
    generator: Generator
    data: Data
    environment: Environment
