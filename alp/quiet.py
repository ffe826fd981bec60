"""Drop messages that torchao logs on import and no user can act on. transformers imports torchao if it is installed."""

from __future__ import annotations

import logging

_CHATTER = {
    "torchao": "Failed to load ",  # GPU libraries that a CPU build lacks
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",  # how torchao registers its enums
}


def leave_out_import_chatter() -> None:
    """Drop these messages, and no others, in this process from now on."""
    for name in _CHATTER:
        logging.getLogger(name).addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CHATTER[record.name])
