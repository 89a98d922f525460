"""LeRobot's asynchronous inference with VLA-0: `python -m lerobot_vla0.async_server --port=8080`.

LeRobot's `policy_server` and its options, for a policy that is not in its list. The client is LeRobot's own
(`python -m lerobot.async_inference.robot_client --policy_type=vla0 ...`). Both unpickle the other side's
messages, so whoever can reach the port can run code: use it only in a network that you trust.
"""

from typing import Any

from lerobot.async_inference import policy_server
from lerobot.async_inference.constants import SUPPORTED_POLICIES
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from lerobot.utils.import_utils import register_third_party_plugins

from .configuration_vla0 import VLA0Config, check_joints


class CheckingServer(policy_server.PolicyServer):
    """Refuses a robot that does not fit the policy when it connects; the client shows the message. LeRobot's
    would refuse each of its observations, and the client would leave out actions without a joint."""

    def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Loads the policy that a client asks for, and compares cameras and joints if it is VLA-0."""
        answer = super().SendPolicyInstructions(request, context)
        config, features = self.policy.config, self.lerobot_features
        if not isinstance(config, VLA0Config):
            return answer
        robot = {key for key in features if key.startswith(OBS_IMAGES)}
        missing, unknown = set(config.camera_keys) - robot, robot - set(config.image_features)
        if unknown or len(missing) > config.most_missing_cameras:
            raise ValueError(
                f"the robot has the cameras {sorted(robot)}, and the policy was trained with "
                f"{sorted(config.image_features)}. Give those of the robot (--robot.cameras) the same names."
            )
        if OBS_STATE in features:
            check_joints(config, features[OBS_STATE]["shape"][0])
        return answer


def main() -> None:
    """Runs the server until it is interrupted."""
    register_third_party_plugins()
    SUPPORTED_POLICIES.append("vla0")
    policy_server.PolicyServer = CheckingServer
    policy_server.serve()


if __name__ == "__main__":
    main()
