"""A model with a large vocabulary for the comparison of the sampled backward with the exact one (`--preset sampled`).

    python -m alp.study.wide runs/wide                    make the model
    python -m alp.study.wide runs/wide --of runs/sampled  measure how much is sampled, at the start and in each run

The model is the warmed-up decoder of the other presets. Its vocabulary gains words that no answer has, and they hold 5 % of
each token's probability on average, in a long tail (a Zipf law times log-normal noise). So a policy begins with real mass
below the thresholds, and earns more by taking it away.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from ..config import TrainConfig
from ..errors import UserError
from ..policy.load import load_policy
from ..policy.models import Policy, hidden_states
from ..ranks.world import World
from ..rollout import Request, sample, uniforms
from ..runs.files import write_json
from ..runs.folder import Run
from ..setup import make_policy, make_task
from ..tasks.task import Task, new_tokens
from .presets import PRESETS, THRESHOLDS

VOCAB_SIZE = 1 << 15
MASS = 0.05
"""Mean probability of all added words together."""
_SPREAD = 1.0  # standard deviation of an added word's logits around its rank's, over contexts
_PROBLEMS, _SAMPLES = 64, 4


def make_wide(config: TrainConfig) -> Policy:
    """Warm up the tiny model and add words to its vocabulary; `config.seed` determines both."""
    task = make_task(config.task, config.seed)
    policy = make_policy(config, task, World("cpu"), is_resumed=False)
    return widened(policy, answer_states(policy, task, new_tokens(config, policy, task)))


@torch.no_grad()
def widened(policy: Policy, states: Tensor) -> Policy:
    """The policy with a vocabulary of VOCAB_SIZE; states (n, D) are hidden states of its answers. Uses torch's seed."""
    head, old = policy.model.get_output_embeddings(), len(policy.tokenizer)
    centre, num_words = states.mean(dim=0), VOCAB_SIZE - old
    spread = torch.randn(num_words, states.shape[1]) * (_SPREAD / float(states.square().sum(dim=1).mean().sqrt()))
    ranks = torch.arange(1, num_words + 1).log()
    along = centre / centre.square().sum()
    before, noise, height = (states @ head.weight.T).logsumexp(dim=1), states @ spread.T, states @ along
    low, high = -100.0, 100.0
    while high - low > 1e-6:  # the level at which the words have the mass
        level = (low + high) / 2
        words = (height[:, None] * (level - ranks) + noise).logsumexp(dim=1)
        low, high = (low, level) if float((words - before).sigmoid().mean()) > MASS else (level, high)
    policy.model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    policy.model.get_output_embeddings().weight[old:] = (low - ranks)[:, None] * along + spread
    read = policy.model.get_input_embeddings().weight
    read[old:] = torch.randn(num_words, read.shape[1]) * read[:old].std()
    backend = json.loads(policy.tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {f"<word {i}>": i for i in range(old, VOCAB_SIZE)}
    policy.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return policy


@torch.no_grad()
def answer_states(policy: Policy, task: Task, length: int) -> Tensor:
    """(n, D): hidden states that predict the tokens of sampled answers to evaluation problems."""
    prompts = [policy.encode_prompt(task.problem("eval", i).question) for i in range(_PROBLEMS)]
    out = sample(policy, Request(prompts, _SAMPLES, length, u=uniforms(_PROBLEMS * _SAMPLES, length, 0, 0)))
    return hidden_states(policy.model, out.tokens, out.attention_mask, out.mask.shape[1])[out.mask]


@torch.no_grad()
def small_mass(policy: Policy, states: Tensor) -> dict[str, list[float]]:
    """By threshold 2^-n: a token's mean probability below it, and the share of tokens with more of it than the threshold."""
    p = policy.model.get_output_embeddings()(states).double().softmax(dim=-1)
    mass = {tau: torch.where(p < tau, p, 0.0).sum(dim=1) for tau in THRESHOLDS}
    return {f"2^{math.log2(tau):.0f}": [float(m.mean()), float((m > tau).double().mean())] for tau, m in mass.items()}


def measure(folder: Path, grid: Path, config: TrainConfig) -> dict[str, dict[str, list[float]]]:
    """`small_mass` of the model in `folder`, and of each run of the comparison by ARM-sSEED@STEP.

    Of the steps before the end, those with a checkpoint are measured; `alp compare` removes a run's when it ends.
    """
    task = make_task(config.task, config.seed)
    policy = load_policy(dataclasses.replace(config.model, path=str(folder)), torch.device("cpu"))
    length = new_tokens(config, policy, task)
    found = {"start": small_mass(policy, answer_states(policy, task, length))}
    for run in sorted(grid.glob("runs/*")):
        states = {int(path.stem): torch.load(path, weights_only=True)["model"] for path in Run(run).checkpoints()}
        states[config.steps] = load_file(run / "model" / "model.safetensors")
        for step, state in states.items():
            policy.model.load_state_dict(state)
            name = f"{run.name}@{step}"
            found[name] = small_mass(policy, answer_states(policy, task, length))
            print(name, found[name], flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alp.study.wide", description="The model of --preset sampled.")
    parser.add_argument("folder", type=Path, help="the model's folder; runs/wide for the preset")
    parser.add_argument("--of", type=Path, metavar="GRID", help="measure this comparison: writes GRID/small-mass.json")
    options = parser.parse_args(arguments)
    config = dataclasses.replace(PRESETS["sampled"].base, runs=options.folder.parent)
    try:
        if options.of is None:
            make_wide(dataclasses.replace(config, model=PRESETS["lag"].base.model)).save(options.folder)
        else:
            write_json(options.of / "small-mass.json", measure(options.folder, options.of, config))
    except UserError as error:
        print(f"alp.study.wide: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.folder if options.of is None else options.of / 'small-mass.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
