"""Which sampling settings leave the ratio right, and what is said of the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alp_kernels.integrations.truncation import EVERY_TOKEN, TRUNCATIONS, check_sampling, check_stated


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0, "logit_bias": {}},
        dict.fromkeys(("top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "logit_bias", "bad_words")),
        {"top_p": "1.0", "top_k": 0, "min_p": "0", "min_tokens": 0, "typical_p": 1.0, "bad_words": []},
        {"top_k": EVERY_TOKEN},
        {"temperature": 0.7, "max_tokens": 16, "stop": ["\n"], "seed": 3, "n": 8},
        {"thinking_token_budget": -1, "logit_bias": np.array([]), "bad_words": (), "min_tokens": False},
        {"top_p": np.float32(1), "top_k": np.int64(-1), "min_p": np.float64(0)},
        {"generation_kwargs": None, "extra_body": {"top_p": 1.0, "guidance_scale": 1.0}},
    ],
    ids=str,
)
def test_neutral_values_pass(settings):
    check_sampling("here", settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"top_p": 0.9},
            r"^here: top_p=0\.9; it needs top_p=1\. .*probability that was kept .*0\.9 or more.* 0\.9\*\*T$",
        ),
        ({"top_p": "0.9"}, r"^here: top_p='0\.9'; it needs top_p=1\. .* 0\.9\*\*T$"),
        ({"top_p": 0.9, "top_k": 20}, r"^here: top_p=0\.9, top_k=20; it needs top_p=1, top_k off\. .*was kept$"),
        ({"top_k": 1}, "top_k=1; it needs top_k off"),
        ({"top_k": np.int64(20)}, "it needs top_k off"),
        ({"top_p": 0}, r"top_p=0; it needs top_p=1\. .*was kept$"),
        ({"top_p": float("nan")}, r"top_p=nan; it needs top_p=1\. .*was kept$"),
        ({"top_p": "most"}, r"top_p='most'; it needs top_p=1\. .*was kept$"),
        ({"min_p": 0.05}, r"min_p=0\.05; it needs min_p=0\."),
        ({"typical_p": 0.5}, r"typical_p=0\.5; it needs typical_p=1\."),
        ({"epsilon_cutoff": 3e-4}, r"it needs epsilon_cutoff=0\."),
        ({"min_tokens": 1}, "min_tokens=1; it needs min_tokens off"),
        ({"thinking_token_budget": 0}, "thinking_token_budget=0; it needs thinking_token_budget off"),
        ({"allowed_token_ids": torch.arange(3)}, "allowed_token_ids=.*; it needs allowed_token_ids off"),
        ({"bad_words": np.array(["a", "b"])}, "bad_words=.*; it needs bad_words off"),
        ({"bad_words": ["no"]}, r"bad_words=\['no'\]; it needs bad_words off"),
        ({"structured_outputs": {"regex": "a+"}}, "it needs structured_outputs off"),
        ({"generation_kwargs": {"min_p": 0.1}}, r"generation_kwargs\.min_p=0\.1; it needs generation_kwargs\.min_p=0"),
        ({"extra_body": {"extra_args": {"top_k": 5}}}, r"extra_body\.extra_args\.top_k=5"),
    ],
)
def test_what_truncates_is_named_with_what_the_ratio_would_be_wrong_by(settings, message):
    with pytest.raises(ValueError, match=message):
        check_sampling("here", settings)
    check_sampling("here", settings, replayed=TRUNCATIONS)
    check_sampling("here", settings, logprobs="raw")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"repetition_penalty": 1.1},
            r"repetition_penalty=1\.1; it needs repetition_penalty=1\. repetition_penalty changes",
        ),
        ({"presence_penalty": -0.5}, "it needs presence_penalty=0"),
        (
            {"frequency_penalty": 0.5, "logit_bias": {3: 1.0}},
            "frequency_penalty, logit_bias change the logits themselves",
        ),
        ({"logit_bias": torch.zeros(3)}, "logit_bias=.*; it needs logit_bias off"),
        ({"logits_processors": [len]}, "it needs logits_processors off"),
        ({"top_p": 0.5, "repetition_penalty": 2}, "repetition_penalty=2, top_p=0.5; it needs .*no support.*was kept"),
    ],
)
def test_no_support_repairs_other_logits(settings, message):
    with pytest.raises(ValueError, match=message):
        check_sampling("here", settings)
    with pytest.raises(ValueError, match=r"no support repairs the ratio$"):
        check_sampling("here", settings, replayed=TRUNCATIONS)
    check_sampling("here", settings, logprobs="raw")


def test_settings_have_the_users_names_and_the_trainers_remedy():
    with pytest.raises(ValueError, match=r"--rollout\.top_k=5; it needs --rollout\.top_k off, or a newer engine\. "):
        check_sampling("here", {"top_k": 5}, prefix="--rollout.", remedy="a newer engine")
    with pytest.raises(ValueError, match=r"logit_bias=\{1: 2\}; it needs logit_bias off, or a raw engine\. "):
        check_sampling("here", {"logit_bias": {1: 2}}, remedy="a newer engine", raw_remedy="a raw engine")
    with pytest.raises(ValueError, match="here: pattern='a'; it needs pattern off"):
        check_sampling("here", {"regex": "a"}, prefix="x_", names={"regex": "pattern"})
    with pytest.raises(
        ValueError, match=r"top_k=5.*leave the truncation out, so they are not those of the distribution"
    ):
        check_sampling("here", {"top_k": 5}, logprobs="unfiltered")


def test_a_top_k_of_the_whole_vocabulary_keeps_every_token():
    check_sampling("here", {"top_k": 32}, vocab=32)
    with pytest.raises(ValueError, match="top_k=31"):
        check_sampling("here", {"top_k": 31}, vocab=32)


def test_raw_log_probabilities_are_those_of_temperature_one():
    check_sampling("here", {}, logprobs="processed", temperature=0.7)
    check_sampling("here", {}, logprobs="raw", temperature="1.0")
    with pytest.raises(ValueError, match=r"^here: --temperature=0\.7; it needs 1 with raw log-probabilities"):
        check_sampling("here", {}, prefix="--", logprobs="raw", temperature=0.7)


def test_where_nothing_is_handed_over_the_support_is_stated_once():
    check_stated("here", "full")
    check_stated("here", "replayed", replays="it is switched on")
    with pytest.raises(
        ValueError, match=r"^here: alp_support is not given.*Write alp_support='full' if .*truncation kept$"
    ):
        check_stated("here", None, name="alp_support")
    with pytest.raises(ValueError, match="or support='replayed' if it is switched on"):
        check_stated("here", None, replays="it is switched on")
    with pytest.raises(ValueError, match="support='replayed'; it needs 'full': this trainer does not normalise"):
        check_stated("here", "replayed")
    with pytest.raises(ValueError, match="support='top_p'; it needs 'full', or support='replayed' if it is"):
        check_stated("here", "top_p", replays="it is switched on")
