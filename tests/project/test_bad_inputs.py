"""Every public function, every argument, every bad value of the argument's kind: an error that names the argument.

What is accepted in spite of its kind stands in HARMLESS, with the reason.
"""

import re

import pytest

from tests.support.bad_inputs import cases

OF_THE_MODEL = "the model's own numbers: NaN gives a NaN loss, which shows; an impossible token stays in its sequence"
HARMLESS = {
    "policy_loss(logp=NaN)": OF_THE_MODEL,
    "policy_loss(logp=-inf)": OF_THE_MODEL,
    "policy_loss(entropy=NaN)": OF_THE_MODEL,
    "policy_loss(entropy=inf)": OF_THE_MODEL,
}
CASES = list(cases())


@pytest.mark.parametrize("function", sorted({case.function.where for case in CASES}))
def test_a_bad_argument_is_named_before_anything_runs(function):
    wrong, accepted = [], set()
    for case in CASES:
        if case.function.where != function:
            continue
        try:
            case.function.call(**{**case.function.good(), case.argument: case.value})
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error)
            if (
                text.startswith(f"{function}: ")
                and re.search(rf"\b{case.argument}\b", text)
                and case.name not in HARMLESS
            ):
                continue
            wrong.append(f"{case.name}: {type(error).__name__}: {text[:150]}")
        except Exception as error:
            wrong.append(f"{case.name}: {type(error).__name__}: {str(error)[:150]}")
        else:
            accepted.add(case.name)
    assert not wrong, "\n" + "\n".join(wrong)
    assert accepted == {name for name in HARMLESS if name.startswith(f"{function}(")}


def test_the_good_arguments_are_good():
    for function in {id(case.function): case.function for case in CASES}.values():
        function.call(**function.good())
    assert len(CASES) >= 200
