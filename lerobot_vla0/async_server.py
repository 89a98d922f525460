"""LeRobot's asynchronous inference with VLA-0: `python -m lerobot_vla0.async_server --port=8080`.

This is LeRobot's `policy_server`, with its options, for a policy that it does not know: it admits a fixed
list of policies and imports no plugins. The client is LeRobot's own (`python -m
lerobot.async_inference.robot_client --policy_type=vla0 ...`). Both unpickle what the other side sends, so
whoever can reach the port can run code: use it only in a network that you trust.
"""

from typing import Any

from lerobot.async_inference import policy_server
from lerobot.async_inference.constants import SUPPORTED_POLICIES
from lerobot.utils.constants import OBS_IMAGES
from lerobot.utils.import_utils import register_third_party_plugins


class CheckingServer(policy_server.PolicyServer):
    """Refuses a robot with other cameras when it connects. LeRobot's would refuse each of its observations,
    and name a key only."""

    def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Loads the policy that a client asks for.

        Raises:
            ValueError: the robot's cameras are not those of the policy; the client shows the message.
        """
        answer = super().SendPolicyInstructions(request, context)
        robot = {key for key in self.lerobot_features if key.startswith(OBS_IMAGES)}
        expected = set(self.policy.config.image_features)
        if robot != expected:
            raise ValueError(
                f"the robot has the cameras {sorted(robot)}, and the policy was trained with "
                f"{sorted(expected)}. Name the robot's cameras (--robot.cameras) as the policy's."
            )
        return answer


def main() -> None:
    """Runs the server until it is interrupted."""
    register_third_party_plugins()
    SUPPORTED_POLICIES.append("vla0")
    policy_server.PolicyServer = CheckingServer
    policy_server.serve()


if __name__ == "__main__":
    main()
