"""ALPGRPOTrainer on a decoder whose layers read several streams of each position."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from alp.policy.tiny import character_tokenizer
from tests.support.architectures import ARCHITECTURES
from tests.support.examine import available, make
from tests.support.trl_cases import logged, rolled


@pytest.mark.parametrize("fused", [True, False])
def test_a_decoder_with_several_streams_takes_its_first_steps(fused: bool, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["deepseek_v4"]
    if not available("deepseek_v4"):
        pytest.skip("this transformers has no deepseek_v4")
    tokenizer = character_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = make(architecture._replace(config=architecture.config | tokens | {"bos_token_id": None}))
    options = {"alp_fused_head": fused, "router_aux_loss_coef": 0.0, "max_steps": 2, "per_device_train_batch_size": 4}
    trainer = rolled(tmp_path, model=model, **options)
    assert len(logged(trainer, "loss")) == 2
    assert all(0.9 < ratio < 1.1 for ratio in trainer.perturbation.realised()["rms_over_nominal"])
