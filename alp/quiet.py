"""What torchao prints while it is imported, as transformers does wherever torchao is installed: nothing a user can act on."""

from __future__ import annotations

import logging

_CHATTER = {
    "torchao": "Failed to load ",  # libraries for GPUs, which a CPU build lacks
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",  # how torchao registers its enums
}


def leave_out_import_chatter() -> None:
    """From now on, in this process, drop these messages and no others."""
    for name, start in _CHATTER.items():
        logging.getLogger(name).addFilter(lambda record, start=start: not str(record.msg).startswith(start))
