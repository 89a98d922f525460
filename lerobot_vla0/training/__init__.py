"""Training with TRL's SFTTrainer (the optional dependency `lerobot_policy_vla0[sft]`)."""
