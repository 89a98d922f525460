"""LeRobot's own scripts, unchanged, as processes: train, resume, fine-tune, evaluate in the LIBERO
simulation."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_batch, observation, run_script, shared

from lerobot_vla0.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train_arguments(libero_dataset):
    return [
        f"--dataset.repo_id=local/{libero_dataset.name}", f"--dataset.root={libero_dataset}",
        "--batch_size=2",
        "--num_workers=0", "--log_freq=1", "--policy.push_to_hub=false", "--policy.device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def base_vlm(tiny_vlm, tmp_path_factory) -> Path:
    """A copy that is moved away after training: nothing may need it any more."""
    return Path(shutil.copytree(tiny_vlm, tmp_path_factory.mktemp("base") / "vlm"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_vlm, train_arguments, process_env) -> Path:
    """A training run of four steps with checkpoints after two and four; its base VLM is gone afterwards."""
    out = tmp_path_factory.mktemp("runs") / "run"
    log = run_script(
        "lerobot-train", *train_arguments, "--policy.type=vla0", f"--policy.vlm={base_vlm}",
        "--policy.dtype=float32", "--policy.image_size=56", "--steps=4", "--save_freq=2",
        f"--output_dir={out}",
        env=process_env,
    ).stdout  # fmt: skip
    shutil.rmtree(base_vlm)
    for name in ("token_accuracy", "action_error_bins", "action_clipped"):
        assert f"{name}:" in log
    return out


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / f"checkpoints/{step:06d}/pretrained_model/model.safetensors")


def test_resume_is_bit_exact(run, process_env, tmp_path):
    """Two more steps from the middle checkpoint give the weights of the uninterrupted run."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints/000004")
    (copy / "checkpoints/last").unlink()
    (copy / "checkpoints/last").symlink_to("000002")
    config = copy / "checkpoints/last/pretrained_model/train_config.json"
    run_script(
        "lerobot-train", f"--config_path={config}", "--resume=true", f"--output_dir={copy}", env=process_env
    )
    resumed, whole = weights(copy, 4), weights(run, 4)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert not all(torch.equal(weights(run, 2)[k], whole[k]) for k in whole)


def test_fine_tune_takes_the_new_data_sets_statistics(
    run, libero_dataset, train_arguments, process_env, tmp_path
):
    from safetensors.torch import load_file

    data = Path(shutil.copytree(libero_dataset, tmp_path / "other"))
    stats = json.loads((data / "meta/stats.json").read_text())
    stats["action"]["max"] = [2.0] * 7
    (data / "meta/stats.json").write_text(json.dumps(stats))
    arguments = [a for a in train_arguments if not a.startswith("--dataset")]
    out = tmp_path / "run"
    run_script(
        "lerobot-train", *arguments, "--dataset.repo_id=local/other", f"--dataset.root={data}",
        f"--policy.path={run}/checkpoints/last/pretrained_model", "--policy.dtype=bfloat16", "--steps=1",
        f"--output_dir={out}",
        env=process_env,
    )  # fmt: skip
    state = next((out / "checkpoints/last/pretrained_model").glob("policy_postprocessor_*.safetensors"))
    assert load_file(state)["action.max"].tolist() == [2.0] * 7


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory) -> Path:
    """A data set of two tasks whose actions differ in range, one episode each."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    root = tmp_path_factory.mktemp("data") / "two"
    features = {
        "observation.images.image": image,
        "observation.images.image2": image,
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("local/two", fps=10, features=features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for task, scale in [("pick up the milk and place it in the basket", 1.0), ("open the drawer", 0.1)]:
        for _ in range(10):
            frame = {
                key: random.integers(256, size=(64, 64, 3)).astype("uint8") for key in list(features)[:2]
            }
            frame["observation.state"] = random.random(8).astype("float32")
            frame["action"] = (scale * random.uniform(-1, 1, 7)).astype("float32")
            dataset.add_frame({**frame, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def adapter_run(two_tasks, tiny_vlm, process_env, tmp_path_factory) -> Path:
    """LoRA on a fresh policy, with a range of actions for each task: two steps, a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "adapter"
    log = run_script(
        "lerobot-train", "--policy.type=vla0", f"--policy.vlm={tiny_vlm}", "--policy.dtype=float32",
        "--policy.image_size=56", "--policy.action_norm=task", "--peft.method_type=LORA", "--peft.r=8",
        "--peft.lora_alpha=16", "--dataset.repo_id=local/two", f"--dataset.root={two_tasks}",
        "--batch_size=2", "--num_workers=0", "--log_freq=1", "--policy.push_to_hub=false",
        "--policy.device=cpu", "--policy.optimizer_lr=0.01", "--steps=2", "--save_freq=1",
        f"--output_dir={out}", env=process_env,
    ).stdout  # fmt: skip
    assert log.count("PEFT trains ") == 1
    assert "the actions of a task would span [5" in log  # (1000 + 100) / 2, about
    assert "action_clipped:0.000" in log
    return out


def adapter_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / f"checkpoints/{step:06d}/pretrained_model/adapter_model.safetensors")


