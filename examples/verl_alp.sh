#!/usr/bin/env bash
# ALP in verl 0.9.1. Copy this script, set MODEL, TRAIN and VAL, and pass your own overrides as arguments.
# The lines from bypass_mode on switch ALP on: docs/verl.md says what each does.
set -euo pipefail

python3 -m verl.trainer.main_ppo \
  data.train_files="${TRAIN:?a parquet file}" data.val_files="${VAL:?a parquet file}" \
  actor_rollout_ref.model.path="${MODEL:?a Hugging Face model}" actor_rollout_ref.rollout.name=vllm \
  algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 actor_rollout_ref.actor.use_dynamic_bsz=true \
  algorithm.rollout_correction.bypass_mode=true \
  actor_rollout_ref.rollout.calculate_log_probs=true \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.policy_loss.loss_mode=alp_sequence \
  actor_rollout_ref.actor.clip_ratio_low=0.5 \
  actor_rollout_ref.actor.clip_ratio_high=3.0 \
  actor_rollout_ref.actor.clip_ratio_c=10.0 \
  actor_rollout_ref.model.external_lib=alp_kernels.integrations.verl_engine \
  +actor_rollout_ref.model.override_config.alp_sigma=0.01 \
  +actor_rollout_ref.model.override_config.alp_sigma_lr=5e-4 \
  +actor_rollout_ref.model.override_config.alp_support=full \
  "$@"
