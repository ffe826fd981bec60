"""What a rollout's sampling settings do to the ratio, for every trainer's module.

    check_sampling("openrlhf", {"top_p": 0.9, "top_k": -1}, prefix="--rollout.")      raises: top_p truncates
    check_stated("prime_rl", support)      where the trainer hands over no settings, its user says it once

An engine that truncates (top-k, top-p, min-p) and then normalises, as vLLM's processed log-probabilities are, reports
log-probabilities over the tokens it kept. A trainer's are over the whole vocabulary, so every token's ratio is too small: by
exactly the probability that was kept. The same support on both sides repairs that. Penalties and biases change the logits
themselves, which no support repairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from ..checks import check_choice, is_number, refuse_value, shown
from ._shared import from_text

EVERY_TOKEN = 1 << 30
"""A top_k that keeps every token of any vocabulary; SGLang's own number for that."""


def _is_off(value: Any) -> bool:
    if is_number(value):
        return bool(value == 0)
    return value is None or value is False or (isinstance(value, Collection) and _is_empty(value))


def _is_empty(value: Collection[Any]) -> bool:
    shape = getattr(value, "shape", (0,))  # of an array or a Tensor, which may have no len
    return 0 in shape and not len(value)


def _is_one(value: Any) -> bool:
    return value is None or (is_number(value) and value == 1)


def _keeps_mass(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 1)


def _is_unlimited(value: Any) -> bool:
    return value is None or (is_number(value) and value < 0)


def _keeps_count(value: Any) -> bool:
    return value is None or (is_number(value) and not 0 < value < EVERY_TOKEN)


_Neutral = tuple[Callable[[Any], bool], str]
_OFF: _Neutral = (_is_off, " off")

