"""The model with a large vocabulary that the sampled backward is compared on."""

import pytest
import torch

from alp.policy.models import Policy
from alp.policy.tiny import make_tiny
from alp.study import wide
from tests.support.tiny_models import SMALL


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return make_tiny(SMALL)


def test_added_words_hold_their_mass_and_change_no_other_logit(policy: Policy) -> None:
    old = len(policy.tokenizer)
    states = torch.randn(50, 32) + 2 * torch.randn(32)
    before = policy.model.get_output_embeddings()(states)
    policy = wide.widened(policy, states)
    logits = policy.model(torch.tensor([[5, wide.VOCAB_SIZE - 1]])).logits
    assert logits.shape == (1, 2, wide.VOCAB_SIZE) and len(policy.tokenizer) == wide.VOCAB_SIZE
    after = policy.model.get_output_embeddings()(states).detach()
    torch.testing.assert_close(after[:, :old], before)
    p = after.double().softmax(dim=-1)
    assert float(p[:, old:].sum(dim=1).mean()) == pytest.approx(wide.MASS, rel=1e-3)
    assert p[:, old : old + 100].mean() > 20 * p[:, -100:].mean(), "a long tail"
    assert policy.encode_prompt("1+2=") == make_tiny(SMALL).encode_prompt("1+2=")
    assert policy.decode([*policy.encode_prompt("1"), old]) == f"1<word {old}>"


def test_small_mass_is_counted_below_each_threshold(policy: Policy) -> None:
    p = torch.full((2, len(policy.tokenizer)), 2.0**-13, dtype=torch.float64)
    p[0, 0] = p[1, :2] = 2.0**-11
    p[:, -1] += 1 - p.sum(dim=1)
    policy.model.get_output_embeddings().weight.data = p.log().T.float()  # one hidden channel for each row
    found = wide.small_mass(policy, torch.eye(2))
    num = len(policy.tokenizer)
    assert found["2^-14"] == [0, 0]
    assert found["2^-12"] == pytest.approx([(2 * num - 5) / 2 * 2.0**-13, 1], rel=1e-5)
    assert found["2^-10"] == pytest.approx([(2 * num - 5) / 2 * 2.0**-13 + 1.5 * 2.0**-11, 1], rel=1e-5)
