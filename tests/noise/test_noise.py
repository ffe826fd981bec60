"""The noise is Philox4x32-10 turned into normals, a pure function of its coordinates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alp_kernels import normal, reference
from alp_kernels.stream import FINAL_LAYER, LOGITS_LAYER, MAX_ROW, NORMAL_BOUND, ROUNDING_BIT, Stream, row_ids
from tests.conftest import DEVICE
from tests.support.philox_vectors import ONES, PUBLISHED


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_reference_matches_published_philox_vectors(counter, key, words):
    out = reference.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in out) == words


def test_noise_is_standard_normal():
    n = 1 << 20
    eps = normal(n // 256, 256, seed=7, step=1, layer=0, engine="reference").double().flatten()
    # moments of n normals: sd of the mean 1/sqrt(n), of the variance sqrt(2/n), of the fourth moment sqrt(96/n); 4.5 sd
    assert abs(eps.mean()) < 4.5 / math.sqrt(n)
    assert abs(eps.square().mean() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(eps.pow(4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    sorted_eps, ranks = eps.sort().values, (torch.arange(n, dtype=torch.float64) + 0.5) / n
    distance = (torch.special.ndtr(sorted_eps) - ranks).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p < 0.001
    for beyond in (3.0, 4.0):
        expected = n * 2 * float(torch.special.ndtr(torch.tensor(-beyond, dtype=torch.float64)))
        assert abs(int((eps.abs() > beyond).sum()) - expected) < 4.5 * math.sqrt(expected)


def test_neighbouring_streams_are_uncorrelated():
    n, base = 64 * 1024, {"seed": 3, "step": 5, "layer": 2, "row_start": 0}
    first = normal(64, 1024, **base, engine="reference").double().flatten()
    changes = [
        {"seed": 4},
        {"seed": 3 + (1 << 32)},
        {"step": 6},
        {"layer": 3},
        {"row_start": 64},
        {"row_start": 1 << 32},
    ]
    for change in changes:
        other = normal(64, 1024, **{**base, **change}, engine="reference").double().flatten()
        correlation = float((first * other).mean())
        assert abs(correlation) < 4.5 / math.sqrt(n), change


def test_no_two_coordinates_share_a_counter():
    coordinates = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1 << 32), (0, 0, FINAL_LAYER, 0)]
    coordinates += [(0, 0, LOGITS_LAYER, 0), (0, 0, LOGITS_LAYER, MAX_ROW - 1), (1 << 32, 0, 0, 0)]
    words = set()
    for seed, step, layer, row in coordinates:
        for rounding in (0, ROUNDING_BIT):
            words.add(
                tuple(int(w) for w in reference.random_words(1, 1, Stream(seed, step, layer | rounding, row), DEVICE))
            )
    assert len(words) == 2 * len(coordinates)


@given(
    rows=st.lists(st.integers(0, MAX_ROW), min_size=1, max_size=6),
    channels=st.integers(1, 70),
    seed=st.integers(0, (1 << 64) - 1),
    step=st.integers(0, ONES),
    layer=st.integers(0, LOGITS_LAYER),
)
def test_a_row_of_noise_knows_only_its_identity(rows, channels, seed, step, layer):
    coordinates = {"seed": seed, "step": step, "layer": layer, "engine": None}
    together = normal(len(rows), channels, **coordinates, row_ids=torch.tensor(rows))
    for n, row in enumerate(rows):
        assert torch.equal(together[n : n + 1], normal(1, channels, **coordinates, row_start=row))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 31, 1023, 1536])
def test_every_engine_agrees_with_float64_within_the_bound(engine, channels):
    stream = Stream(0x0123456789ABCDEF, 77, 11, row_start=(5 << 32) + 9)
    rows = 97
    exact = reference.normal(rows, channels, stream, DEVICE)
    actual = normal(
        rows, channels, seed=stream.seed, step=77, layer=11, row_start=stream.row_start, device=DEVICE, engine=engine
    )
    assert (actual.double() - exact.double()).abs().max() <= NORMAL_BOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 64}, "seed="),
        ({"step": 1 << 32}, "step=4294967296"),
        ({"layer": 0x8000}, "layer=32768"),
        ({"row_start": 1 << 48}, "48 bits"),
        ({"row_ids": torch.tensor([0, -1])}, r"row_ids spans \[-1, 0\]"),
        ({"row_ids": torch.tensor([0, 1, 2])}, r"2 rows on cpu need torch.int64 \(2,\)"),
        ({"row_ids": torch.tensor([0.0, 1.0])}, "torch.float32"),
    ],
)
def test_a_coordinate_that_does_not_fit_is_named(change, message):
    with pytest.raises(TypeError if "float" in message else ValueError, match=message):
        normal(2, 8, **{"seed": 0, "step": 0, "layer": 0, **change})


def test_a_step_tensor_is_refused():
    with pytest.raises(TypeError, match="step=a Tensor"):
        normal(2, 8, seed=0, step=torch.tensor(1), layer=0)


def test_row_identities_hold_pass_sample_and_position():
    samples, positions = torch.tensor([[5], [(1 << 24) - 1]]), torch.tensor([[0, 7], [3, (1 << 20) - 1]])
    ids = row_ids(samples, positions, passes=15)
    assert torch.equal(ids, samples * 2**20 + positions + 15 * 2**44)
    assert ids.max() <= MAX_ROW


ONE = torch.tensor([[1]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": ONE << 20}, ValueError, r"positions spans \[1048576, 1048576\]; it must lie in \[0, 1048575\]"),
        ({"positions": -ONE}, ValueError, r"positions spans \[-1, -1\]"),
        ({"samples": ONE << 24}, ValueError, r"samples spans \[16777216, 16777216\]; it must lie in \[0, 16777215\]"),
        ({"samples": -ONE}, ValueError, r"samples spans \[-1, -1\]"),
        ({"passes": 16}, ValueError, r"passes=16; it needs an int in \[0, 15\]"),
        ({"passes": -1}, ValueError, "passes=-1"),
        ({"samples": ONE.int()}, TypeError, r"samples is torch.int32; it needs torch.int64"),
        ({"positions": ONE.double()}, TypeError, r"positions is torch.float64"),
        (
            {"samples": torch.arange(4), "positions": torch.zeros(4, 4).long()},
            ValueError,
            r"samples has shape \(4,\); positions \(4, 4\) need samples\[:, None\]",
        ),
        ({"samples": torch.arange(4), "positions": torch.arange(9)}, ValueError, r"need samples\[:, None\]"),
        ({"samples": torch.arange(4)[:, None], "positions": torch.zeros(3, 9).long()}, ValueError, "samples has shape"),
        ({"samples": 3}, TypeError, "samples is a int; it needs a torch.Tensor"),
        ({"positions": [0, 1]}, TypeError, "positions is a list; it needs a torch.Tensor"),
        ({"passes": True}, TypeError, "passes=True"),
    ],
)
def test_identities_that_would_be_shared_are_an_error(change, error, message):
    """samples (B,) beside positions (B, T) would be broadcast along T if B = T."""
    with pytest.raises(error, match=message):
        row_ids(**{"samples": ONE, "positions": ONE, **change})


def test_row_identities_take_one_sample_a_position_and_no_rows_at_all():
    samples, positions = torch.tensor([0, 0, 3]), torch.tensor([0, 1, 0])
    assert row_ids(samples, positions).tolist() == [0, 1, 3 << 20]
    assert row_ids(samples[:, None], positions).shape == (3, 3)
    assert row_ids(samples[:0], positions[:0]).shape == (0,)


def test_row_identities_compile():
    compiled = torch.compile(row_ids, backend="aot_eager", fullgraph=True)
    samples, positions = torch.tensor([[2], [5]]), torch.arange(4)
    assert torch.equal(compiled(samples, positions), row_ids(samples, positions))
