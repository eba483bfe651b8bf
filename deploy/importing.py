"""Finding the user's training function in the folder where the command runs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deploy
import protocol
import ps
import workers
from protocol.errors import SettingsError


def function(path: str, arguments: Mapping[str, Any]) -> Any:
    """The function that ``MODULE:FUNCTION`` names, looked up from the current folder.

    Args:
        arguments: keyword arguments that it must take beside the session.

    Raises:
        SettingsError: there is no such module or function, it does not take the arguments, or the folder
            shadows one of our packages.
    """
    folder = Path(os.getcwd())
    _refuse_shadows(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise SettingsError(f"train is {path!r}, but there is no module {error.name!r} in {folder}") from None
        raise
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        raise SettingsError(
            f"train is {path!r}, but {module.__file__} has no function {name!r}; it has {', '.join(known) or 'none'}"
        )
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        raise SettingsError(f"arguments do not fit {path}{inspect.signature(found)}: {error}") from None
    return found


def _refuse_shadows(folder: Path) -> None:
    """A project's own ``workers.py`` would be imported instead of ours, or ours instead of it."""
    for package in (deploy, protocol, ps, workers):
        ours = Path(package.__path__[0]).resolve()
        for file in (folder / f"{package.__name__}.py", folder / package.__name__ / "__init__.py"):
            if file.exists() and file.resolve() != ours / "__init__.py":
                raise SettingsError(
                    f"{file} has the name of Carryover's package {package.__name__!r}; "
                    "rename it, or run from another folder"
                )
