"""Every option of our TRL configurations that the loss or the noise reads, with every bad value of its kind."""

import pytest

pytest.importorskip("trl", reason="needs TRL")

from alp_kernels.integrations.trl import ALPGRPOConfig
from alp_kernels.integrations.trl_async import ALPAsyncGRPOConfig
from tests.support.bad_values import choice, flag, integer, number, optional, rate, size

LAYERS = {"None": None, "3": 3, "a word": "some", "a list": [0], "empty": "", "halves": "0.5"}
OURS = {
    "alp_objective": lambda good: choice(good) | {"None": None},
    "alp_sigma": lambda good: size(good) | {"a string": "-1", "a word": "match", "empty": "", "NaN as text": "nan"},
    "alp_sigma_learning_rate": rate,
    "alp_layers": lambda good: LAYERS,
    "alp_path": lambda good: {"3": 3, "a list": ["model"]},
    "alp_scale": lambda good: choice(good) | {"None": None},
    "alp_rounding": lambda good: choice(good) | {"None": None},
    "alp_seed": optional(integer(0, (1 << 64) - 1)),
    "alp_nonfinite": lambda good: choice(good) | {"None": None},
    "alp_measure_every": integer(0),
    "alp_dual_clip": lambda good: optional(number)(good) | {"1": 1.0, "0": 0.0},
    "epsilon": optional(rate),
    "epsilon_high": optional(rate),
}
TRLS = {
    "alp_fused_head": optional(flag),
    "alp_backward": lambda good: choice(good) | {"None": None, "True": True},
    "alp_threshold": lambda good: number(good) | {"0": 0.0, "1": 1.0, "0.3": 0.3, "2**-21": 2.0**-21, "None": None},
    "delta": lambda good: optional(number)(good) | {"1": 1.0, "0": 0.0, "-1": -1.0},
    "beta": rate,
    "use_bias_correction_kl": flag,
    "entropy_coef": number,
    "loss_type": lambda good: choice(good) | {"None": None, "cispo": "cispo"},
    "importance_sampling_level": choice,
    "temperature": size,
    "vllm_importance_sampling_correction": lambda good: {"True": True},
    "off_policy_mask_threshold": lambda good: {"0.5": 0.5},
    "top_entropy_quantile": lambda good: {"0.5": 0.5, "NaN": float("nan")},
    "use_adaptive_entropy": lambda good: {"True": True},
}
ASYNCHRONOUS = {
    "temperature": lambda good: size(good) | {"0.001": 0.001},
    "top_p": lambda good: {"0.9": 0.9, "0": 0.0, "NaN": float("nan"), "a word": "most", "True": True},
    "top_k": lambda good: {"1": 1, "20": 20, "2.5": 2.5, "a list": [3]},
    "min_p": lambda good: {"0.1": 0.1, "NaN": float("nan"), "True": True},
    "repetition_penalty": lambda good: {"1.1": 1.1, "0.9": 0.9, "0": 0.0, "NaN": float("nan")},
}


@pytest.mark.parametrize("config", [ALPGRPOConfig, ALPAsyncGRPOConfig])
def test_a_bad_option_is_named(config, tmp_path):
    quiet = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    wrong, number_of_cases = [], 0
    for option, kind in (OURS | (TRLS if config is ALPGRPOConfig else ASYNCHRONOUS)).items():
        for name, value in kind("alp-token" if option == "alp_objective" else None).items():
            number_of_cases += 1
            try:
                config(**quiet, **{option: value})
            except (TypeError, ValueError) as error:
                if not str(error).startswith(f"{config.__name__}: {option}="):
                    wrong.append(f"{option}={name}: {type(error).__name__}: {str(error)[:150]}")
            except Exception as error:
                wrong.append(f"{option}={name}: {type(error).__name__}: {str(error)[:150]}")
            else:
                wrong.append(f"{option}={name}: accepted")
    assert not wrong, "\n" + "\n".join(wrong)
    assert number_of_cases >= 90
