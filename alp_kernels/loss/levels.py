"""What one ratio covers (ALP, arXiv 2603.19470; docs/math.md, section 2).

token       ell_t = r_t                          r_t = p_t - denominator_t
sequence    ell_t = sg[S]   + p_t - sg[p_t]      S   = sum_t m_t r_t
cum-token   ell_t = sg[C_t] + p_t - sg[p_t]      C_t = sum_{u <= t} m_u r_u
cum-turn    ell_t = sg[C_e] + p_t - sg[p_t]      e   = last token of t's turn
geometric   S and C are divided by the number of tokens they sum
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective import Objective
from .batch import Rows
from .segments import first_and_last, segment_sum


def level_log_ratio(logp: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """Return ell of each row, differentiable in logp (n,); above token level, `rows` must hold whole sequences."""
    r = logp - rows.numbers.denominator
    if objective.level == "token":
        return r
    first, last = first_and_last(rows.sequence)
    if objective.level == "cum-token":
        last = torch.arange(len(r), device=r.device)
    elif objective.level == "cum-turn":
        assert rows.turn is not None
        _, last = first_and_last(rows.turn)
    total = segment_sum(r.detach(), first, last)
    if objective.geometric:
        total = total / (last + 1 - first)
    through = torch.where(logp.isinf(), 0.0, logp - logp.detach())  # value 0, gradient 1; avoids -inf - (-inf)
    return total.to(r.dtype) + through
