"""Imports of a comparison's fork server before it forks workers (`set_forkserver_preload` takes module names)."""

import importlib

from .quiet import leave_out_import_chatter

leave_out_import_chatter()

for _name in ("train", "setup", "tasks.mod_chain", "tasks.tool_chain"):
    importlib.import_module(f"alp.{_name}")
