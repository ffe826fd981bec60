"""ALP in your own training loop: sample, score, centre, perturb, update. Runs on a CPU in seconds, offline.

    python examples/own_loop.py

The task is a toy (say the number 7 as often as possible), but the parts are those of a real run: the sampler's own
log-probabilities are the denominator, the noise is on only in the update, and micro-batches change nothing.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, Stats, attach, fused_alp_loss

PROMPTS, GROUP, PROMPT_LEN, NEW, LUCKY = 4, 8, 4, 12, 7
STEPS, MICRO_BATCHES = 25, 2


@torch.no_grad()
def sample(model, prompts):
    """Tokens (B, PROMPT_LEN + NEW) and the log-probabilities (B, NEW) that they were drawn with."""
    tokens, logps = prompts, []
    for _ in range(NEW):
        logp = model(tokens).logits[:, -1].log_softmax(-1)
        chosen = torch.multinomial(logp.exp(), 1)
        tokens, logps = torch.cat([tokens, chosen], 1), [*logps, logp.gather(1, chosen)]
    return tokens, torch.cat(logps, 1)


def main(steps=STEPS):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = Qwen2Config(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads)
    model = Qwen2ForCausalLM(config)
    handle = attach(model, sigma=1e-2)  # nothing changes until the scope below is open
    objective = Objective.preset("alp-sequence")
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, handle.param_group(lr=1e-2)], lr=3e-3)
    rewards = torch.zeros(0)
    for step in range(steps):
        prompts = torch.randint(32, (PROMPTS, PROMPT_LEN)).repeat_interleave(GROUP, 0)
        tokens, rollout_logp = sample(model, prompts)  # clean: the scope is closed
        rewards = (tokens[:, PROMPT_LEN:] == LUCKY).float().mean(1)
        groups = rewards.view(PROMPTS, GROUP)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()

        parts, all_stats = zip(*(x.chunk(MICRO_BATCHES) for x in (tokens, rollout_logp, advantages)), strict=True), []
        for part, part_logp, part_advantages in parts:
            with handle.perturbed(step=step):
                hidden = model.model(part[:, :-1]).last_hidden_state[:, PROMPT_LEN - 1 :]
                out = fused_alp_loss(
                    hidden,
                    model.lm_head.weight,
                    part[:, PROMPT_LEN:],
                    part_logp,
                    part_advantages,
                    torch.ones_like(part_logp),
                    objective=objective,
                    num_tokens=rollout_logp.numel(),  # the whole batch's count, so the split changes nothing
                )
                out.loss.backward()
            all_stats.append(out.stats)
        optimizer.step()
        optimizer.zero_grad()
        stats = Stats.cat(all_stats).summary()
        print(
            f"step {step}: reward {rewards.mean():.3f}, k3 KL {stats['k3_kl']:.4f}, "
            f"sequence ratio q99 {stats['sequence_ratio/q99']:.3f}, sigma {handle.sigma.mean():.5f}"
        )
    handle.detach()  # removes the hooks; the model is as before
    return rewards.mean().item()


if __name__ == "__main__":
    main()
