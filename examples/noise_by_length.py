"""How far noise of several sizes moves a model's log-probabilities, by the length of the answers.

    python examples/noise_by_length.py
    python examples/noise_by_length.py --model PATH --mismatch 0.02 --markdown
    python examples/noise_by_length.py --dtype bfloat16 --lengths 512 --absolute 0.02 1e-6

The model, by default a small random Qwen2, samples answers. For each size of the noise the table shows the standard
deviation of a token's log-ratio (perturbed over clean, in nats), and of whole answers' ratios the standard deviation,
smallest, largest, and the share outside the clip range. The noise is all that differs: no staleness, no mismatch.

"matched" is what attach(sigma="matched") would do on a sampler whose tokens' log-probabilities differ from the trainer's by
--mismatch nats: at token level, and at sequence level, where the length counts.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, attach, match_sigma, measure_noise

LENGTHS, SEQUENCES, AT_ONCE = (24, 128, 512, 2048), 32, 4
FIXED = [("absolute", 1e-2), ("absolute", 1e-3), ("absolute", 1e-4), ("rms", 1e-2), ("rms", 1e-3)]
TITLES = ("sigma", "tokens", "token sd", "ratio sd", "min", "max", "outside")


def load(path, dtype):
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    torch.manual_seed(0)
    size = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**size, **heads, max_position_embeddings=4096)).to(getattr(torch, dtype)).eval()


@torch.no_grad()
def sample(model, num_tokens):
    """Answers (SEQUENCES, 1 + num_tokens) to a prompt of one token; none ends early."""
    first = model.config.bos_token_id
    prompt = torch.full((SEQUENCES, 1), 0 if first is None else first, device=model.device)
    exact = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0, temperature=1.0, **exact
    )


def scorer(model, tokens):
    @torch.no_grad()
    def score(noise):
        parts = []
        for part in tokens.split(AT_ONCE):
            with noise():
                logits = model(part[:, :-1], use_cache=False).logits.float()
            parts.append(logits.log_softmax(-1).gather(-1, part[:, 1:, None])[..., 0])
        return torch.cat(parts)

    return score


def rows(model, mismatch, lengths, fixed):
    """Yield the table's rows: (sigma, tokens, token sd, ratio sd, smallest, largest, outside)."""
    answers, level = sample(model, max(lengths)), Objective.preset("alp-sequence")
    kinds = [*fixed, ("matched", Objective.preset("alp-token")), ("matched", level)]
    for scale, size in kinds:
        for length in lengths:
            score, mask = scorer(model, answers[:, : length + 1]), torch.ones(SEQUENCES, length, device=answers.device)
            with torch.no_grad():
                clean = scorer(model, answers[:, : length + 1])(lambda: torch.no_grad())
            sampler = (clean - mismatch * torch.randn_like(clean)).clamp(max=0)
            if scale == "matched":
                with attach(model, sigma="matched") as handle:
                    match_sigma(handle, score, sampler, mask, objective=size)
                    shift = measure_noise(handle, score, sampler, mask, objective=level)
                    low, high = handle.sigma.min(), handle.sigma.max()
                name = f"matched, {size.level}: rms {low:.1e} to {high:.1e}"
            else:
                with attach(model, sigma=size, scale=scale) as handle:
                    shift = measure_noise(handle, score, sampler, mask, objective=level)
                name = f"{scale} {size:.0e}"
            found, ratio = shift.summary(), shift.perturbation.summary()
            of_ratio = [ratio[f"sequence_ratio/{key}"] for key in ("std", "min", "max")]
            yield name, length, found["perturbation/sd"], *of_ratio, found["perturbation/outside_frac"]


def line(cells, is_markdown):
    if is_markdown:
        return f"| {' | '.join(cells)} |"
    return f"{cells[0]:44}" + "".join(f"{cell:>10}" for cell in cells[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face model's name or folder (default: a small random Qwen2)")
    parser.add_argument(
        "--mismatch", type=float, default=0.02, help="standard deviation of a token's mismatch, in nats"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="the answers' lengths, in tokens")
    parser.add_argument("--absolute", type=float, nargs="+", help="absolute sigmas to show in place of the usual sizes")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args()
    fixed = FIXED if args.absolute is None else [("absolute", sigma) for sigma in args.absolute]
    print(line(TITLES, args.markdown))
    if args.markdown:
        print("|---|" + "---:|" * (len(TITLES) - 1))
    for name, length, *values, outside in rows(load(args.model, args.dtype), args.mismatch, args.lengths, fixed):
        print(line([name, str(length), *(f"{v:.3g}" for v in values), f"{outside:.0%}"], args.markdown), flush=True)


if __name__ == "__main__":
    main()
