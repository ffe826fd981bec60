"""ALP with LoRA: a frozen base, adapters (one of them on the output head), and sigma, in one optimiser.

    python examples/peft_lora.py

A tiny random model learns to say 7, offline, in seconds. With a real model, `rollout` is your inference engine.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, attach, fused_alp_loss
from alp_kernels.integrations.hugging_face import backbone, check_head, output_head

LENGTH, WANTED = 8, 7


def rollout(model: torch.nn.Module, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Sampled tokens (B, 1 + LENGTH) and the log-probabilities (B, LENGTH) they were sampled with."""
    tokens, logp = prompts, []
    with torch.no_grad():
        for _ in range(LENGTH):
            log_probs = model(tokens).logits[:, -1].log_softmax(-1)
            choice = torch.multinomial(log_probs.exp(), 1)
            tokens = torch.cat([tokens, choice], dim=1)
            logp.append(log_probs.gather(1, choice))
    return tokens, torch.cat(logp, dim=1)


def main(folder: Path | None = None, num_steps: int = 25) -> list[float]:
    """Return the mean reward of each step; save the merged model to `folder`, if given."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"]))
    check_head(model, input_ids=torch.zeros(1, 2, dtype=torch.int64))

    handle = attach(model, sigma=1e-2)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": adapters}, handle.param_group(lr=5e-4)], lr=2e-2)
    objective, rewards = Objective.preset("alp-sequence"), []
    for step in range(num_steps):
        tokens, rollout_logp = rollout(model, torch.zeros(32, 1, dtype=torch.int64))
        reward = (tokens[:, 1:] == WANTED).float().mean(dim=1)
        rewards.append(float(reward.mean()))
        with handle.perturbed(step=step):
            hidden = backbone(model)(tokens[:, :-1]).last_hidden_state
            head = output_head(model)  # after the forward, in each step
            out = fused_alp_loss(
                hidden,
                head,
                tokens[:, 1:],
                rollout_logp,
                reward - reward.mean(),
                torch.ones(32, LENGTH),
                objective=objective,
            )
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == num_steps - 1:
            print(f"step {step:3d}  reward {rewards[-1]:.3f}  sigma {[round(s, 5) for s in handle.sigma.tolist()]}")

    handle.detach()
    merged = model.merge_and_unload()  # a plain model: no adapter, no hook, no sigma
    if folder is not None:
        merged.save_pretrained(folder)
    return rewards


if __name__ == "__main__":
    main()
