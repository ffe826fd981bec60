"""What a comparison's workers have imported before they are forked (`set_forkserver_preload` takes names of modules)."""

from .quiet import leave_out_import_chatter

leave_out_import_chatter()

import alp.train  # noqa: E402, F401
