"""Multi-turn rollout: the model writes code, a tool runs it, the model reads the output and continues.

    prompt | turn: text, ```python ... ``` | observation | turn: ... | observation | turn: ... \\boxed{answer}

A turn is one sampler call on the token ids so far of all trajectories that are still open. It ends at the token that
closes a code block, or at the end token. Observations are context tokens without a loss: the attention mask includes
them, the mask does not. Sampled tokens are never tokenised again.

B = P prompts * G samples; T tokens in the longest response, observations included.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alp_kernels import Support

from ..policy.models import Policy
from ..rollout import Completions, Request, Sample, Turns
from ..tasks.files import last_boxed
from .tool import STATUSES, Tool, ToolResult

FENCE = "```"
LANGUAGES = ("", "py", "python")
LABEL = "\nCode execution result: "
_CHARACTERS_A_TOKEN = 16  # at most this many characters per allowed token are tokenised: the rest would be cut anyway
FIGURES = ("turns", "void", "calls", "cut", *STATUSES)
"""Counts of each trajectory: turns, whether the last was void, tool calls, cut observations, calls per status."""


# ------------------------------------------------------------------ code and answers in text


def find_code(text: str) -> tuple[int, str] | None:
    """Return the start of the first complete Python block in `text`, and its code; None if there is no such block.

    A block in another language, or a fence that opens and closes on one line, counts as text.
    """
    at = 0
    while (start := text.find(FENCE, at)) >= 0:
        line, close = text.find("\n", start), text.find(FENCE, start + len(FENCE))
        if close < 0:
            return None
        if 0 <= line < close and text[start + len(FENCE) : line].strip().lower() in LANGUAGES:
            return start, text[line + 1 : close]
        at = close + len(FENCE)
    return None


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, or None."""
    try:
        return last_boxed(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=4)
