"""Hugging Face models and data in their published formats: chat templates, benchmark files, adapters, 16 bits."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alp import train as loop
from alp.config import ModelConfig, RolloutConfig, TaskConfig, TrainConfig, UpdateConfig
from alp.errors import UserError
from alp.measures.benchmark import _problems, evaluate_on
from alp.measures.settings import EvalConfig
from alp.policy.adapters import snapshot
from alp.policy.load import load_policy
from alp.policy.merge import served, strip
from alp.policy.models import Policy
from alp.ranks.world import World
from alp.rollout import Request, sample, uniforms
from alp.runs.files import read_metrics
from alp.runs.folder import Run
from alp.sampling.in_process import InProcessSampler
from alp.setup import make_task
from alp.tasks.files import read_jsonl, read_problems, read_record
from alp.tasks.math import verify
from alp.update import Experience, Updater, training_logp
from tests.support.compare import likely_order_bound
from tests.support.tiny_models import CHAT, DROPS_SYSTEM, NO_SYSTEM, write_lines, write_llama, write_sums
from tests.support.updates import step_gradients

CPU = torch.device("cpu")
train = functools.partial(loop.train, with_plots=False)  # plots take most of a small run's time


def load(folder: Path, **changes: Any) -> Policy:
    torch.manual_seed(5)
    return load_policy(ModelConfig(path=str(folder), **changes), CPU)


# ------------------------------------------------------------------ chat templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT, "<system>Be brief.\n<user>2+2?\n<assistant>"),
        (NO_SYSTEM, "<user>Be brief.\n\n2+2?\n<assistant>"),
        (DROPS_SYSTEM, "<user>Be brief.\n\n2+2?\n<assistant>"),
        (None, "Be brief.\n\n2+2?"),
    ],
)
def test_the_system_prompt_reaches_the_model_whatever_its_template(
    tmp_path: Path, template: str | None, expected: str
) -> None:
    policy = load(write_llama(tmp_path, template=template))._replace(system="Be brief.")
    assert policy.decode(policy.encode_prompt("2+2?")) == expected
    plain = policy._replace(system=None)
    assert plain.decode(plain.encode_prompt("2+2?")) == ("2+2?" if template is None else "<user>2+2?\n<assistant>")


def test_a_template_that_breaks_on_every_message_says_so(tmp_path: Path) -> None:
    policy = load(write_llama(tmp_path, template="{{ raise_exception('no') }}"))._replace(system="s")
    with pytest.raises(UserError, match="chat template rejects a question: no"):
        policy.encode_prompt("2+2?")


# ------------------------------------------------------------------ benchmark files


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        # MATH-500: the answer field wins over the solution's box, which writes the same value differently
        ({"problem": "p", "solution": r"so \boxed{\frac12}", "answer": r"\frac{1}{2}", "level": 5}, r"\frac{1}{2}"),
        ({"problem": "p", "solution": r"so \boxed{7}", "answer": "", "subject": "Algebra"}, "7"),
        ({"problem": "p", "solution": r"first \boxed{1}, then \boxed{2}", "type": "Minerva"}, "2"),
        ({"id": 60, "problem": "p", "answer": 204, "url": "u"}, "204"),
        ({"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": "073"}, "073"),
        ({"question": "p", "final_answer": ["$2$", "$-3$"], "solution": ["long"], "unit": "m"}, "2, -3"),
        ({"question": "p", "final_answer": [r"$\frac{3}{4}$"], "answer_type": "Numerical"}, r"\frac{3}{4}"),
        ({"question": "p", "answer": "6*7=<<6*7=42>>42\n#### 42"}, "42"),
        ({"problem": "p", "answer": r"The answer is $\boxed{4.5e33}$"}, "4.5e33"),
        ({"question": "p", "answer": 2.5}, "2.5"),
    ],
)
def test_benchmark_records_load_as_their_owners_write_them(record: dict[str, Any], answer: str) -> None:
    assert read_record(record) == ("p", answer)


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("073", r"\boxed{73}", True),
        ("2, -3", r"\boxed{-3, 2}", True),
        ("2, -3", r"\boxed{2}", False),
        ("3", r"\boxed{3 \text{ m/s}}", True),
        (r"5 \text{ cm}", r"\boxed{5}", True),
        ("4.5e33", r"\boxed{4.5 \times 10^{33}}", True),
        (r"3 \times 10^8", r"\boxed{3e8}", True),
        ("1e-07", r"\boxed{0.0000001}", True),
        ("3e8", r"\boxed{3e7}", False),
    ],
)
def test_answers_compare_across_order_units_and_powers_of_ten(gold: str, completion: str, right: bool) -> None:
    assert verify(gold, completion).correct is right


def test_named_columns_win_and_missing_ones_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"ask": "p", "problem": "other", "key": 4, "answer": 5})
    (line,) = read_problems(path, ("question=ask", "answer=key")).train
    assert line == ("p", "4")
    with pytest.raises(UserError, match=r"d\.jsonl:1: has no column 'kay'.*did you mean 'key'"):
        read_problems(path, ("answer=kay",))
    with pytest.raises(UserError, match=r"'questoin' is not one of .*did you mean 'question'"):
        read_problems(path, ("questoin=ask",))


def test_a_json_list_is_read_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "aime.json"
    path.write_text(json.dumps([{"problem": "a", "answer": 1}, {"problem": "b", "answer": "02"}], indent=1))
    assert read_jsonl(path) == [("a", "1"), ("b", "02")]
    path.write_text('[{"problem": "a", "answer": 1}, {"problem": "b"}]')
    with pytest.raises(UserError, match=r"aime\.json:2: has the keys"):
        read_jsonl(path)


def test_datasets_come_from_disk_by_split_and_by_file(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}?", "answer": i} for i in range(6)]
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": whole.select(range(4)), "test": whole.select([4, 5])}).save_to_disk(tmp_path / "dd")
    whole.save_to_disk(tmp_path / "one")
    whole.to_parquet(tmp_path / "rows.parquet")
    train, test = read_problems(tmp_path / "dd")
    assert [line.answer for line in train] == ["0", "1", "2", "3"]
    assert test is not None and [line.answer for line in test] == ["4", "5"]
    assert read_problems(tmp_path / "dd", ("split=test",)).train == test
    for path in (tmp_path / "one", tmp_path / "rows.parquet"):
        lines, held_out = read_problems(path)
        assert len(lines) == 6 and held_out is None
    task = make_task(TaskConfig(path=tmp_path / "dd"), seed=0)
    assert {task.problem("eval", i).question for i in range(4)} == {"4?", "5?"}
    # an evaluation source with its own splits gives its held-out one; `split` applies to the training data
    apart = TaskConfig(path=tmp_path / "one", eval_path=tmp_path / "dd", options=("split=train",))
    for task in (make_task(apart, seed=0), _problems(str(tmp_path / "dd"), TrainConfig(task=apart))[0]):
        assert {task.problem("eval", i).question for i in range(4)} == {"4?", "5?"}
    with pytest.raises(UserError, match=r"split=tset; .* has train, test; did you mean 'test'"):
        read_problems(tmp_path / "dd", ("split=tset",))


def test_a_name_that_is_no_dataset_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"task.path=nobody/nothing cannot be loaded: "):
        read_problems(Path("nobody/nothing"))
    with pytest.raises(UserError, match=r"no/such/file.jsonl does not exist"):
        read_problems(Path("no/such/file.jsonl"))


# ------------------------------------------------------------------ adapters


def experience(policy: Policy) -> Experience:
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]
    policy.model.eval()
    completions = sample(policy, Request(prompts, 2, 9, u=uniforms(6, 9, seed=1, batch=2)))
    policy.model.train()
    return Experience(completions, torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]), torch.arange(6), None)


def stir(policy: Policy) -> None:
    """Set the adapters as after some training: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def gradients(policy: Policy, **changes: Any) -> dict[str, Tensor]:
    config = dataclasses.replace(UpdateConfig(grad_clip=1e9, sigma=0.05), **changes)
    updater = Updater(policy.model, config, temperature=1.0, seed=11, world=World("cpu"))
    return step_gradients(updater, experience(policy))


