"""Import the user's own files and modules, which register methods and tasks, before a configuration is checked."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from .errors import UserError


def load_plugins(names: tuple[str, ...]) -> None:
    """Import each file ("my/methods.py") or module ("my.methods") once. Any exception becomes a UserError."""
    for name in names:
        try:
            _load_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except Exception as error:  # a user's code may raise anything
            raise UserError(f"plugins: {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> None:
    module_name = f"alp_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
