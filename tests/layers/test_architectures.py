"""attach on tiny random models of transformers' decoder architectures; examine.py examines each model once."""

import pytest

transformers = pytest.importorskip("transformers")

from tests.support import examine as examination  # noqa: E402
from tests.support.architectures import ARCHITECTURES  # noqa: E402
from tests.support.examine import VARIANTS, Checkpointed, available, examine  # noqa: E402

each = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture
def found(name):
    if not available(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name} that trains")
    return examine(name)


@each
def test_noise_reaches_the_logits_and_each_layer_runs_once(name, found):
    architecture = ARCHITECTURES[name]
    assert found.changed
    if architecture.path is None:
        assert found.runs == [int(i not in architecture.idle) for i in range(found.num_layers)]


@each
def test_with_the_noise_off_logits_are_bit_equal_to_the_untouched_models(name, found):
    assert found.clean


@each
def test_the_gradient_of_log_sigma_is_the_central_difference_in_float64(name, found):
    """The step changes a layer's input by 1e-5 of its size, so both sides choose the same experts."""
    for layer, (gradient, difference) in enumerate(zip(found.gradient, found.differences, strict=True)):
        assert gradient == pytest.approx(difference, rel=1e-4)
        assert (gradient == 0.0) == (layer in ARCHITECTURES[name].idle)


@each
def test_gradient_checkpointing_changes_no_gradient(name, found):
    for variant in VARIANTS:
        result = found.checkpointing[variant]
        if isinstance(result, Checkpointed):
            assert result.recomputed
            assert result.difference < 1e-5
        else:
            assert result == "none in transformers"


@each
def test_the_fused_loss_is_given_the_head_that_makes_the_models_logits(name, found):
    assert (found.head != "no") is ARCHITECTURES[name].has_linear_head


@each
def test_detaching_restores_hooks_and_bits(name, found):
    assert found.restored


def test_the_committed_table_is_what_is_found():
    committed = examination.committed_table()
    if not committed.startswith(f"transformers {transformers.__version__},"):
        pytest.skip("the table is of another version of transformers")
    assert committed == examination.table(), "python -m tests.support.examine --write makes it anew"