def test_adapters_and_sigma_are_trained_and_the_base_is_not(folder: Path) -> None:
    policy = load(folder, lora=4)
    stir(policy)
    grads = gradients(policy)
    assert {name.split(".")[-3] for name in grads if name != "log_sigma"} == {"lora_A", "lora_B"}
    assert len(grads) == 2 * 7 * 2 + 1 and all(g.abs().max() > 0 for g in grads.values())
    # the head is frozen, so its weight gradient is not computed
    assert policy.model.get_output_embeddings().weight.grad is None


def test_fresh_adapters_change_no_logit(folder: Path) -> None:
    tokens = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load(folder).model(tokens).logits, load(folder, lora=4).model(tokens).logits)


@pytest.mark.parametrize("lora", [None, 4])
def test_gradient_checkpointing_changes_no_gradient(folder: Path, lora: int | None) -> None:
    found = []
    for on in (False, True):
        policy = load(folder, lora=lora, gradient_checkpointing=on)
        stir(policy)
        found.append(gradients(policy))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-8)


def test_merged_weights_are_pefts(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, lora=4)
    stir(policy)
    policy.save(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    ).merge_and_unload()
    expected = dict(merged.named_parameters())
    plain = served(policy.model, snapshot(policy.model))
    assert plain.keys() == expected.keys()
    for name, value in plain.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("path", "bound"), [("same", 1e-5), ("bf16", 0.2), ("int8", 0.1)])
def test_every_sampler_samples_from_the_adapted_model(folder: Path, path: Any, bound: float) -> None:
    policy = load(folder, lora=4)
    stir(policy)
    sampler = InProcessSampler(policy.model, RolloutConfig(path=path, bits=8, lag=0))
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=")]
    completions = sampler.sample(policy, Request(prompts, 3, 6, u=uniforms(6, 6, 0, 0)))
    rows = Experience(completions, torch.zeros(6), torch.arange(6), None)
    clean = training_logp(policy.model, rows, 1.0, None)
    assert (clean - completions.logp)[completions.mask].abs().mean() < bound
    strip(base := load(folder, lora=4).model)
    apart = training_logp(base, rows, 1.0, None)
    assert (apart - completions.logp)[completions.mask].abs().mean() > 3 * bound, (
        "adapters that do nothing show nothing"
    )


