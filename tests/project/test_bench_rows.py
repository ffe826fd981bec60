"""The rows that the loss head is measured on: real ones, made ones, and their profiles."""

import math

import pytest
import torch

from bench import decoder
from bench.rows import Profile, Rows, entropies, flat, gaussian, peaked, sharpened, table

TINY = decoder.Config(
    vocab=512, channels=64, layers=1, length=16, windows=4, steps=30, warmup=5, held_out=4, held_out_windows=4, rows=32
)


def test_a_decoder_learns_and_its_rows_come_back(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    lines = [f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(200)]
    monkeypatch.setattr(decoder, "texts", lambda config: lines)
    files = [tmp_path / name for name in ("first", "second")]
    for file in files:
        decoder.save(file, TINY)
    rows, again = map(decoder.load, files)
    assert [tuple(part.shape) for part in rows] == [(32, 64), (512, 64), (32,)]
    assert all(map(torch.equal, rows, again))
    logp = (rows.hidden @ rows.weight.t()).log_softmax(-1).gather(1, rows.targets[:, None])
    assert -logp.mean() < 0.7 * math.log(512)
    saved = torch.load(files[0], weights_only=True)
    assert saved["held_out_loss"] < 0.7 * math.log(512)
    assert set(saved) == {*Rows._fields, "config", "versions", "training_tokens", "held_out_loss"}


def test_text_is_of_the_given_kinds_and_no_more_than_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder.sysconfig, "get_path", lambda name: str(tmp_path))
    for i in range(40):
        (tmp_path / f"{i}.py").write_text("x" * 2**16)
    (tmp_path / "large.md").write_text("y" * 2**20)
    (tmp_path / "data.json").write_text("z")
    (tmp_path / "empty.txt").write_text("")
    found = decoder.texts(decoder.Config(text_mib=1))
    assert found == ["x" * 2**16] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [peaked, gaussian, flat])
def test_rows_of_a_seed_are_the_same_again(make, dtype):
    rows, again, other = (make(8, 16, 64, dtype, seed) for seed in (1, 1, 2))
    assert [(tuple(part.shape), part.dtype) for part in rows] == [
        ((8, 16), dtype), ((64, 16), dtype), ((8,), torch.int64)
    ]  # fmt: skip
    assert all(map(torch.equal, rows, again)) and not torch.equal(rows.hidden, other.hidden)


def test_peaked_rows_are_as_peaked_in_every_size():
    sizes = [(1024, 64, 2048), (1024, 64, 8192), (1024, 256, 2048)]
    profiles = [Profile.of(peaked(*size, torch.float32)) for size in sizes]
    for profile in profiles:
        assert 0.6 < profile.entropy < 1.6
        assert profile.entropy_quantiles[0.5] < profile.entropy < profile.entropy_quantiles[0.9]
    assert max(p.certain for p in profiles) - min(p.certain for p in profiles) < 0.08


def test_targets_are_drawn_from_the_rows():
    """The mean of -log p(target) is the mean entropy, within four standard errors."""
    rows = gaussian(4096, 16, 128, torch.float32)
    logp = (rows.hidden @ rows.weight.t()).log_softmax(-1).gather(1, rows.targets[:, None])[:, 0]
    surprise = -logp - entropies(rows.hidden, rows.weight)
    assert abs(surprise.mean()) < 4 * surprise.std() / 64


def test_a_profile_counts_what_is_above_and_below_each_threshold():
    """Over 2048 tokens a flat row has all its mass below 2^-10, and none of it below 2^-12."""
    hidden, weight = torch.eye(2), torch.zeros(2048, 2)
    weight[7, 1] = 100.0
    profile = Profile.of(Rows(hidden, weight, torch.zeros(2, dtype=torch.int64)))
    assert profile.entropy == pytest.approx(11 * math.log(2) / 2, rel=1e-5)
    assert profile.certain == 0.5
    assert profile.mass_below == pytest.approx({-10: 0.5, -12: 0, -14: 0})
    assert profile.tokens_above == {-10: 0.5, -12: 1024.5, -14: 1024.5}
    assert profile.entries == pytest.approx({-10: 512.5, -12: 1024.5, -14: 1024.5})
    assert table({"two": profile}).splitlines()[2].startswith("| two | 3.81 | ")


@pytest.mark.parametrize("entropy", [1.0, 0.3])
def test_sharpened_rows_have_the_entropy_that_was_asked_for(entropy):
    rows = gaussian(64, 16, 512, torch.float32)
    sharper, temperature = sharpened(rows, entropy)
    assert float(entropies(sharper.hidden, sharper.weight).mean()) == pytest.approx(entropy, rel=1e-2)
    torch.testing.assert_close(sharper.hidden * temperature, rows.hidden)
    assert torch.equal(sharper.weight, rows.weight)
