"""Training with TRL's SFTTrainer (the optional dependency `lerobot_policy_vla0[sft]`)."""

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError("TRL is not installed: pip install 'lerobot_policy_vla0[sft]'") from error