_REMOVALS = (
    # tokens that the sampler may not, or must, take
    *("bad_words", "bad_words_ids", "allowed_token_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("min_tokens", "min_new_tokens", "min_length", "forced_bos_token_id", "forced_eos_token_id"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prefix_allowed_tokens_fn", "constraints"),
    # grammars
    *("structured_outputs", "guided_decoding", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("json_schema", "regex", "ebnf", "structural_tag"),
)

_TRUNCATIONS: dict[str, _Neutral] = {
    "top_p": (_keeps_mass, "=1"),
    "top_k": (_keeps_count, " off"),
    "min_p": (_is_off, "=0"),
    "typical_p": (_keeps_mass, "=1"),
    "epsilon_cutoff": (_is_off, "=0"),
    "eta_cutoff": (_is_off, "=0"),
    "top_h": _OFF,
    "thinking_token_budget": (_is_unlimited, " off"),  # where it is spent, vLLM leaves the end of thinking alone
    **dict.fromkeys(_REMOVALS, _OFF),
}
"""Settings that set some tokens' probability to 0 -> whether a value does not, and that value as an error names it."""

_PROCESSORS = (
    *("logit_bias", "sequence_bias", "exponential_decay_length_penalty", "watermarking_config"),
    *("logits_processor", "logits_processors", "custom_logit_processor"),
)

_SHIFTS: dict[str, _Neutral] = {
    "repetition_penalty": (_is_one, "=1"),
    "encoder_repetition_penalty": (_is_one, "=1"),
    "guidance_scale": (_is_one, "=1"),
    "presence_penalty": (_is_off, "=0"),
    "frequency_penalty": (_is_off, "=0"),
    **dict.fromkeys(_PROCESSORS, _OFF),
}
"""The same of settings that change the logits of tokens that can still be sampled."""

_NESTED = ("sampling_params", "generation_config", "generation_kwargs", "extra_body", "extra_args", "vllm_xargs")
"""Settings that hold settings."""

TRUNCATIONS = tuple(_TRUNCATIONS)
"""The settings that a support repairs: `replayed` of `check_sampling` where the trainer replays all of them."""


def check_sampling(
    where: str,
    settings: Mapping[str, Any],
    *,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    replayed: Collection[str] = (),
    vocab: int = EVERY_TOKEN,
    logprobs: str = "processed",
    temperature: Any = 1.0,
    remedy: str = "",
    raw_remedy: str = "",
) -> None:
    """Raise if the rollout's log-probabilities are not over the support, or not of the logits, that the trainer's are.

    settings: the effective sampling settings under vLLM's, SGLang's or Hugging Face's names; others are ignored, None and
    each engine's neutral values pass, and mappings inside (extra_body, generation_kwargs ...) are read, too.

    Args:
        prefix: what the trainer's user writes before a setting's name. names: a setting -> its whole name for the user.
        replayed: settings whose support the trainer normalises over, so that they may truncate.
        vocab: the vocabulary's size; a top_k that large keeps every token.
        logprobs: of which distribution the engine reports them. "processed": the one it samples from (vLLM's
            processed_logprobs). "unfiltered": before truncation, after temperature and penalties (SGLang's). "raw": of
            the model's own logits (vLLM's raw_logprobs); neither truncation nor penalties reach these, nor does the
            temperature, so the trainer's must be 1.
        temperature: what the trainer divides its logits by.
        remedy: what else repairs a truncation with this trainer, raw_remedy: and a penalty; continues "it needs ..., or".

    Raises:
        ValueError: names each setting, its value, what the ratio would be wrong by, and what fits.
    """
    check_choice(where, "logprobs", logprobs, ("processed", "unfiltered", "raw"))
    if logprobs == "raw":
        if not _is_one(from_text(temperature)):
            refuse_value(
                where,
                _shown_name("temperature", prefix, names),
                temperature,
                "1 with raw log-probabilities, which are before the temperature: the trainer's must be, too",
            )
        return
    found = [each for each in _found(settings, prefix, names, vocab) if each[0] not in replayed]
    shifts = [each for each in found if each[0] in _SHIFTS]
    truncations = [each for each in found if each[0] in _TRUNCATIONS]
    if shifts:
        why = [_why_shifted(shifts)] + ([_why_truncated(truncations, logprobs)] if truncations else [])
        _refuse(where, [*shifts, *truncations], raw_remedy, ". ".join(why))
    if truncations:
        _refuse(where, truncations, remedy, _why_truncated(truncations, logprobs))


def check_stated(where: str, support: Any, *, name: str = "support", replays: str = "") -> None:
    """Check what a user says of the sampler's support, where the trainer hands over no sampling settings.

    support: "full": the rollout's log-probabilities are over the whole vocabulary, as the trainer's are. "replayed": the
    trainer normalises its own over the sampler's support. None: nothing was said, an error that tells what to write.
    name: the option as the trainer's user writes it. replays: what makes the trainer replay; empty if it cannot.
    """
    replay = f", or {name}='replayed' if {replays}" if replays else ""
    if support is None:
        raise ValueError(
            f"{where}: {name} is not given, and this trainer does not hand over how the rollout sampled. Write {name}='full' "
            "if that was from the whole vocabulary: top_p=1, top_k off, min_p=0, no penalties and no logit biases (or the "
            f"engine's raw log-probabilities, at temperature 1){replay}. Otherwise each token's ratio is multiplied by the "
            "probability that the truncation kept"
        )
    if support != "full" and not (support == "replayed" and replays):
        if support == "replayed":
            refuse_value(where, name, support, "'full': this trainer does not normalise over the sampler's support")
        refuse_value(where, name, support, "'full'" + replay)


_Found = tuple[str, str, Any]  # the setting, its name as the user writes it, its value


def _shown_name(name: str, prefix: str, names: Mapping[str, str] | None) -> str:
    return (names or {}).get(name, prefix + name)


def _found(settings: Mapping[str, Any], prefix: str, names: Mapping[str, str] | None, vocab: int) -> Any:
    """Yield each setting that is not neutral."""
    for name, given in settings.items():
        if name in _NESTED and isinstance(given, Mapping):
            yield from _found(given, f"{_shown_name(name, prefix, names)}.", None, vocab)
            continue
        value = from_text(given)
        is_neutral, _ = _TRUNCATIONS.get(name) or _SHIFTS.get(name) or (None, "")
        if is_neutral is None or is_neutral(value) or (name == "top_k" and is_number(value) and value >= vocab):
            continue
        yield name, _shown_name(name, prefix, names), given


def _refuse(where: str, found: list[_Found], remedy: str, why: str) -> NoReturn:
    given = ", ".join(f"{shown_name}={shown(value)}" for _, shown_name, value in found)
    fits = ", ".join(shown_name + (_TRUNCATIONS | _SHIFTS)[name][1] for name, shown_name, _ in found)
    raise ValueError(f"{where}: {given}; it needs {fits}{f', or {remedy}' if remedy else ''}. {why}")


def _why_shifted(found: list[_Found]) -> str:
    subject, verb = ", ".join(name for name, _, _ in found), "changes" if len(found) == 1 else "change"
    return (
        f"{subject} {verb} the logits themselves: the rollout's log-probabilities are then of another distribution than the "
        "trainer's, and no support repairs the ratio"
    )


def _why_truncated(found: list[_Found], logprobs: str) -> str:
    if logprobs == "unfiltered":
        return (
            "The rollout's log-probabilities leave the truncation out, so they are not those of the distribution that was "
            "sampled: each token's is too low by the logarithm of the probability that was kept"
        )
    bound, kept = "", from_text(found[0][2])
    if [name for name, _, _ in found] == ["top_p"] and is_number(kept) and 0 < kept < 1:
        bound = f" (at equal policies {kept} or more), and the ratio of T tokens by as little as {kept}**T"
    return (
        "The rollout's log-probabilities are over the tokens that were kept, the trainer's over the whole vocabulary: each "
        f"token's ratio would be multiplied by the probability that was kept{bound}"
    )