def _backticks(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) int64: number of backticks in each token. Rows are decoded only if a fence may have closed."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([t.count("`") + (t == "<0x60>") if t is not None else 0 for t in tokens])


class FenceStop:
    """A `Stop` for `sample`: finds the rows that have just completed a Python block."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """(R,) bool, from this turn's tokens so far (R, t); checks only rows that are alive."""
        counts = _backticks(self._tokenizer).to(tokens.device)
        # a model's vocabulary may be larger than its tokenizer's, through padding
        in_row = counts[tokens.clamp(max=len(counts) - 1)]
        candidates = alive & (in_row[:, -1] > 0) & (in_row.sum(dim=1) >= 2 * len(FENCE))
        stopped = torch.zeros_like(alive)
        for row in candidates.nonzero().flatten().tolist():
            stopped[row] = find_code(_decode(self._tokenizer, tokens[row].tolist())) is not None
        return stopped


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode without clean-up: code keeps its spaces."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# ------------------------------------------------------------------ observations


def observe(result: ToolResult) -> str:
    """The text of a result that the model reads: what was printed, or the last line of the error."""
    if result.status == "ok":
        return result.stdout.strip() or "nothing was printed"
    return result.error or result.status


def encode_observation(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> tuple[list[int], bool]:
    """At most `limit` token ids of an observation, and whether it was cut. Special tokens in it become plain text."""

    def encode(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True))

    ids, newline = encode(f"{LABEL}{text[: limit * _CHARACTERS_A_TOKEN]}\n"), encode("\n")
    is_cut = len(ids) > limit or len(text) > limit * _CHARACTERS_A_TOKEN
    return (ids[: limit - len(newline)] + newline if len(ids) > limit else ids), is_cut


# ------------------------------------------------------------------ the rollout


@dataclass
class _Trajectory:
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))
    support: Support | None = None  # the tokens that sampling kept; a row per token, up to the last sampled one
    text: str = ""  # the last turn's text, without code
    is_open: bool = True
    is_truncated: bool = False

    def take(
        self, ids: list[int], logp: list[float], support: Support | None, text: str, has_ended: bool
    ) -> str | None:
        """Add a turn; returns the code to run, or None if the trajectory is complete."""
        if support is not None:
            before = [] if self.support is None else [self.support.pad_to(len(self.tokens))]
            self.support = Support.cat([*before, support])
        self.tokens += ids
        self.logp += logp
        self.is_sampled += [True] * len(ids)
        self.ends.append(len(self.tokens) - 1)
        self.figures["turns"] += 1
        found = find_code(text)
        self.text = text if found is None else text[: found[0]]
        has_answer = boxed(self.text) is not None
        if found is not None and not has_answer:
            return found[1]
        self.is_open = False
        self.figures["void"] = float(not has_answer)
        self.is_truncated = found is None and not has_ended
        return None

    def read(self, ids: list[int], is_cut: bool) -> None:
        """Add an observation."""
        self.tokens += ids
        self.logp += [0.0] * len(ids)
        self.is_sampled += [False] * len(ids)
        self.figures["cut"] += is_cut

    def truncate(self) -> None:
        """End the trajectory because no turns or tokens are left."""
        self.is_open, self.is_truncated = False, True


@torch.no_grad()
def sample_turns(
    sample: Sample, policy: Policy, request: Request, *, tool: Tool, max_turns: int, observation_tokens: int
) -> Completions:
    """Call `sample` turn by turn, with a tool in between. `max_new_tokens` limits a response with its observations.

    `texts` are the last turns' texts without code: tool output is never scored.
    """
    max_new_tokens, u = request.max_new_tokens, request.u
    rows = [_Trajectory(prompt) for prompt in request.prompts for _ in range(request.num_samples)]
    stop, tool_s = FenceStop(policy.tokenizer), 0.0
    for turn in range(1, max_turns + 1):
        is_open = [i for i, row in enumerate(rows) if row.is_open]
        if not is_open:
            break
        used = [len(rows[i].tokens) for i in is_open]
        room = max_new_tokens - min(used)
        asked = dataclasses.replace(
            request,
            max_new_tokens=room,
            u=None if u is None else _shifted(u[is_open], used, room),
            stop=stop,
        )
        if turn > 1:  # in the first turn, a prompt's samples share its prefill
            asked = dataclasses.replace(
                asked, prompts=[rows[i].prompt + rows[i].tokens for i in is_open], num_samples=1
            )
        out = sample(policy, asked)
        # rows with less room than the widest are sampled past their own limit: the excess is dropped
        lengths = [min(n, max_new_tokens - k) for n, k in zip(out.mask.sum(dim=1).tolist(), used, strict=True)]
        calls = []
        supports = _supports(out, lengths)
        for i, ids, logp, n, kept in zip(
            is_open, out.targets.tolist(), out.logp.tolist(), lengths, supports, strict=True
        ):
            text = _decode(policy.tokenizer, ids[:n])
            code = rows[i].take(ids[:n], logp[:n], kept, text, has_ended=ids[n - 1] in policy.eos_ids)
            if code is None:
                continue
            if turn == max_turns or len(rows[i].tokens) == max_new_tokens:
                rows[i].truncate()
            else:
                calls.append((rows[i], code))
        start = time.monotonic()
        results = tool.run([code for _, code in calls])
        tool_s += time.monotonic() - start
        for (row, _), result in zip(calls, results, strict=True):
            row.figures["calls"] += 1
            row.figures[result.status] += 1
            ids, is_cut = encode_observation(policy.tokenizer, observe(result), observation_tokens)
            if len(row.tokens) + len(ids) < max_new_tokens:
                row.read(ids, is_cut)
            else:
                row.truncate()
    return _assemble(policy, rows, tool_s)


def _supports(out: Completions, lengths: list[int]) -> list[Support | None]:
    """The tokens that sampling kept in the first `lengths` rows of each completion."""
    if out.support is None:
        return [None] * len(lengths)
    width = out.mask.shape[1]
    return [out.support.select(slice(i * width, i * width + n)) for i, n in enumerate(lengths)]


def _shifted(u: Tensor, used: list[int], room: int) -> Tensor:
    """(R, room): a token's random number depends only on its position in the response."""
    places = torch.tensor(used)[:, None] + torch.arange(room)
    return u.gather(
        1, places.clamp(max=u.shape[1] - 1).to(u.device)
    )  # positions past the limit are clamped: their tokens are dropped


def _assemble(policy: Policy, rows: list[_Trajectory], tool_s: float) -> Completions:
    width, length = max(len(row.prompt) for row in rows), max(len(row.tokens) for row in rows)

    def padded(values: list[list[Any]], fill: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], dtype=dtype, device=policy.model.device)

    before = [[policy.pad_id] * (width - len(row.prompt)) + row.prompt for row in rows]
    is_prompt = [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
    ends = [[i in row.ends for i in range(len(row.tokens))] for row in rows]
    supports = [row.support.pad_to(length) for row in rows if row.support is not None]
    tokens = padded([row.tokens for row in rows], policy.pad_id, torch.int64)
    attending = padded([[1] * len(row.tokens) for row in rows], 0, torch.int64)
    return Completions(
        torch.cat([torch.tensor(before, device=tokens.device), tokens], dim=1),
        torch.cat([torch.tensor(is_prompt, device=tokens.device), attending], dim=1),
        padded([row.is_sampled for row in rows], False, torch.bool),
        padded([row.logp for row in rows], 0.0, torch.float32),
        [row.text for row in rows],
        torch.tensor([row.is_truncated for row in rows], device=tokens.device),
        Turns(
            padded(ends, False, torch.bool),
            {name: torch.tensor([row.figures[name] for row in rows]) for name in FIGURES},
            tool_s,
        ),
        Support.cat(supports) if supports else None,
    )
