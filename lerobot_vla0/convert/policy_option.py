"""`--policy.path=` of the commands that work on a checkpoint of this package."""

from ..configuration_vla0 import VLA0Config
from ..options import PolicyOptions


def vla0_policy(options: PolicyOptions, question: str) -> VLA0Config:
    """The config of the checkpoint that was named.

    Args:
        question: what to ask if none was.

    Raises:
        ValueError: none was named, or one of another policy.
    """
    policy = options.policy
    if policy is None:
        raise ValueError(f"{question} --policy.path=<checkpoint folder or Hub repo>")
    if not isinstance(policy, VLA0Config):
        raise ValueError(
            f"--policy.path={policy.pretrained_path} holds a {policy.type!r} policy, not vla0: this command "
            "works on checkpoints of this package only."
        )
    return policy
