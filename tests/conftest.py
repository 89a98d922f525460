"""Shared fixtures: a tiny VLM, a policy on it, and reference data where it is at hand."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from local_hub import LocalHub

from lerobot_vla0.configuration_vla0 import VLA0Config
from lerobot_vla0.libero.assets import check_rendering

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/libero_demo"))
# Reference vectors, the real Qwen tokenizer and LIBERO's assets lie beside the checkout, not in it.
SHARED = Path(os.environ.get("VLA0_SHARED", ROOT.parent / "shared"))
ACTION_DIM = 7
ENVIRON = dict(os.environ)
# MuJoCo, dm_control and robosuite choose how to render when they are first imported, in whichever test file
# comes first: MUJOCO_GL must be set before. Processes that tests start choose for themselves, as a user's do.
with suppress(RuntimeError):  # nothing renders: tests that need it say so
    check_rendering()


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data {name} is not at hand (set VLA0_SHARED)")
    return path


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory) -> Path:
    from tiny_vlm import TinyVLMConfig, make_tiny_vlm

    return make_tiny_vlm(TinyVLMConfig(out=tmp_path_factory.mktemp("vlm") / "tiny"))


def make_act(out: Path) -> None:
    """The config of a checkpoint of another policy."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig

    action = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    ACTConfig(push_to_hub=False, output_features=action).save_pretrained(out)


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads(shared("golden/vla0_sample.json").read_text())


@pytest.fixture(scope="session")
def qwen_processor():
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = AutoTokenizer.from_pretrained(shared("qwen_tokenizer"))
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def make_config(vlm: Path | str, size: int = 64, **overrides) -> VLA0Config:
    from lerobot.configs import FeatureType, PolicyFeature

    inputs = {
        "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, size, size)),
        "observation.images.image2": PolicyFeature(FeatureType.VISUAL, (3, size, size)),
        "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
    }
    settings = {"device": "cpu", "dtype": "float32", "image_size": 56, "push_to_hub": False, **overrides}
    settings.setdefault("input_features", inputs)
    settings.setdefault("output_features", {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))})
    return VLA0Config(vlm=str(vlm), **settings)


def make_stats(low: float = -1.0, high: float = 1.0) -> dict:
    return {
        "action": {"min": torch.full((ACTION_DIM,), low), "max": torch.full((ACTION_DIM,), high)},
        "observation.state": {"min": torch.full((8,), -1.0), "max": torch.full((8,), 1.0)},
    }


TASKS = [
    "pick up the milk and place it in the basket",
    "open the drawer",
    "turn on the stove",
    "put the bowl on the plate next to the ramekin",
]


def make_batch(rows: int = 4, size: int = 64, seed: int = 0, chunk_size: int = 8) -> dict:
    """A batch as LeRobot's data loader gives it (images already float in [0, 1])."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation.images.image": torch.rand(rows, 3, size, size, generator=generator),
        "observation.images.image2": torch.rand(rows, 3, size, size, generator=generator),
        "observation.state": torch.rand(rows, 8, generator=generator) * 2 - 1,
        "action": torch.rand(rows, chunk_size, ACTION_DIM, generator=generator) * 2 - 1,
        "action_is_pad": torch.zeros(rows, chunk_size, dtype=torch.bool),
        "task": [TASKS[i % len(TASKS)] for i in range(rows)],
    }


def observation(batch: dict, rows: slice = slice(None)) -> dict:
    """The part of a batch that a policy has when it acts."""
    return {k: v[rows] for k, v in batch.items() if k.startswith("observation") or k == "task"}


def randomise(policy, seed: int = 1) -> None:
    """Larger random weights, so that the decoded text depends on everything."""
    torch.manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture
def policy(tiny_vlm):
    from lerobot_vla0.modeling_vla0 import VLA0Policy

    return VLA0Policy(make_config(tiny_vlm)).eval()


@pytest.fixture
def processors(tiny_vlm):
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    return make_vla0_pre_post_processors(make_config(tiny_vlm), make_stats())


@pytest.fixture(scope="session")
def process_env(tmp_path_factory) -> dict[str, str]:
    """Environment of the processes that tests start: network off, caches and LIBERO's config in a throw-away
    place."""
    home = tmp_path_factory.mktemp("home")
    return {
        **ENVIRON,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf"),
        "HF_LEROBOT_HOME": str(home / "lerobot"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "LIBERO_CONFIG_PATH": str(home / "libero"),
        "WANDB_MODE": "disabled",
        "TQDM_DISABLE": "1",
    }


@pytest.fixture(scope="session")
def robot_checkpoint(tiny_vlm, tmp_path_factory) -> Path:
    return make_robot_checkpoint(tiny_vlm, tmp_path_factory.mktemp("rollout") / "checkpoint")


def make_robot_checkpoint(tiny_vlm: Path, out: Path, reach: float = 90.0, **overrides) -> Path:
    """A policy for the robot of lerobot_robot_mock.py, with random weights, as lerobot-train saves it. Its
    actions are in -reach..reach."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot_robot_mock import CAMERAS

    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    cameras = {
        f"observation.images.{key}": PolicyFeature(FeatureType.VISUAL, (3, *CAMERAS[key][:2]))
        for key in ("front", "wrist")
    }
    config = make_config(
        tiny_vlm,
        chunk_size=16,
        n_action_steps=8,
        num_bins=100,
        input_features={**cameras, "observation.state": PolicyFeature(FeatureType.STATE, (6,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))},
        **overrides,
    )
    policy = VLA0Policy(config).eval()
    randomise(policy)
    limits = {"min": torch.full((6,), -reach), "max": torch.full((6,), reach)}
    policy.save_pretrained(out)
    for processor in make_vla0_pre_post_processors(config, {"action": limits, "observation.state": limits}):
        processor.save_pretrained(out)
    return out


