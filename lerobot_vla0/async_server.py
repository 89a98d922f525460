"""LeRobot's asynchronous inference with VLA-0: `python -m lerobot_vla0.async_server --port=8080`.

This is LeRobot's `policy_server`, with its options, for a policy that it does not know: it admits a fixed
list of policies and imports no plugins. The client is LeRobot's own (`python -m
lerobot.async_inference.robot_client --policy_type=vla0 ...`). Both unpickle what the other side sends, so
whoever can reach the port can run code: use it only in a network that you trust.
"""

from typing import Any

from lerobot.async_inference import policy_server
from lerobot.async_inference.constants import SUPPORTED_POLICIES
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from lerobot.utils.import_utils import register_third_party_plugins

from .config_types import check_joints
from .configuration_vla0 import VLA0Config


class CheckingServer(policy_server.PolicyServer):
    """Refuses a robot that does not fit the policy when it connects. LeRobot's would refuse each of its
    observations, and name a key only; and the client would leave out actions for which it has no joint."""

    def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Loads the policy that a client asks for. Policies of other types are LeRobot's matter.

        Raises:
            ValueError: the robot lacks a camera or a joint of the policy, or has a camera that the policy was
                not trained with; the client shows the message.
        """
        answer = super().SendPolicyInstructions(request, context)
        if isinstance(self.policy.config, VLA0Config):
            check_robot(self.policy.config, self.lerobot_features)
        return answer


def check_robot(config: VLA0Config, features: dict[str, Any]) -> None:
    """Raises ValueError if the features of a robot, as LeRobot's client sends them, do not fit the policy."""
    robot = {key for key in features if key.startswith(OBS_IMAGES)}
    missing, unknown = set(config.camera_keys) - robot, robot - set(config.image_features)
    if unknown or len(missing) > config.most_missing_cameras:
        raise ValueError(
            f"the robot has the cameras {sorted(robot)}, and the policy was trained with "
            f"{sorted(config.image_features)}. Name the robot's cameras (--robot.cameras) as the policy's."
        )
    if OBS_STATE in features:
        check_joints(config, features[OBS_STATE]["shape"][0])


def main() -> None:
    """Runs the server until it is interrupted."""
    register_third_party_plugins()
    SUPPORTED_POLICIES.append("vla0")
    policy_server.PolicyServer = CheckingServer
    policy_server.serve()


if __name__ == "__main__":
    main()
