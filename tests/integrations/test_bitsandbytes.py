"""QLoRA: adapters and sigma train on a base that bitsandbytes holds in four or eight bits. Needs bitsandbytes."""

import pytest
import torch

peft = pytest.importorskip("peft", minversion="0.19")
bnb = pytest.importorskip("bitsandbytes")

from alp_kernels.integrations.hugging_face import output_head  # noqa: E402
from tests.support.adapted import LAYERS, assert_adapters_and_sigma_train  # noqa: E402
from tests.support.decoders import make_model  # noqa: E402


def quantised(bits, names):
    """A model with the linear layers of these name endings replaced, as transformers does on loading."""
    model = make_model(hidden_size=64, intermediate_size=128)  # bitsandbytes quantises in blocks of 64
    for path, module in list(model.named_modules()):
        if path.endswith(tuple(names)):
            parent, _, name = path.rpartition(".")
            settings = {"bias": module.bias is not None}
            if bits == 4:
                new = bnb.nn.Linear4bit(*module.weight.T.shape, quant_type="nf4", **settings)
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*module.weight.T.shape, has_fp16_weights=False, **settings)
                new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            if module.bias is not None:
                new.bias = module.bias
            setattr(model.get_submodule(parent), name, new.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("adapters", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_and_sigma_train_on_a_quantised_base(bits, adapters):
    base = quantised(bits, LAYERS)
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    config = peft.LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False, **adapters)
    assert_adapters_and_sigma_train(peft.get_peft_model(base, config))


def test_a_quantised_head_is_refused():
    with pytest.raises(
        TypeError, match=r"the head's weight is a Params4bit of torch\.uint8; keep the head unquantised"
    ):
        output_head(quantised(4, ["lm_head"]))