@pytest.fixture
def robot_env(tmp_path, process_env) -> dict[str, str]:
    """Environment of processes that find lerobot_robot_mock.py as an installed plugin."""
    info = tmp_path / "site" / "lerobot_robot_mock-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_robot_mock\nVersion: 0.1\n")
    path = [str(info.parent), str(Path(__file__).parent), process_env.get("PYTHONPATH", "")]
    return {**process_env, "PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture
def throw_away(tmp_path_factory, monkeypatch) -> None:
    """LIBERO's config file and the stand-in assets in a throw-away place, for tests in this process."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(home / "libero"))


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Black ones in LIBERO: drawing takes most of the time of a step."""
    from lerobot_vla0.libero.simulator import Cameras

    def black(cameras, name: str) -> np.ndarray:
        width, height = cameras._sizes[name]
        return np.zeros((height, width, 3), np.uint8)

    monkeypatch.setattr(Cameras, "draw", black)


@pytest.fixture
def hub(tmp_path):
    """A local stand-in for the Hugging Face Hub, see local_hub.py."""
    server = LocalHub(tmp_path / "hub")
    yield server
    server.close()


def run_script(name: str, *arguments: str, env: dict[str, str], timeout: int = 600, check: bool = True):
    """Runs an installed console script as a user would; its output is shown when it fails."""
    script = Path(sys.executable).with_name(name)
    command = [str(script), *arguments]
    result = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if check and result.returncode:
        pytest.fail(f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout[-4000:]}")
    return result


def eval_with_a_server(policy: Path, url: str, length: int, out: Path, env: dict[str, str]) -> None:
    """`lerobot-eval` in LIBERO: two episodes of `length` steps at once, with the VLM at `url`."""
    run_script(
        "lerobot-eval", f"--policy.path={policy}", f"--policy.server={url}", "--policy.device=cpu",
        "--env.type=vla0_libero", "--env.task=libero_object", "--env.task_ids=[7]", "--env.assets=primitive",
        f"--env.episode_length={length}", "--eval.batch_size=2", "--eval.n_episodes=2",
        f"--output_dir={out}",
        env=env,
    )  # fmt: skip
    assert json.loads((out / "eval_info.json").read_text())["overall"]["n_episodes"] == 2


# One of libero_object, one of libero_goal.
TINY_TASKS = ["pick up the milk and place it in the basket", "open the middle drawer of the cabinet"]


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Four episodes of six frames; tasks of libero_object and libero_goal in turn."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("tiny") / "data"
    cameras = ("observation.images.image", "observation.images.image2")
    features = {
        k: {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]} for k in cameras
    }
    features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": None}
    dataset = LeRobotDataset.create("local/tiny", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(4):
        for _ in range(6):
            frame = {key: rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for key in cameras}
            frame["observation.state"] = rng.normal(size=8).astype(np.float32)
            frame["action"] = rng.uniform(-0.9, 0.9, 7).astype(np.float32)
            dataset.add_frame(frame | {"task": TINY_TASKS[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def libero_dataset(tmp_path_factory, process_env) -> Path:
    """Two recorded episodes of one libero_object task, on the stand-in assets."""
    out = tmp_path_factory.mktemp("data") / "milk"
    script = str(ROOT / "examples/libero_demo/record.py")
    options = ["--tasks=[7]", "--episodes=2", "--workers=2", "--assets=primitive"]
    run_script("python", script, f"--out={out}", *options, env=process_env)
    return out


def learn(policy, batch: dict, limit: int = 2000) -> None:
    """Trains on one batch, without augmentation, until the policy knows it by heart."""
    config = policy.config
    config.action_mask_prob = 0.0
    config.jitter = [0.0, 0.0, 0.0, 0.0]
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    for _ in range(limit):
        loss, metrics = policy(batch)
        if metrics["token_accuracy"] == 1.0 and loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    assert metrics["token_accuracy"] == 1.0, f"not learnt: {metrics}"
    policy.eval()


def train_steps(policy, batch: dict, steps: int, lr: float) -> tuple[list[float], dict]:
    """(loss of each step, metrics of the last)."""
    policy.train()
    optimizer, losses = torch.optim.AdamW(policy.get_optim_params(), lr=lr), []
    for _ in range(steps):
        loss, metrics = policy.forward(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, metrics


@pytest.fixture(scope="session")
def learnt(tmp_path_factory, tiny_vlm) -> tuple[Path, dict]:
    """(checkpoint of a tiny policy that knows two examples by heart, the batch behind the preprocessor)."""
    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    torch.manual_seed(0)
    policy = VLA0Policy(make_config(tiny_vlm, chunk_size=2, n_action_steps=2, crop_ratio=1.0))
    processors = make_vla0_pre_post_processors(policy.config, make_stats(-2.0, 3.0))
    batch = processors[0](make_batch(rows=2, size=56, chunk_size=2))
    learn(policy, batch)
    folder = tmp_path_factory.mktemp("learnt") / "checkpoint"
    for part in (policy, *processors):
        part.save_pretrained(folder)
    return folder, batch
