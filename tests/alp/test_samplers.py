"""Samplers: torchao's numerics, vLLM on a loopback server, and the mismatch measured before training."""

import dataclasses
import functools
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alp import train as loop
from alp.config import ModelConfig, RolloutConfig, TaskConfig, TrainConfig, UpdateConfig
from alp.errors import UserError
from alp.measures.mismatch import K3_BOUND, describe, measure_mismatch
from alp.policy.load import load_policy
from alp.policy.models import Policy, hidden_states
from alp.rollout import Completions, Request, sample, uniforms
from alp.runs.files import read_metrics
from alp.sampling import vllm
from alp.sampling.in_process import InProcessSampler
from alp.setup import make_sampler, make_task
from alp.tasks.task import Task
from alp.update import Experience, training_logp
from alp_kernels.integrations.hugging_face import output_head
from tests.support.tiny_models import write_llama, write_sums

CPU = torch.device("cpu")
WEIGHT_ONLY = ("ao-int8-weights", "ao-fp8-weights", "ao-int4-weights")
train = functools.partial(loop.train, with_plots=False)  # plots take most of a small run's time


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load_policy(ModelConfig(path=str(folder)), CPU)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(TaskConfig(path=write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl")), seed=0)


def prompts(policy: Policy) -> list[list[int]]:
    return [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]


def scores(model: Any, completions: Completions, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) log-probabilities from a plain forward."""
    with torch.no_grad():
        hidden = hidden_states(model, completions.tokens, completions.attention_mask, completions.mask.shape[1])
        logits = (hidden @ output_head(model).weight.T).float() / temperature
    return logits.log_softmax(-1).gather(-1, completions.targets[..., None]).squeeze(-1)


# ------------------------------------------------------------------ torchao


@pytest.mark.parametrize("path", ["ao-int8", *WEIGHT_ONLY])
def test_sampled_logp_is_that_of_the_quantised_model(policy: Policy, path: Any) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path=path, lag=0))
    out = sampler.sample(policy, Request(prompts(policy), 3, 7, u=uniforms(9, 7, 1, 2), temperature=0.7))
    # quantised activations may round across a boundary if sums are in another order
    bound = 0.1 if path == "ao-int8" else 1e-4
    assert (out.logp - scores(sampler.model, out, 0.7))[out.mask].abs().max() < bound
    apart = (out.logp - scores(policy.model, out, 0.7))[out.mask].abs().mean()
    assert 1e-4 < apart < 0.5, "quantisation shows, and is not something else"


@pytest.mark.parametrize("path", WEIGHT_ONLY)
def test_new_weights_are_quantised_anew_after_the_lag(policy: Policy, path: Any) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path=path, lag=1))
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(0.5)
    sampler.push(policy.model)
    old = sampler.sample(policy, Request(prompts(policy), 2, 5, u=uniforms(6, 5, 0, 0)))
    sampler.push(policy.model)
    new = sampler.sample(policy, Request(prompts(policy), 2, 5, u=uniforms(6, 5, 0, 0)))
    fresh = InProcessSampler(policy.model, RolloutConfig(path=path, lag=0))
    again = fresh.sample(policy, Request(prompts(policy), 2, 5, u=uniforms(6, 5, 0, 0)))
    assert torch.equal(new.logp, again.logp) and not torch.equal(old.logp, new.logp)


def test_torchao_leaves_the_head_and_embeddings_as_they_are(policy: Policy) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path="ao-int8-weights"))
    assert torch.equal(output_head(sampler.model).weight, output_head(policy.model).weight)
    linear = [m for m in sampler.model.modules() if isinstance(m, nn.Linear)]
    assert sum(type(m.weight).__name__ == "Int8Tensor" for m in linear) == len(linear) - 1 == 2 * 7


def test_what_a_path_needs_is_said(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"compute capability 8\.9.*'ao-fp8-weights' runs anywhere"):
        make_sampler(policy.model, RolloutConfig(path="ao-fp8"))
    narrow = load_policy(ModelConfig(path=str(write_llama(tmp_path, intermediate_size=48))), CPU)
    with pytest.raises(UserError, match=r"multiple of 32; .*down_proj has 48"):
        make_sampler(narrow.model, RolloutConfig(path="ao-int4-weights"))
    with pytest.raises(UserError, match=r"alp-kernels\[vllm\].*rollout.server"):
        make_sampler(policy.model, RolloutConfig(path="vllm"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"alp-kernels\[quantise\]"):
        make_sampler(policy.model, RolloutConfig(path="ao-int8"))


# ------------------------------------------------------------------ the mismatch before training


def measured(sampler: Any, policy: Policy, task: Task, **changes: Any) -> dict[str, float]:
    config = RolloutConfig(**changes)
    return measure_mismatch(sampler, policy, task, config, max_new_tokens=8, seed=0, micro_batch=5)


def test_the_same_sampler_has_no_mismatch_and_coarser_ones_have_more(policy: Policy, task: Task) -> None:
    found = {}
    for path in ("same", "ao-int8-weights", "ao-int4-weights"):
        config = RolloutConfig(path=path, lag=0)  # type: ignore[arg-type]
        found[path] = measured(make_sampler(policy.model, config), policy, task, path=path)
    assert found["same"]["k3_kl"] < 1e-10 and abs(found["same"]["max_ratio"] - 1) < 1e-4
    assert 1e-7 < found["ao-int8-weights"]["k3_kl"] < found["ao-int4-weights"]["k3_kl"]
    assert found["same"]["tokens"] > 32


def test_a_mismatch_is_that_of_the_definition(policy: Policy, task: Task) -> None:
    sampler = make_sampler(policy.model, RolloutConfig(path="ao-int4-weights", lag=0))
    asked = [policy.encode_prompt(task.problem("train", i).question) for i in range(8)]
    out = sampler.sample(policy, Request(asked, 4, 8, u=uniforms(32, 8, 0, (1 << 32) - 2)))
    r = (scores(policy.model, out) - out.logp)[out.mask].double()
    report = measured(sampler, policy, task, path="ao-int4-weights")
    assert report["tokens"] == len(r) and report["mean_abs"] == pytest.approx(float(r.abs().mean()), rel=1e-4)
    assert report["k3_kl"] == pytest.approx(float((r.exp() - 1 - r).mean()), rel=1e-3)
    assert report["k1_kl"] == pytest.approx(float(-r.mean()), abs=1e-6)
    assert report["max_ratio"] == pytest.approx(float(r.max().exp()), rel=1e-4)


def test_a_mismatch_that_rounding_cannot_explain_is_questioned() -> None:
    report = {"tokens": 9.0, "mean_abs": 0.1, "k1_kl": 0.0, "k3_kl": K3_BOUND / 2, "max_ratio": 2.0}
    assert "\n" not in describe(report, RolloutConfig(path="vllm", server="http://x"))
    report["k3_kl"] = 2 * K3_BOUND
    text = describe(report, RolloutConfig(path="vllm", server="http://x"))
    assert "other weights or another tokenizer" in text and "processed_logprobs" in text
    assert "rollout.bits" in describe(report, RolloutConfig())


# ------------------------------------------------------------------ vLLM


class FakeVllm:
    """Answers the sampler's requests to vLLM with a real model: prompts are token ids, weights come from a folder."""

    def __init__(self, folder: Path, served_temperature: float | None = None) -> None:
        self.policy = load_policy(ModelConfig(path=str(folder)), CPU)
        self.policy.model.eval()
        self.temperature = served_temperature
        self.returns_kept = False  # as if started with --return-sampling-mask
        self.requests: list[dict[str, Any]] = []
        self.weight_names: list[set[str]] = []
        self.calls: list[str] = []

    def complete(self, prompt: list[int], asked: dict[str, Any]) -> Completions:
        assert asked["repetition_penalty"] == 1.0
        if self.returns_kept:  # vLLM refuses other requests then
            assert asked["top_k"] > 0 and asked["temperature"] > 0
        assert asked["stop_token_ids"] == self.policy.eos_ids and asked["logprobs"] == 0
        self.requests.append(asked)
        n, length = asked["n"], asked["max_tokens"]
        u = uniforms(n, length, asked.get("seed", 0), 0) if asked["temperature"] else None
        temperature = self.temperature or asked["temperature"] or 1.0
        truncation = {name: asked[name] for name in ("top_p", "top_k", "min_p")}
        return sample(self.policy, Request([prompt], n, length, u=u, temperature=temperature, **truncation))

    def reload(self, folder: str) -> None:
        weights = load_file(Path(folder) / "model.safetensors")
        self.weight_names.append(set(weights))
        self.policy.model.load_state_dict(weights)


def kept_of(out: Completions) -> list[list[list[int]]]:
    """The tokens that each token was sampled from, as vLLM's sampling_mask."""
    assert out.support is not None
    tokens, ends = out.support.tokens.tolist(), out.support.offsets.tolist()
    rows = [tokens[start:end] for start, end in itertools.pairwise(ends)]
    length = out.mask.shape[1]
    return [rows[i * length : i * length + n] for i, n in enumerate(out.mask.sum(dim=1).tolist())]


def rows_of(out: Completions) -> Iterator[tuple[list[int], list[float], bool]]:
    for i, mask in enumerate(out.mask):
        n = int(mask.sum())
        yield out.targets[i, :n].tolist(), out.logp[i, :n].tolist(), not bool(out.truncated[i])


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[FakeVllm, str]]:
    fake = FakeVllm(folder)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "the-model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                fake.calls.append(self.path)
                if self.path == "/v1/completions":
                    assert body["model"] == "the-model" and body["return_token_ids"] is True
                    out = fake.complete(body["prompt"], body)
                    choices = [
                        {
                            "index": i,
                            "text": "decoded otherwise",
                            "token_ids": tokens,
                            "logprobs": {"token_logprobs": logp},
                            "finish_reason": "stop" if ended else "length",
                        }
                        for i, (tokens, logp, ended) in enumerate(rows_of(out))
                    ]
                    self.answer({"choices": choices[::-1]})
                elif self.path == "/inference/v1/generate" and fake.returns_kept:
                    assert body["model"] == "the-model"
                    out = fake.complete(body["token_ids"], body["sampling_params"])
                    choices = [
                        {
                            "index": i,
                            "token_ids": tokens,
                            "logprobs": {
                                "content": [
                                    {"token_id": t, "logprob": v, "rank": None, "top_logprobs": []}
                                    for t, v in zip(tokens, logp, strict=True)
                                ]
                            },
                            "finish_reason": "stop" if ended else "length",
                            "sampling_mask": kept,
                        }
                        for i, ((tokens, logp, ended), kept) in enumerate(zip(rows_of(out), kept_of(out), strict=True))
                    ]
                    self.answer({"choices": choices[::-1]})
                elif self.path == "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    fake.reload(body["kwargs"]["weights_path"])
                    self.answer({"results": [None]})
                elif self.path == "/reset_prefix_cache":
                    self.answer(None)
                else:
                    self.send_error(404)

        def answer(self, value: object) -> None:
            data = b"" if value is None else json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield fake, f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_server_samples_by_token_ids_with_its_own_logp(policy: Policy, server: tuple[FakeVllm, str]) -> None:
    fake, url = server
    sampler = make_sampler(policy.model, RolloutConfig(path="vllm", server=url, lag=0))
    out = sampler.sample(policy, Request(prompts(policy), 4, 9, u=uniforms(12, 9, 1, 2), temperature=0.7))
    assert [asked["n"] for asked in fake.requests] == [4] * 3 and len({a["seed"] for a in fake.requests}) == 3
    torch.testing.assert_close(out.logp, scores(policy.model, out, 0.7) * out.mask, rtol=0, atol=1e-4)
    width = max(map(len, prompts(policy)))
    for i, prompt in enumerate(prompts(policy)):
        for row in range(4 * i, 4 * i + 4):
            assert out.tokens[row, :width][out.attention_mask[row, :width] == 1].tolist() == prompt
    ids = policy.eos_ids
    for mask, targets, truncated in zip(out.mask, out.targets, out.truncated, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and (targets[n - 1].item() in ids) != bool(truncated)
    assert out.texts[0] == policy.decode(out.targets[0][out.mask[0]].tolist())
    again = sampler.sample(policy, Request(prompts(policy), 4, 9, u=uniforms(12, 9, 1, 2), temperature=0.7))
    assert torch.equal(again.tokens, out.tokens)
    greedy = sampler.sample(policy, Request(prompts(policy), 1, 5, u=None))
    assert torch.equal(greedy.tokens, sample(policy, Request(prompts(policy), 1, 5, u=None)).tokens)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_server_gets_plain_weights_and_only_when_it_needs_them(
    folder: Path, server: tuple[FakeVllm, str], lora: int | None
) -> None:
    from alp_kernels import attach

    fake, url = server
    policy = load_policy(ModelConfig(path=str(folder), lora=lora), CPU)
    names = {name for name, _ in load_policy(ModelConfig(path=str(folder)), CPU).model.named_parameters()}
    attach(policy.model, 1e-2)
    config = RolloutConfig(path="vllm", server=url, lag=1)
    sampler = make_sampler(policy.model, config)
    u = uniforms(6, 5, 0, 0)
    sampler.sample(policy, Request(prompts(policy), 2, 5, u=u))
    sampler.sample(policy, Request(prompts(policy), 2, 5, u=u))
    assert fake.weight_names == [names], "sigma is no part of the model; weights that are there are not sent again"
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    sampler.push(policy.model)
    lagging = sampler.sample(policy, Request(prompts(policy), 2, 5, u=u))
    now = make_sampler(policy.model, dataclasses.replace(config, lag=0)).sample(
        policy, Request(prompts(policy), 2, 5, u=u)
    )
    assert torch.allclose(now.logp, scores(policy.model, now) * now.mask, atol=1e-4)
    assert not torch.allclose(lagging.logp, scores(policy.model, lagging) * lagging.mask, atol=1e-2)
    assert torch.equal(sampler.sample(policy, Request(prompts(policy), 2, 5, u=u)).logp, lagging.logp), (
        "an evaluation between"
    )
    assert fake.calls.count("/collective_rpc") == fake.calls.count("/reset_prefix_cache") == 3


def test_a_server_of_another_temperature_is_questioned(
    policy: Policy, task: Task, server: tuple[FakeVllm, str]
) -> None:
    fake, url = server
    config = RolloutConfig(path="vllm", server=url, lag=0, temperature=0.5)
    sampler = make_sampler(policy.model, config)
    report = measured(sampler, policy, task, path="vllm", server=url, temperature=0.5)
    assert report["k3_kl"] < 1e-6 and "\n" not in describe(report, config)
    fake.temperature = 1.5
    report = measured(sampler, policy, task, path="vllm", server=url, temperature=0.5)
    assert "processed_logprobs" in describe(report, config)


TRUNCATED: dict[str, Any] = {"top_p": 0.8, "top_k": 7, "min_p": 0.01, "temperature": 0.7}


def test_a_server_returns_the_tokens_it_kept(policy: Policy, task: Task, server: tuple[FakeVllm, str]) -> None:
    fake, url = server
    fake.returns_kept = True
    config = RolloutConfig(path="vllm", server=url, lag=0, **TRUNCATED)
    sampler = make_sampler(policy.model, config)
    out = sampler.sample(policy, Request(prompts(policy), 4, 9, u=uniforms(12, 9, 1, 2), **TRUNCATED))
    assert {path for path in fake.calls if "v1" in path} == {"/inference/v1/generate"}
    assert out.support is not None and out.support.tokens.dtype == torch.int32
    assert torch.equal(out.support.counts > 0, out.mask.flatten()) and out.support.counts.max() <= 7
    experience = Experience(out, torch.zeros(12), torch.arange(12), None)
    torch.testing.assert_close(training_logp(policy.model, experience, 0.7, 5)[out.mask], out.logp[out.mask], **CLOSE)
    fault = (scores(policy.model, out, 0.7) - out.logp)[out.mask].exp()
    assert fault.mean() < 0.9, "over the whole vocabulary"
    report = measured(sampler, policy, task, path="vllm", server=url, **TRUNCATED)
    assert report["k3_kl"] < 1e-6 and report["tokens"] > 32
    assert {name: fake.requests[-1][name] for name in TRUNCATED} == TRUNCATED, "measured as the run samples"
    # evaluations: greedy decoding keeps one token, other requests get the run's top_k, none asks for supports
    fake.calls.clear()
    greedy = sampler.sample(policy, Request(prompts(policy), 1, 5, u=None))
    assert torch.equal(greedy.tokens, sample(policy, Request(prompts(policy), 1, 5, u=None)).tokens)
    free = sampler.sample(policy, Request(prompts(policy), 2, 5, u=uniforms(6, 5, 0, 0)))
    assert fake.requests[-1]["top_k"] == 7 and fake.requests[-1]["top_p"] == 1.0
    assert greedy.support is None is free.support and set(fake.calls) == {"/v1/completions"}


CLOSE: dict[str, float] = {"rtol": 0, "atol": 1e-4}
KEPT = {
    "index": 0,
    "token_ids": [4, 5],
    "logprobs": {"content": [{"token_id": 4, "logprob": -0.5}, {"token_id": 5, "logprob": -1}]},
    "finish_reason": "length",
    "sampling_mask": [[9, 4], [5]],
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling_mask": None}, "start it with --return-sampling-mask --logprobs-mode processed_logprobs"),
        ({"sampling_mask": [[9, 4]]}, "not among those it kept"),
        ({"sampling_mask": [[9, 4], [6]]}, "not among those it kept"),
        ({"sampling_mask": [[9, 4], [5, 1 << 40]]}, "kept token 1099511627776, but the model has"),
        ({"sampling_mask": [[-1, 4], [5]]}, "kept token -1, but the model has"),
        *[({"sampling_mask": value}, "one list of token ids per token") for value in (3, [4, 5], [[4], ["5"]], {})],
        *[({"logprobs": {"content": value}}, "among token_logprobs") for value in ([{"logprob": "x"}, {}], [[], {}])],
        ({"logprobs": {"content": [{}, {"logprob": -1}]}}, "1 of 2 log-probabilities as null"),
        ({"logprobs": {"token_logprobs": [-0.5, -1]}}, "lacks 'content'"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_an_answer_whose_kept_tokens_do_not_fit_is_named(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    answers: dict[str, Any] = {"/v1/models": {"data": [{"id": "the-model"}]}}
    answers["/inference/v1/generate"] = json.loads(json.dumps({"choices": [KEPT]}))
    monkeypatch.setattr(vllm._Server, "_call", lambda _, path, body=None: answers.get(path))
    monkeypatch.setattr(vllm, "_connections", {})
    sampler = make_sampler(policy.model, RolloutConfig(path="vllm", server="http://nowhere", top_k=3))
    request = Request(prompts(policy)[:1], 1, 8, u=uniforms(1, 8, 0, 0), top_k=3)
    support = sampler.sample(policy, request).support
    assert support is not None and support.counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0]
    answers["/inference/v1/generate"] = json.loads(json.dumps({"choices": [KEPT | changes]}))
    with pytest.raises(UserError, match=says) as raised:
        sampler.sample(policy, request)
    assert "\n" not in str(raised.value)


def test_a_server_without_supports_says_how_to_start_it(policy: Policy, server: tuple[FakeVllm, str]) -> None:
    _, url = server
    sampler = make_sampler(policy.model, RolloutConfig(path="vllm", server=url, lag=0, top_k=3))
    with pytest.raises(UserError, match=r"(?s)generate answers 404.*--return-sampling-mask.*--enable-scale-out"):
        sampler.sample(policy, Request(prompts(policy), 2, 5, u=uniforms(6, 5, 0, 0), top_k=3))


def test_servers_that_cannot_serve_say_why(
    policy: Policy, server: tuple[FakeVllm, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = server
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        make_sampler(policy.model, RolloutConfig(path="vllm", server="http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"and rollout.path vllm"):
        TrainConfig(rollout=RolloutConfig(server=url))
    backend: Any = vllm.connect(url)
    with pytest.raises(UserError, match=r"404.*VLLM_SERVER_DEV_MODE=1"):
        backend._call("/not/there", {})
    monkeypatch.setattr(backend, "_call", lambda *_: {"choices": [{"index": 0, "text": "x"}]})
    with pytest.raises(UserError, match=r"lacks 'token_ids'; it needs a vLLM that supports return_token_ids"):
        backend.generate([[1]], [{}])


FITS = {"index": 0, "token_ids": [4, 5], "logprobs": {"token_logprobs": [-0.5, -1]}, "finish_reason": "length"}

ANSWERS = [
    *[(answer, "'choices'") for answer in (None, [], {}, "ok", 3, {"choices": None})],
    *[({"choices": answer}, "choices=.*needs a list") for answer in ({}, "ok", 3)],
    *[({"choices": [answer]}, "lacks 'index'") for answer in (None, [], "ok", 3, {})],
    *[(FITS | {"index": value}, "index") for value in (None, "0", True)],
    *[
        (FITS | {"token_ids": value}, "token_ids")
        for value in (None, "4 5", 4, {}, ["4", 5], [4, None], [4.0, 5], [True])
    ],
    *[(FITS | {"logprobs": value}, "logprobs") for value in (None, [-0.5, -1], 3, {}, {"token_logprobs": None})],
    *[
        (FITS | {"logprobs": {"token_logprobs": value}}, "token_logprobs")
        for value in (-1, "x", ["-0.5", -1], [[-1]], [{}])
    ],
    *[(FITS | {"finish_reason": value}, "finish_reason") for value in (None, 3, ["stop"])],
    *[(FITS | {"token_ids": value}, "unequal numbers") for value in ([4], [], [4, 5, 6])],
    (FITS | {"token_ids": [4] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}}, "more tokens than requested"),
    *[(FITS | {"token_ids": [4, value]}, f"returned token {value}, but the model has") for value in (1 << 40, -1)],
    ({"choices": []}, "returned 0 of 1 completions"),
    ({"choices": [FITS, FITS]}, "returned 2 of 1 completions"),
    *[
        (
            FITS | {"logprobs": {"token_logprobs": value}},
            f"returned {count} of 2 log-probabilities as null.* token {t} of",
        )
        for value, count, t in (
            ([None, -0.1], 1, 0),
            ([-0.1, None], 1, 1),
            ([None, None], 2, 0),
            ([-0.1, float("nan")], 1, 1),
            ([float("-inf"), -0.1], 1, 0),
            ([-0.1, -9999.0], 1, 1),
        )
    ],
]
"""What a server may answer to a request for one completion of at most 8 tokens, and what the error says."""


@pytest.mark.parametrize(("answer", "says"), ANSWERS, ids=lambda value: repr(value)[:60])
def test_an_answer_that_does_not_fit_is_named(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, answer: Any, says: str
) -> None:
    answer = {"choices": [answer]} if isinstance(answer, dict) and "index" in answer else answer
    answers = {"/v1/models": {"data": [{"id": "the-model"}]}, "/v1/completions": json.loads(json.dumps(answer))}
    monkeypatch.setattr(vllm._Server, "_call", lambda _, path, body=None: answers.get(path))
    monkeypatch.setattr(vllm, "_connections", {})
    sampler = make_sampler(policy.model, RolloutConfig(path="vllm", server="http://nowhere"))
    with pytest.raises(UserError, match=says) as raised:
        sampler.sample(policy, Request(prompts(policy)[:1], 1, 8, u=uniforms(1, 8, 0, 0)))
    assert "\n" not in str(raised.value)


def test_an_answer_of_whole_numbers_fits(
    policy: Policy, server: tuple[FakeVllm, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = server
    backend: Any = vllm.connect(url)
    monkeypatch.setattr(backend, "_call", lambda *_: {"choices": [FITS]})
    assert backend.generate([[1]], [{}]) == [[vllm.Sampled([4, 5], [-0.5, -1.0], False)]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>hello</html>", r"v1/models answers '<html>.*needs JSON"),
        (b"\xff\xfe", "needs JSON"),
        (b"", "lacks 'data'"),
        (b"null", "lacks 'data'"),
        (b"[]", "lacks 'data'"),
        (b'{"data": 3}', "data=3; it needs a list"),
        (b'{"data": []}', "names no model"),
        (b'{"data": [{}]}', "lacks 'id'"),
        (b'{"data": ["x"]}', "lacks 'id'"),
        (None, "cannot be reached"),
    ],
)
def test_a_server_that_is_none_of_vllm_is_named(policy: Policy, body: bytes | None, says: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(9 if body is None else len(body)))  # None: it hangs up early
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        with pytest.raises(UserError, match=says):
            make_sampler(policy.model, RolloutConfig(path="vllm", server=f"http://127.0.0.1:{httpd.server_address[1]}"))
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@pytest.mark.parametrize("masks", ["none", "nested", "flat"])
def test_vllm_in_this_process_is_asked_the_same(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch, masks: str
) -> None:
    fake = FakeVllm(folder)
    fake.returns_kept = masks != "none"

    def answers(out: Completions) -> Iterator[tuple[tuple[list[int], list[float], bool], Any]]:
        all_kept = kept_of(out) if fake.returns_kept else [[]] * len(out.mask)
        for row, kept in zip(rows_of(out), all_kept, strict=True):
            nested = SimpleNamespace(token_ids=kept)
            flat = SimpleNamespace(token_ids=list(itertools.chain(*kept)))
            flat.offsets = [0, *itertools.accumulate(map(len, kept))]
            yield row, {"none": None, "nested": nested, "flat": flat}[masks]

    class LLM:
        def __init__(self, **options: Any) -> None:
            assert options["model"] == str(folder) and options["logprobs_mode"] == "processed_logprobs"
            assert options["dtype"] == "float32"
            assert options.get("return_sampling_mask", False) is fake.returns_kept

        def generate(self, asked: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[Any]:
            return [
                SimpleNamespace(
                    outputs=[
                        SimpleNamespace(
                            token_ids=tuple(tokens),
                            logprobs=[{t: SimpleNamespace(logprob=v)} for t, v in zip(tokens, logp, strict=True)],
                            finish_reason="stop" if ended else "length",
                            sampling_mask=mask,
                        )
                        for (tokens, logp, ended), mask in answers(fake.complete(one["prompt_token_ids"], vars(some)))
                    ]
                )
                for one, some in zip(asked, params, strict=True)
            ]

        def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
            assert method == "reload_weights"
            fake.reload(kwargs["weights_path"])

        def reset_prefix_cache(self) -> None:
            fake.calls.append("reset")

    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace, __spec__=object())
    )  # type: ignore[arg-type]
    monkeypatch.setattr(vllm, "_connections", {})
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(0.5)
    truncation: dict[str, Any] = {} if masks == "none" else {"top_p": 0.8, "top_k": 7}
    sampler = make_sampler(policy.model, RolloutConfig(path="vllm", lag=0, **truncation))
    out = sampler.sample(policy, Request(prompts(policy), 2, 6, u=uniforms(6, 6, 0, 0), **truncation))
    assert (out.support is None) is (masks == "none")
    experience = Experience(out, torch.zeros(6), torch.arange(6), None)
    torch.testing.assert_close(
        training_logp(policy.model, experience, 1.0, None)[out.mask], out.logp[out.mask], **CLOSE
    )
    assert fake.calls == ["reset"]


def test_an_older_vllm_in_this_process_is_named(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(*, model: str, dtype: str, gpu_memory_utilization: float, logprobs_mode: str) -> None:
        raise AssertionError("it was given only what it knows")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=older, __spec__=object()))  # type: ignore[arg-type]
    monkeypatch.setattr(vllm, "_connections", {})
    with pytest.raises(UserError, match=r"need vLLM 0\.28 or later.*return_sampling_mask"):
        make_sampler(policy.model, RolloutConfig(path="vllm", lag=0, top_k=3))


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    ("path", "lora", "truncation"),
    [
        ("vllm", None, {}),
        ("vllm", 4, {}),
        ("ao-int8", 4, {}),
        ("vllm", None, {"top_p": 0.8, "top_k": 7}),
        ("ao-int8-weights", None, {"min_p": 0.1}),
    ],
)
def test_a_run_trains_against_the_sampler_and_records_its_mismatch(
    folder: Path,
    tmp_path: Path,
    server: tuple[FakeVllm, str],
    capsys: pytest.CaptureFixture[str],
    path: Any,
    lora: int | None,
    truncation: dict[str, Any],
) -> None:
    fake, url = server
    fake.returns_kept = bool(truncation)
    config = TrainConfig(
        task=TaskConfig(path=write_sums(tmp_path / "sums.jsonl")),
        model=ModelConfig(path=str(folder), lora=lora),
        rollout=RolloutConfig(
            path=path,
            server=url if path == "vllm" else None,
            prompts=4,
            samples=2,
            lag=1,
            max_new_tokens=5,
            **truncation,
        ),
        update=UpdateConfig(lr=1e-2, minibatches=2, normalise_std=False),
        steps=2,
        eval_prompts=2,
        diagnose_every=1,
        runs=tmp_path,
        name="x",
        device="cpu",
    )
    out = train(config)
    measured = json.loads((out / "mismatch.json").read_text())
    assert measured["k3_kl"] < (1e-6 if path == "vllm" else 0.01) and measured["tokens"] > 32
    assert f"sampler {path} against the training path, same weights" in capsys.readouterr().out
    metrics = read_metrics(out / "metrics.jsonl")
    assert metrics[0]["mismatch/k3_kl"] < (1e-6 if path == "vllm" else 0.01)
    assert not any("sigma" in name or "lora" in name for names in fake.weight_names for name in names)
