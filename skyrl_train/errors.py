"""One tree of errors.

    SkyRLError
      ConfigError            the user's mistake; raised before anything expensive starts; exit code 2
      EngineError            the world's failure at an engine
        RequestRejected      this request can never be served as it is; do not retry
        EngineUnavailable    the engine is gone or closed; a retry on another engine is safe
        WeightUpdateError    nothing was served from half-loaded weights; the engine stays paused
          WeightsTorn        the server has neither the old nor the new ones
      EnvironmentFailure     a reward or an environment raised: one trajectory fails
        EnvironmentTimeout   a call of it is over its deadline: one trajectory fails
        EnvironmentsStuck    no worker is left that could run an environment: the run ends
      CheckpointError        a checkpoint is missing, cut short or of another run
      DataError              a data row is malformed: names file and row
      SelectionError         dynamic sampling found too few groups that teach anything
      LogprobMismatchError   engine and trainer disagree about a token by more than the run allows

Our own bugs are `assert` with the values.
"""

from __future__ import annotations


class SkyRLError(Exception):
    """Root of all errors that this package raises on purpose."""

    retry_is_safe: bool = False


class ConfigError(SkyRLError):
    """The configuration can't run as written. The message says what to change."""


class EngineError(SkyRLError):
    """Something went wrong at an inference engine."""


class RequestRejected(EngineError):
    """The request can't be served: too long, unknown adapter, unsupported option."""


class EngineUnavailable(EngineError):
    """The engine is closed or dead. The request had no effect that counts."""

    retry_is_safe = True


class WeightUpdateError(EngineError):
    """The update was refused or failed. The engine stays paused until a whole update succeeds."""


class WeightsTorn(WeightUpdateError):
    """The update broke off after it had begun to change the model: only a whole update or a restart makes it right."""


class EnvironmentFailure(SkyRLError):
    """An environment or reward raised. The trajectory is failed, logged and counted."""


class EnvironmentTimeout(EnvironmentFailure):
    """A call of one environment is over its deadline. The trajectory is failed, the thread is still in it."""


class EnvironmentsStuck(EnvironmentFailure):
    """Every worker is in a call that is over its deadline. No trajectory can go on."""


class CheckpointError(SkyRLError):
    """No usable checkpoint where one was asked for."""


class DataError(SkyRLError):
    """A data row can't be read; the message names the file and the row."""


class SelectionError(SkyRLError):
    """The rollouts of a step teach too little to go on: dynamic sampling drew as often as it may."""


class LogprobMismatchError(SkyRLError):
    """Rollout and trainer log-probabilities part by more than the bound; the message says where they do first."""
