"""What users write outside this package and name by a dotted path: found, and given the arguments that it names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from skyrl_train.errors import ConfigError


def load_object(path: str, *, wanted: str) -> Any:
    """`package.module:Name` or `package.module.Name` -> the object. Raises ConfigError saying which half is missing.

    Modules of the current directory are found: `python -m` puts it on the path.
    """
    module_name, separator, attribute = path.partition(":")
    if not separator:
        module_name, _, attribute = path.rpartition(".")
    if not module_name or not attribute:
        raise ConfigError(f"{wanted} {path!r} is no dotted path: write my_package.my_module.my_name")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:  # whatever the user's module raises on its way in
        raise ConfigError(
            f"{wanted} {path!r} can't be imported: {type(exc).__name__}: {exc} (module {module_name})"
        ) from exc
    if not hasattr(module, attribute):
        where = getattr(module, "__file__", None) or "built in"
        raise ConfigError(f"{wanted} {path!r} can't be imported: module {module_name!r} ({where}) has no {attribute!r}")
    return getattr(module, attribute)


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function has parameters for; all of them if it takes `**anything`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def missing(function: Callable[..., Any], known: Mapping[str, Any]) -> list[str]:
    """The parameters that the function must be given and nobody here knows."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and (name not in known or parameter.kind is parameter.POSITIONAL_ONLY)
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
