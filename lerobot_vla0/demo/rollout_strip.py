"""`lerobot-vla0 strip`: one episode of a policy as a picture, with the integers that it wrote, the chat
behind one of its chunks and, on request, loss and success."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.envs.utils import preprocess_observation
from torch import Tensor

from ..agent import Agent
from ..examples import Observation
from ..files import check_place, new_file
from ..libero.env import LiberoEnv
from ..libero.results import weights_hash
from ..options import PolicyOptions
from ..task_stats import to_task_bins
from .curve import read_log
from .record import check_image_size
from .strip_layout import FRAME_SIZE, Rollout, Turn, compress, draw
from .strip_panels import LossPanel, Panel, SuccessPanel, read_score, split_folders


@dataclass(kw_only=True)
class StripConfig(PolicyOptions):
    """Which episode to draw. `--policy.path=` names the checkpoint; its fields can be overridden
    (`--policy.device=cpu`). The defaults are the task of `make demo`."""

    # Picture to write, a PNG of at most 300 KB.
    out: Path = Path("outputs/rollout.png")
    # LIBERO suite.
    suite: str = "libero_object"
    # Task id of the suite.
    task: int = 2
    # Which of LIBERO's 50 stored initial states the episode starts from.
    init_state: int = 0
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "primitive"
    # Side in pixels of the camera images that the policy gets.
    image_size: int = 112
    # Number of frames in the strip.
    frames: int = 6
    # Output of the lerobot-train run that made the policy, to draw its loss.
    log: Path | None = None
    # Results folders of `lerobot-vla0 eval` on the policy, separated by commas, to draw their success.
    reports: str | None = None


def rollout_strip(config: StripConfig) -> Path:
    """Plays one episode, writes the picture and returns its path.

    Raises:
        ValueError: no policy, fewer than two frames, an unknown suite, task or initial state, or a log or a
            results folder without content.
    """
    config.require_policy("which policy?")
    if config.frames < 2:
        raise ValueError(f"frames={config.frames} must be at least 2.")
    check_image_size(config.image_size)
    out = check_place(config.out, "file")
    if out.suffix.lower() != ".png":
        raise ValueError(f"out={str(config.out)!r} must end with .png: the picture is a PNG.")
    panels: list[Panel] = [] if config.log is None else [LossPanel(read_log(config.log))]
    if config.reports is not None:
        folders, weights = split_folders(config.reports), weights_hash(config.policy)
        panels.append(SuccessPanel([read_score(folder, weights) for folder in folders]))
    start = {"init_state": config.init_state, "image_size": config.image_size}
    env = LiberoEnv(config.suite, config.task, assets=config.assets, **start)
    agent = Agent.from_config(config.policy)
    try:
        rollout = play_rollout(agent, env)
    finally:
        env.close()
    last = len(rollout.frames) - 1
    steps = np.linspace(0, last, config.frames).round().astype(int).tolist()
    # The chat belongs to one of the middle frames, moved to the last step at which the policy wrote a chunk.
    shown = (config.frames - 1) // 2
    steps[shown] = max(step for step in rollout.chunks if step <= steps[shown])
    chat = read_chat(agent, rollout, steps[shown])
    with new_file(out) as draft:
        draft.write_bytes(compress(draw(rollout, steps, shown, chat, panels)))
    print(f"{rollout.outcome.capitalize()} after {last} steps. Wrote {out}")
    return out


def play_rollout(agent: Agent, env: LiberoEnv) -> Rollout:
    """Plays one episode to its end, and keeps every chunk as it is written."""
    config, decoder = agent.policy.config, agent.policy.decoder
    decode = decoder.decode_chunk

    def frame() -> np.ndarray:
        # Rendered once more, since the policy's images may be too small to look at. LIBERO's cameras are
        # mounted upside down.
        pixels = env.simulator.sim.render(width=FRAME_SIZE, height=FRAME_SIZE, camera_name="agentview")
        return pixels[::-1, ::-1]

    def decode_and_keep(seen: Observation, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        written = rollout.chunks[len(rollout.observations) - 1] = []
        for bins in decode(seen, *args, **kwargs):  # (1, D), of the data set's range
            integers = to_task_bins(bins[:, None], seen.task_range, config.num_bins)
            written.append(integers.flatten().round().int().tolist())
            yield bins

    observation, info = env.reset()
    agent.reset()
    rollout = Rollout(info["task"], [observation], [frame()], averaged=config.ensemble_size > 1)
    done, decoder.decode_chunk = False, decode_and_keep
    try:
        while not done:
            action = agent.act(observation, rollout.instruction)
            observation, _, terminated, truncated, info = env.step(action)
            rollout.observations.append(observation)
            rollout.frames.append(frame())
            done = terminated or truncated
    finally:
        decoder.decode_chunk = decode
    rollout.success = bool(info["is_success"])
    return rollout


def read_chat(agent: Agent, rollout: Rollout, step: int) -> list[Turn]:
    """The chat at a step at which the policy looked: what it got, and the chunk that it wrote."""
    observation = preprocess_observation(rollout.observations[step])
    batch = agent.preprocess({**observation, "task": [rollout.instruction]})
    examples = agent.policy.examples
    checked = examples.check(batch)
    pictures = list(examples.pictures(checked, None)[0].permute(0, 2, 3, 1).cpu().numpy())
    turns = []
    for message in examples.chat.messages(examples.instructions(checked)[0]):
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        shown = [pictures.pop(0) for part in message["content"] if part["type"] == "image"]
        turns.append(Turn(message["role"], [text], shown))
    written = [" ".join(map(str, integers)) for integers in rollout.chunks[step]]
    if len(written) < agent.policy.config.chunk_size:
        written.append("…")  # the rest would not have been executed, and was not decoded
    return [*turns, Turn("assistant", written, [])]
