"""Train a small decoder with a vocabulary of 32768 tokens, for loss-head rows that are a language model's.

`python -m bench.decoder OUT` learns a byte-level BPE and a decoder from the Python sources and documentation on the
machine, then saves hidden states of held-out text and the output embedding. The text stays where it is: OUT holds
tensors and numbers only. On one machine, with the same packages and number of threads, the seed decides every bit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alp_kernels import linear_logprob

from .rows import Profile, Rows, sharpened, table

SUFFIXES = (".py", ".md", ".rst", ".txt")
LARGEST_FILE = 256 * 2**10  # bytes; longer ones are mostly tables
PACKAGES = ("torch", "transformers", "tokenizers")
END = "<end>"  # after each file


@dataclass(frozen=True)
class Config:
    text_mib: int = 48
    held_out: int = 50  # one file of so many is not trained on
    vocab: int = 32768
    channels: int = 256
    layers: int = 4
    length: int = 256  # tokens a window
    windows: int = 4  # a step
    steps: int = 1000
    warmup: int = 20  # steps
    held_out_windows: int = 64
    rows: int = 2048  # hidden states saved, spread evenly over the held-out windows
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return what a learning rate is multiplied by: it rises, stays, and falls to 0 in the last 40 % of the steps."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (0.4 * self.steps))


# ------------------------------------------------------------------ text


def texts(config: Config) -> list[str]:
    """Read the standard library and the installed packages, in an order that the seed decides, up to `text_mib`."""
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")})
    paths = sorted({path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()})
    random.Random(config.seed).shuffle(paths)
    found, left = [], config.text_mib * 2**20
    for path in paths:
        size = path.stat().st_size
        if 0 < size <= min(left, LARGEST_FILE):
            found.append(path.read_text(encoding="utf-8", errors="ignore"))
            left -= size
    return found


def tokenised(config: Config) -> tuple[Tensor, Tensor]:
    """Learn the BPE from the training files; return their tokens and the held-out files', each one long row."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    every = texts(config)
    held_out, training = every[:: config.held_out], [t for i, t in enumerate(every) if i % config.held_out]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        training,
        trainers.BpeTrainer(
            vocab_size=config.vocab, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    assert tokenizer.get_vocab_size() == config.vocab, f"{tokenizer.get_vocab_size()} tokens: there is too little text"

    def tokens(part: list[str]) -> Tensor:
        encoded = tokenizer.encode_batch_fast([text + END for text in part])
        return torch.tensor(list(itertools.chain.from_iterable(e.ids for e in encoded)))

    return tokens(training), tokens(held_out)


# ------------------------------------------------------------------ decoder


def decoder(config: Config) -> Any:
    """Make a Qwen2 with heads of 64 channels whose logits and layers' outputs start at zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = max(1, config.channels // 64)
    shape = Qwen2Config(
        vocab_size=config.vocab, hidden_size=config.channels, intermediate_size=3 * config.channels,
        num_hidden_layers=config.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=config.length, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    nn.init.normal_(model.get_input_embeddings().weight)
    for name, weight in model.named_parameters():
        if name.endswith(("lm_head.weight", "o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
    return model


def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """Map (B, T) tokens to (B, T, D): bfloat16 products, float32 between them."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.model(tokens, use_cache=False).last_hidden_state


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Make Muon for the layers' matrices and Adam for the rest."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = [p for p in model.model.layers.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": [embedding], "lr": 0.02}, {"params": [head, *vectors], "lr": 0.003}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0), adam]


def train(model: Any, tokens: Tensor, config: Config) -> Iterator[tuple[int, float]]:
    """Take one step after another on random windows; yield each with its loss in nats a token, before the step."""
    weight = model.get_output_embeddings().weight
    every = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate) for optimizer in every]
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        starts = torch.randint(len(tokens) - config.length, (config.windows, 1), generator=generator)
        windows = tokens[starts + torch.arange(config.length + 1)]
        hidden = hidden_states(model, windows[:, :-1])
        logp, _ = linear_logprob(hidden.bfloat16(), weight.bfloat16(), windows[:, 1:])
        loss = -logp.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(every, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        yield step, loss.item()


@torch.no_grad()
def held_out_rows(model: Any, tokens: Tensor, config: Config) -> tuple[Rows, float]:
    """Return rows of windows spread evenly over the held-out text, and the loss of all positions in those windows."""
    starts = torch.linspace(0, len(tokens) - config.length - 1, config.held_out_windows).long()[:, None]
    windows = tokens[starts + torch.arange(config.length + 1)]
    parts = [hidden_states(model, part).float().flatten(0, 1) for part in windows[:, :-1].split(config.windows)]
    weight = model.get_output_embeddings().weight.detach()
    whole = Rows(torch.cat(parts), weight, windows[:, 1:].flatten())
    logp, _ = linear_logprob(whole.hidden, whole.weight, whole.targets)
    chosen = slice(None, None, len(whole.hidden) // config.rows)
    return Rows(whole.hidden[chosen].clone(), weight, whole.targets[chosen].clone()), -float(logp.mean())


# ------------------------------------------------------------------ file


def save(path: Path, config: Config) -> None:
    """Train, and save the rows with where they come from; print the loss on the way."""
    torch.manual_seed(config.seed)
    training, held_out = tokenised(config)
    print(f"{len(training)} tokens to train on, {len(held_out)} held out", flush=True)
    model = decoder(config)
    start = time.perf_counter()
    for step, loss in train(model, training, config):
        if step % 50 == 0 or step == config.steps - 1:
            print(f"step {step}: {loss:.3f} nats a token, {time.perf_counter() - start:.0f} s", flush=True)
    rows, loss = held_out_rows(model, held_out, config)
    about = {
        "config": asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "training_tokens": len(training),
        "held_out_loss": loss,
    }
    print(json.dumps(about, indent=1))
    torch.save(rows._asdict() | about, path)


def load(path: str | Path) -> Rows:
    """Read the float32 rows that `save` wrote; the targets are the tokens that followed in the text."""
    saved = torch.load(path, weights_only=True)
    return Rows(*(saved[name] for name in Rows._fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    path = parser.parse_args().out
    save(path, Config())
    rows = load(path)
    profiles = {"held-out text, temperature 1": Profile.of(rows)}
    for entropy in (1.0, 0.3):
        sharper, temperature = sharpened(rows, entropy)
        profiles[f"the same, temperature {temperature:.2f}"] = Profile.of(sharper)
    print(table(profiles))


if __name__ == "__main__":
    main()
