"""Training with TRL's SFTTrainer."""
