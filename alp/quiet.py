"""What torchao prints while it is imported, as transformers does wherever torchao is installed: nothing a user can act on."""

from __future__ import annotations

import logging

_CHATTER = {
    "torchao": "Failed to load ",  # libraries for GPUs, which a CPU build lacks
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",  # how torchao registers its enums
}


def leave_out_import_chatter() -> None:
    """From now on, in this process, drop these messages and no others."""
    for name in _CHATTER:
        logging.getLogger(name).addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CHATTER[record.name])