def test_an_adapters_rank_must_be_its_own(folder: Path, tmp_path: Path) -> None:
    load(folder, lora=4).save(tmp_path)
    with pytest.raises(UserError, match=r"model.lora=8; the adapter of .* has rank 4"):
        load(tmp_path, lora=8)
    with pytest.raises(UserError, match=r"a model.path: adapters need a base"):
        TrainConfig(model=ModelConfig(lora=4))


def run(folder: Path, sums: Path, runs: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        task=TaskConfig(path=sums, system="Add."),
        model=ModelConfig(path=str(folder), lora=4),
        rollout=RolloutConfig(prompts=4, samples=2, max_new_tokens=5, bits=8),
        update=UpdateConfig(lr=1e-2, minibatches=2, sigma_lr=1e-2, normalise_std=False),
        steps=4,
        eval_prompts=2,
        checkpoint_every=2,
        diagnose_every=2,
        runs=runs,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def test_a_run_with_adapters_resumes_bit_for_bit_and_its_adapter_loads(folder: Path, tmp_path: Path) -> None:
    sums = write_sums(tmp_path / "sums.jsonl")
    whole = train(run(folder, sums, tmp_path, name="whole"))
    half = train(run(folder, sums, tmp_path, name="half", steps=2))
    (half / "config.json").write_text(run(folder, sums, tmp_path, name="half").to_json())
    train(TrainConfig(), resume=half)
    states = [Run(path).load_checkpoint(CPU) for path in (whole, half)]
    assert states[0] is not None and states[1] is not None
    assert all(f".lora_{which}." in name for name in states[0]["model"] for which in name.split("lora_")[1][:1])
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert all(torch.equal(states[1]["model"][name], value) for name, value in states[0]["model"].items())
    assert torch.equal(states[0]["noise"]["log_sigma"], states[1]["noise"]["log_sigma"])
    figures = [
        [
            {k: v for k, v in m.items() if not k.endswith("_s") and k != "peak_mib"}
            for m in read_metrics(p / "metrics.jsonl")
        ]
        for p in (whole, half)
    ]
    assert figures[0] == figures[1]
    assert (whole / "model" / "adapter_config.json").is_file() and not (whole / "model" / "model.safetensors").exists()
    again = load(whole / "model")
    trained = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert trained.keys() == states[0]["model"].keys()
    assert all(torch.equal(p, states[0]["model"][name]) for name, p in trained.items())
    table = evaluate_on(str(whole), TrainConfig(), EvalConfig(on=(str(sums),), samples=2))
    assert table["sums"]["problems"] == 24


# ------------------------------------------------------------------ 16 bits, attention


def test_sixteen_bit_training_keeps_sigma_in_32_and_reports_the_noise_that_arrived(
    folder: Path, tmp_path: Path
) -> None:
    sums = write_sums(tmp_path / "sums.jsonl")
    realised = {}
    for scale, sigma in (("absolute", 1e-4), ("rms", 1e-2)):
        update = UpdateConfig(minibatches=2, sigma=sigma, scale=scale)  # type: ignore[arg-type]
        model = ModelConfig(path=str(folder), dtype="bfloat16")
        config = run(folder, sums, tmp_path, name=scale, model=model, update=update, steps=2)
        out = train(config)
        realised[scale] = read_metrics(out / "metrics.jsonl")[-1]["realised_noise"]
        state = Run(out).load_checkpoint(CPU)
        assert state is not None and state["noise"]["log_sigma"].dtype == torch.float32
        assert state["model"]["lm_head.weight"].dtype == torch.bfloat16
    # bfloat16's step is larger than noise of 1e-4 on the residual stream, so most of that noise is rounded away
    assert all(abs(value - 1) < 0.1 for value in realised["rms"])
    assert any(abs(value - 1) > 0.2 for value in realised["absolute"])


def test_eager_attention_makes_the_gradient_of_sdpa(folder: Path) -> None:
    found = [gradients(load(folder, attn_implementation=name)) for name in ("sdpa", "eager")]
    bound = likely_order_bound(
        2 * (2 * (4 * 32 + 3 * 64) + 100) + 6 * 20, torch.float32
    )  # roundings of the layers' sums and of a weight gradient's
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= bound * value.abs().max() + 1e-9, name


def test_flash_attention_that_is_not_there_is_refused_in_words(folder: Path) -> None:
    with pytest.raises(UserError, match=r"needs a GPU and flash-attn.*alp-kernels\[flash\]"):
        load(folder, attn_implementation="flash_attention_2", dtype="bfloat16")
    with pytest.raises(UserError, match=r"model.dtype='float32'; it needs bfloat16"):
        TrainConfig(model=ModelConfig(path="x", attn_implementation="flash_attention_2"))
