"""What a comparison's workers have imported before they are forked (`set_forkserver_preload` takes names of modules)."""

import importlib

from .quiet import leave_out_import_chatter

leave_out_import_chatter()

for _name in ("train", "setup", "tasks.mod_chain", "tasks.tool_chain"):
    importlib.import_module(f"alp.{_name}")
