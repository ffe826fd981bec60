"""How far an update over several ranks may differ from the update of one process."""

from typing import Any

import torch

from tests.support.compare import order_bound

# relative to each tensor's largest element: roundings through two layers of six products of 32 and one of 48, a head of 32 and a
# softmax over 61 tokens, and back, and a sum over 8 rows of 7 tokens
BOUND = order_bound(2 * (2 * (6 * 32 + 48) + 32 + 61) + 8 * 7, torch.float64)
# log_sigma is float32 for every model; its parts (one for each rank and micro-batch) are rounded and summed: at most 8 roundings
SIGMA_BOUND = 8 * 2.0**-24


def assert_same_update(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["gradient"].keys() == expected["gradient"].keys()
    for name, value in expected["gradient"].items():
        bound = SIGMA_BOUND if name == "log_sigma" else BOUND
        assert actual["gradient"][name].shape == value.shape, name
        assert (actual["gradient"][name] - value).abs().max() <= bound * value.abs().max(), name