def test_adapter_resumes_bit_exactly(adapter_run, process_env, tmp_path):
    copy = Path(shutil.copytree(adapter_run, tmp_path / "run", symlinks=True))
    shutil.rmtree(copy / "checkpoints/000002")
    (copy / "checkpoints/last").unlink()
    (copy / "checkpoints/last").symlink_to("000001")
    config = copy / "checkpoints/last/pretrained_model/train_config.json"
    run_script(
        "lerobot-train", f"--config_path={config}", "--resume=true", f"--output_dir={copy}", env=process_env
    )
    resumed, whole, before = (
        adapter_weights(copy, 2),
        adapter_weights(adapter_run, 2),
        adapter_weights(copy, 1),
    )
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert not all(torch.equal(before[k], whole[k]) for k in whole)
    states = [
        (run / "checkpoints/000002/pretrained_model/policy_preprocessor_step_3.safetensors").read_bytes()
        for run in (copy, adapter_run)
    ]
    assert states[0] == states[1] and b"action.task.open the drawer.max" in states[0]


def test_eval_of_an_adapter(adapter_run, process_env, tmp_path):
    """On one of its tasks, and on one (basket 0) that it was not trained on."""
    adapter = adapter_run / "checkpoints/last/pretrained_model"
    assert not (adapter / "model.safetensors").exists()
    log = run_script(
        "lerobot-eval", f"--policy.path={adapter}", "--policy.device=cpu", "--env.type=vla0_libero",
        "--env.task=libero_object", "--env.task_ids=[0,7]", "--env.assets=primitive",
        "--env.episode_length=3", "--eval.batch_size=1", "--eval.n_episodes=1",
        f"--output_dir={tmp_path}/eval", env=process_env,
    ).stdout  # fmt: skip
    assert json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]["n_episodes"] == 2
    assert log.count("no action statistics of the task 'pick up the alphabet soup") == 1
    assert "no action statistics of the task 'pick up the milk" not in log


def test_reload_in_python(run):
    """The lines of the README; the base VLM is gone."""
    from lerobot.policies.factory import make_pre_post_processors

    from lerobot_vla0.modeling_vla0 import VLA0Policy

    folder = run / "checkpoints/last/pretrained_model"
    policy = VLA0Policy.from_pretrained(folder)
    preprocess, postprocess = make_pre_post_processors(policy.config, str(folder))
    action = postprocess(policy.select_action(preprocess(observation(make_batch(rows=2, size=256)))))
    assert action.shape == (2, 7)


# As the README writes lists, beside a path.
LISTS = [
    "--policy.cameras=[observation.images.image2, observation.images.image]",
    "--policy.normalization_mapping={VISUAL: IDENTITY, STATE: MIN_MAX, ACTION: MIN_MAX}",
]


def test_eval_on_libero_with_stand_ins(run, process_env, tmp_path):
    log = run_script(
        "lerobot-eval", f"--policy.path={run}/checkpoints/last/pretrained_model", "--policy.device=cpu",
        "--env.type=vla0_libero", "--env.task=libero_object", "--env.task_ids=[7]", "--env.assets=primitive",
        "--env.episode_length=10", "--eval.batch_size=2", "--eval.n_episodes=2",
        f"--output_dir={tmp_path}", *LISTS, env=process_env,
    ).stdout  # fmt: skip
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2, log
    videos = list(tmp_path.rglob("*.mp4"))
    assert len(videos) == 2 and all(v.stat().st_size > 1000 for v in videos)


def test_eval_with_lerobots_own_libero(run, process_env, tmp_path):
    """`--env.type=libero`, nothing of ours in between, on LIBERO's assets (reduced ones, in a throw-away
    home)."""
    assets = tmp_path / "home/.cache/libero/assets"
    assets.parent.mkdir(parents=True)
    assets.symlink_to(shared("libero-assets").resolve())
    env = {**process_env, "HOME": str(tmp_path / "home"), "MUJOCO_GL": os.environ["MUJOCO_GL"]}
    run_script(
        "lerobot-eval", f"--policy.path={run}/checkpoints/last/pretrained_model", "--policy.device=cpu",
        "--env.type=libero", "--env.task=libero_spatial", "--env.task_ids=[0]", "--env.episode_length=10",
        "--eval.batch_size=1", "--eval.n_episodes=1", f"--output_dir={tmp_path}/out", env=env,
    )  # fmt: skip
    assert json.loads((tmp_path / "out/eval_info.json").read_text())["overall"]["n_episodes"] == 1


def test_a_value_that_is_refused_is_named(run, process_env, tmp_path):
    """By LeRobot's scripts and by the package's own commands, in one line."""
    path = f"--policy.path={run}/checkpoints/last/pretrained_model"
    message = "n_action_steps=16 is not allowed: it must be in 1..chunk_size (8)"
    arguments = (path, "--policy.n_action_steps=16")
    result = run_script("lerobot-eval", *arguments, "--env.type=vla0_libero", env=process_env, check=False)
    assert result.returncode != 0 and message in result.stdout and "Traceback" not in result.stdout
    with pytest.raises(SystemExit, match=f"lerobot-vla0 eval: {re.escape(message)}"):
        main(["eval", *arguments, f"--out={tmp_path}/eval"])
