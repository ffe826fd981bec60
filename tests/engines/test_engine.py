"""A requested engine serves or gives the reason; the automatic choice is the best one and is logged once."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from alp_kernels import EngineUnavailable, engine, perturb
from alp_kernels.engine import ENGINES, ENVIRONMENT_VARIABLE, pick, why_not

CPU = torch.device("cpu")
ARGUMENTS = {"hidden": torch.zeros(2, 4), "log_sigma": torch.zeros(()), "seed": 0, "step": 0, "layer": 0}


@pytest.fixture
def fresh():
    engine._load.cache_clear(), engine._choose.cache_clear()
    yield
    engine._load.cache_clear(), engine._choose.cache_clear()


def test_the_reference_serves_everywhere():
    assert why_not("reference", "cpu") is None
    assert pick("reference", CPU).name == "reference"


def test_triton_on_cpu_tensors_is_refused_with_the_reason(monkeypatch):
    if why_not("triton", "cpu") is None:
        pytest.skip("this process runs Triton's interpreter")
    with pytest.raises(
        EngineUnavailable, match=r"engine='triton' cannot serve cpu tensors: .*; engine=None would choose"
    ):
        perturb(**ARGUMENTS, engine="triton")


def test_an_unknown_engine_names_the_known_ones():
    with pytest.raises(ValueError, match="'triton', 'native', 'reference'"):
        perturb(**ARGUMENTS, engine="cuda")


def test_the_environment_variable_forces_an_engine(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert pick(None, CPU).name == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="ALP_KERNELS_ENGINE='fastest'"):
        pick(None, CPU)


def test_the_automatic_choice_is_logged_once(fresh, caplog, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with caplog.at_level(logging.INFO, "alp_kernels"):
        first, second = pick(None, CPU), pick(None, CPU)
    assert first is second
    assert [r.getMessage() for r in caplog.records if "serves cpu tensors" in r.getMessage()].__len__() == 1


def test_a_missing_native_library_falls_back_with_a_warning(fresh, caplog, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    real = engine._load

    def without_native(name):
        return "no library was built" if name == "native" else real(name)

    monkeypatch.setattr(engine, "_load", without_native)
    with caplog.at_level(logging.INFO, "alp_kernels"):
        assert pick(None, CPU).name == "reference"
    assert caplog.records[0].levelno == logging.WARNING
    assert "native: no library was built" in caplog.text


def test_every_engine_offers_the_functions_of_the_reference():
    functions = ("philox", "normal", "perturb_fwd", "perturb_bwd", "head_fwd", "head_bwd", "unavailable")
    for name in ENGINES:
        module = engine._load(name)
        if isinstance(module, str):
            continue
        assert module.name == name
        assert all(callable(getattr(module, f)) for f in functions)
        assert not module.FUSES_TOKEN_LOSS or callable(module.head_token_loss)
        assert not module.KEEPS_EXPONENTIALS or callable(module.head_exp)


def test_importing_needs_neither_transformers_nor_triton_nor_a_gpu():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['triton'] = None; import alp_kernels, torch; "
        "print(alp_kernels.normal(1, 4, seed=0, step=0, layer=0).shape, torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert done.stdout.split() == ["torch.Size([1,", "4])", "False"]
