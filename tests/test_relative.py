"""Relative actions, from the data set to the robot's commands."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_batch, make_config, make_stats, observation, randomise, run_script
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_tools import recompute_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.rtc.relative import reanchor_relative_rtc_prefix
from lerobot.utils.collate import lerobot_collate_fn
from test_decoding_server import remote, serving

from lerobot_vla0 import Agent
from lerobot_vla0.cli import main
from lerobot_vla0.decoding import rtc
from lerobot_vla0.decoding.ensembling import TemporalEnsembler
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors
from lerobot_vla0.training_data import prepare_data

NAMES = [*(f"joint_{i}" for i in range(6)), "gripper.pos"]
STATE = "observation.state"
# Per dimension, so that a mistaken one shows; the last joint is constant in the data.
STATS = {
    "action": {
        "min": torch.tensor([-1.0, -2, 0, -10, -0.5, 0.25, 0]),
        "max": torch.tensor([1.0, 1, 3, 30, 0.5, 0.25, 50]),
    }
}


def relative_config(vlm, **overrides):
    return make_config(vlm, use_relative_actions=True, action_feature_names=NAMES, **overrides)


@pytest.fixture
def make_acting(tiny_vlm):
    def make(**overrides):
        settings = {"chunk_size": 4, "n_action_steps": 4, **overrides}
        policy = VLA0Policy(relative_config(tiny_vlm, **settings)).eval()
        randomise(policy)
        return policy, *make_vla0_pre_post_processors(policy.config, STATS)

    return make


def state_at(t: int, rows: int = 2) -> torch.Tensor:
    """(rows, 8), far outside what the actions move in a chunk, and another one at each time."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(t)) * 20


def seen(batch: dict, t: int) -> dict:
    return {**batch, STATE: state_at(t, len(batch["task"]))}


def mask() -> torch.Tensor:
    return torch.tensor([True] * 6 + [False])


def close(commands, expected):
    """To a thousandth of a bin, or to float32's precision."""
    torch.testing.assert_close(commands, expected, rtol=2e-6, atol=1e-4)


def test_training_sees_actions_minus_the_state(make_acting):
    policy, pre, post = make_acting()
    batch = make_batch(rows=3, chunk_size=4)
    shown = pre(dict(batch))
    relative = batch["action"] - (batch[STATE][:, :7] * mask())[:, None]
    low, high = (STATS["action"][name] for name in ("min", "max"))
    bins = ((relative - low) / (high - low).clamp(min=1e-8) * 1000).round().clamp(0, 1000)
    assert torch.equal(shown["action"], bins.long())
    assert torch.equal(shown[STATE], batch[STATE])
    error = (post(shown["action"]) - batch["action"]).abs()
    inside = (relative >= low) & (relative <= high)
    assert (error <= (high - low) / 2000 + 1e-5)[inside].all() and inside.float().mean() > 0.3
    loss, _ = policy.train()(shown)
    loss.backward()


@pytest.mark.parametrize("settings", [{"n_action_steps": 2}, {"n_action_steps": 4, "stream": True}], ids=str)
def test_commands_are_those_of_the_look_while_the_robot_moves(settings, make_acting):
    policy, pre, post = make_acting(**settings)
    batch, steps = observation(make_batch(rows=2)), settings["n_action_steps"]
    for t in range(steps + 2):
        inputs = pre(seen(batch, t))
        command = post(policy.select_action(inputs))
        if t % steps == 0:
            chunk = post(policy.predict_action_chunk(inputs))
        close(command, chunk[:, t % steps])


def test_environments_look_at_different_times(make_acting):
    policy, pre, post = make_acting(n_action_steps=3)
    batch, chunks, looked = observation(make_batch(rows=2)), [None, None], [0, 0]
    for t in range(5):
        if t == 2:
            policy.reset([1])
            looked[1] = 2
        inputs = pre(seen(batch, t))
        command = post(policy.select_action(inputs))
        for row in range(2):
            if (t - looked[row]) % 3 == 0:
                looked[row], chunks[row] = t, post(policy.predict_action_chunk(inputs))[row]
            close(command[row], chunks[row][t - looked[row]])


def test_averaged_chunks_are_of_commands(make_acting):
    policy, pre, post = make_acting(n_action_steps=1, ensemble_size=3)
    batch, ensembler = observation(make_batch(rows=1)), TemporalEnsembler(3)
    for t in range(4):
        inputs = pre(seen(batch, t))
        command = post(policy.select_action(inputs))
        averaged = ensembler.add(post(policy.predict_action_chunk(inputs))[0], executed=1)
        close(command[0], averaged[0])


def test_a_robot_that_stands_gets_whole_integers(make_acting):
    policy, pre, _ = make_acting()
    inputs = pre(seen(observation(make_batch(rows=2)), 0))
    chunk = policy.predict_action_chunk(inputs)
    assert torch.equal(torch.stack([policy.select_action(inputs) for _ in range(4)], 1), chunk)


@pytest.mark.parametrize("delay", [0, 2])
def test_real_time_chunking_continues_what_lerobot_re_anchors(delay, make_acting):
    policy, pre, post = make_acting()
    _, _, _, relative_step, normalizer, _ = pre.steps
    first = pre(seen(observation(make_batch(rows=1)), 0))
    commands = post(policy.predict_action_chunk(first))[0, 1:]  # three are left
    now = observation(make_batch(rows=1, seed=1))
    now[STATE] = first[STATE] + torch.linspace(-0.1, 0.1, 8)
    inputs = pre(now)
    anchored = reanchor_relative_rtc_prefix(commands, now[STATE], relative_step, normalizer, "cpu")
    left_over = torch.cat([anchored, torch.zeros(1, 7)])  # LeRobot fills up to its horizon
    read = rtc.read_left_over(policy.examples.check(inputs), policy.config, delay, left_over)
    assert [len(row) for row in read.integers] == [3 * 7] and read.committed == [delay * 7]
    chunk = post(policy.predict_action_chunk(inputs, inference_delay=delay, prev_chunk_left_over=left_over))
    low, high = (STATS["action"][name] for name in ("min", "max"))
    room = (commands - (now[STATE][0, :7] * mask())).clamp(low, high) + now[STATE][0, :7] * mask()
    assert ((chunk[0, :delay] - room[:delay]).abs() <= (high - low) / 2000 + 1e-4).all()
    assert (room == commands).float().mean() > 0.5


@pytest.mark.parametrize("missing", ["action_origin", STATE])
def test_state_that_is_missing_is_named(missing, make_acting):
    policy, pre, _ = make_acting()
    batch = observation(make_batch(rows=1))
    if missing == STATE:
        del batch[STATE]
        batch = pre(batch)
    with pytest.raises(
        ValueError, match="no 'action_origin', which use_relative_actions=True.*'observation.st"
    ):
        policy.select_action(batch)


def test_a_robot_with_fewer_joints_is_named(make_acting):
    _, pre, _ = make_acting()
    batch = observation(make_batch(rows=1))
    batch[STATE] = batch[STATE][:, :5]
    with pytest.raises(ValueError, match="the robot has 5 joints .* relative actions of 7 dimensions"):
        pre(batch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"action_norm": "task"}, "use_relative_actions=True .* False with action_norm='task'"),
        (
            {"input_features": {"observation.images.a": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}},
            "use_relative_actions=True needs the feature observation.state",
        ),
        (
            {"output_features": {"action": PolicyFeature(FeatureType.ACTION, (9,))}},
            "the 8 numbers of .* of 9",
        ),
        (
            {"output_features": {"action": PolicyFeature(FeatureType.ACTION, (1,))}},
            "an action of 1: it needs 2",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides, message):
    with pytest.raises(ValueError, match=message):
        relative_config("vlm", **overrides).validate_features()


# ------------------------------------------------------------------------------------------------ data sets


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Three episodes of ten frames, whose actions are near the states. Names as in LeRobot's older data."""
    root = tmp_path_factory.mktemp("arm") / "data"
    camera = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    names = {"motors": NAMES}
    features = {
        "observation.images.image": camera,
        STATE: {"dtype": "float32", "shape": (7,), "names": names},
        "action": {"dtype": "float32", "shape": (7,), "names": names},
    }
    dataset = LeRobotDataset.create("local/arm", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(3):
        state = rng.uniform(-100, 100, 7)
        for _ in range(10):
            action = state + rng.uniform(-1, 1, 7)
            frame = {STATE: state.astype(np.float32), "action": action.astype(np.float32)}
            frame["observation.images.image"] = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            dataset.add_frame(frame | {"task": "wave"})
            state = action
        dataset.save_episode()
    dataset.finalize()
    return root


def arm_data(root) -> LeRobotDataset:
    return LeRobotDataset("local/arm", root=root, delta_timestamps={"action": [i / 10 for i in range(8)]})


def unfilled(vlm, **overrides):
    return make_config(vlm, use_relative_actions=True, input_features={}, output_features={}, **overrides)


def test_statistics_are_lerobots(arm, tiny_vlm, tmp_path):
    dataset = arm_data(arm)
    policy = make_policy(unfilled(tiny_vlm), ds_meta=dataset.meta)
    assert policy.config.action_feature_names == NAMES
    copy = shutil.copytree(arm, tmp_path / "data")
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["action"]["names"] = NAMES  # LeRobot's helper cannot read groups
    (copy / "meta/info.json").write_text(json.dumps(info))
    expected = recompute_stats(arm_data(copy), relative_action=True, chunk_size=8).meta.stats
    for name, values in expected["action"].items():
        np.testing.assert_array_equal(dataset.meta.stats["action"][name], values)
    assert (dataset.meta.stats["action"]["max"] < 10)[:6].all() and dataset.meta.stats["action"]["std"][
        6
    ] > 10
    batch = lerobot_collate_fn([dataset[i] for i in (0, 12)])
    pre, post = make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)
    shown = pre(dict(batch))
    assert shown["action_clipped"].sum() == 0
    torch.testing.assert_close(post(shown["action"]), batch["action"], rtol=0, atol=0.15)


@pytest.mark.parametrize("data", ["streamed", "no state", "short"])
def test_data_that_cannot_be_relative(data, arm, tmp_path):
    root, config = shutil.copytree(arm, tmp_path / "data"), relative_config("vlm")
    config.input_features[STATE] = PolicyFeature(FeatureType.STATE, (7,))
    if data == "streamed":
        shutil.rmtree(root / "data")
        message = "use_relative_actions=True reads actions and states .*Download the data set"
    elif data == "no state":
        (file,) = (root / "data").glob("*/*.parquet")
        pq.write_table(pq.read_table(file).drop_columns([STATE]), file)
        message = "use_relative_actions=True needs observation.state, and .*'action'"
    else:
        config.chunk_size, message = 11, "no episode of .* has the 11 frames of a chunk .*Lower chunk_size"
    with pytest.raises(ValueError, match=message):
        prepare_data(config, LeRobotDatasetMetadata("local/arm", root=root))


def test_a_data_set_without_a_state_is_refused_at_the_start(arm):
    meta = arm_data(arm).meta
    features = {key: value for key, value in meta.features.items() if key != STATE}
    config = relative_config("vlm")
    del config.input_features[STATE]
    with pytest.raises(ValueError, match="use_relative_actions=True needs the feature observation.state"):
        prepare_data(config, SimpleNamespace(features=features, stats=meta.stats, tasks=meta.tasks, root=arm))


def test_a_name_that_excludes_nothing(arm, caplog):
    config = relative_config("vlm", relative_exclude_joints=["hand"])
    prepare_data(config, arm_data(arm).meta)
    assert "relative_exclude_joints=['hand'] excludes nothing" in caplog.text
    assert config.relative_exclude_joints == []


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(arm, tiny_vlm, tmp_path_factory):
    dataset = arm_data(arm)
    policy = make_policy(unfilled(tiny_vlm, n_action_steps=4), ds_meta=dataset.meta).eval()
    randomise(policy)
    out = tmp_path_factory.mktemp("relative") / "checkpoint"
    for part in (policy, *make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)):
        part.save_pretrained(out)
    return out


def test_an_agent_moves_from_where_the_robot_is(trained):
    agent = Agent.from_pretrained(trained, device="cpu")
    pixels = {"image": np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)}
    joints = np.linspace(-30, 30, 7)
    there = agent.act({"pixels": pixels, "agent_pos": joints}, "wave")
    queued = agent.act({"pixels": pixels, "agent_pos": joints + 5}, "wave")
    agent.reset()
    still = [agent.act({"pixels": pixels, "agent_pos": joints}, "wave") for _ in range(2)]
    np.testing.assert_allclose([there, queued], still, atol=1e-4)
    agent.reset()
    moved = agent.act({"pixels": pixels, "agent_pos": joints + 5}, "wave")
    np.testing.assert_allclose(moved - there, [5.0] * 6 + [0], atol=1e-4)
    with pytest.raises(ValueError, match="use_relative_actions=True needs 'agent_pos'"):
        agent.act({"pixels": pixels}, "wave")


def test_a_server_gives_the_commands_of_the_local_policy(trained, arm):
    """The server writes what the local policy writes; the robot moves while a chunk is executed."""
    policy = VLA0Policy.from_pretrained(trained)
    pre, post = make_pre_post_processors(policy.config, str(trained))
    pixels = make_batch(rows=1)["observation.images.image"]
    batches = [
        {"observation.images.image": pixels, STATE: state_at(t, 1)[:, :7], "task": ["wave"]} for t in range(5)
    ]
    chunk = policy.predict_action_chunk(pre(dict(batches[0])))
    with serving() as server:
        server.behaviour = " ".join(str(int(value)) for value in chunk.flatten())
        distant, _ = remote((trained, {}), server.url)
        for t, batch in enumerate(batches):
            inputs = pre(dict(batch))
            command = post(distant.select_action(inputs))
            if t < 4:  # n_action_steps; then the stand-in repeats itself
                close(command, post(policy.select_action(inputs)))
        again = post(distant.predict_action_chunk(inputs))
        torch.testing.assert_close(command, again[:, 0], rtol=0, atol=1e-4)
        assert len(server.requests) == 3
    assert len(np.unique(chunk.numpy())) > 10


@pytest.mark.parametrize(
    ("override", "value"), [("use_relative_actions", False), ("relative_exclude_joints", ["joint_0"])]
)
def test_a_checkpoint_keeps_what_its_integers_mean(override, value, trained):
    config = PreTrainedConfig.from_pretrained(trained)
    setattr(config, override, value)
    with pytest.raises(ValueError, match=f"{override}=.* differs from the checkpoint's"):
        VLA0Policy.from_pretrained(trained, config=config)


def _drop(steps, name):
    steps[:] = [step for step in steps if name not in str(step)]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "post",
            lambda steps: _drop(steps, "absolute_actions"),
            r"enabled=\[\] of .*use_relative_actions=True",
        ),
        (
            "pre",
            lambda steps: _drop(steps, "relative_actions"),
            r"enabled=\[\] of .*use_relative_actions=True",
        ),
        ("post", lambda steps: steps[2]["config"].update(enabled=False), r"enabled=\[False\] of"),
        ("pre", lambda steps: steps[3]["config"].update(exclude_joints=[]), r"exclude_joints=\[\] of"),
        ("pre", lambda steps: steps[3]["config"].update(action_names=None), "action_names=None of"),
        ("pre", lambda steps: steps[3].update({"class": "os.system"}), "could run code"),
    ],
)
def test_processors_that_do_not_fit_the_config(kind, change, message, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoint")
    file = folder / f"policy_{kind}processor.json"
    content = json.loads(file.read_text())
    change(content["steps"])
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        VLA0Policy.from_pretrained(folder)


def test_an_export_says_that_its_actions_are_relative(trained, tmp_path):
    main(["export", f"--policy.path={trained}", f"--out={tmp_path / 'model'}"])
    spec = json.loads((tmp_path / "model/action_spec.json").read_text())
    assert spec["relative"].startswith("add the state") and "'gripper'" in spec["relative"]
    main(["import", f"--from={tmp_path / 'model'}", f"--out={tmp_path / 'again'}"])
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((trained / name).read_text())
    VLA0Policy.from_pretrained(tmp_path / "again")


def test_absolute_checkpoints_have_no_such_steps(processors):
    for processor in processors:
        assert not [step for step in processor.steps if "Actions" in type(step).__name__]


def test_stats_of_conftest_are_enough(tiny_vlm):
    """Statistics of the state are not needed where it is only subtracted."""
    make_vla0_pre_post_processors(relative_config(tiny_vlm), {"action": make_stats()["action"]})


@pytest.mark.slow
def test_both_trainers_and_evaluation(arm, tiny_vlm, process_env, tmp_path):
    data = ["--dataset.repo_id=local/arm", f"--dataset.root={arm}", "--policy.use_relative_actions=true"]
    train = [*data, "--policy.device=cpu", "--num_workers=0", "--policy.push_to_hub=false", "--batch_size=2",
             "--steps=1", "--save_freq=1", "--log_freq=1"]  # fmt: skip
    run_script(
        "lerobot-train", "--policy.type=vla0", *train, f"--policy.vlm={tiny_vlm}", "--policy.image_size=56",
        "--policy.dtype=float32", f"--output_dir={tmp_path / 'one'}", env=process_env,
    )  # fmt: skip
    first = tmp_path / "one/checkpoints/last/pretrained_model"
    run_script(
        "lerobot-train", f"--policy.path={first}", *train, f"--output_dir={tmp_path / 'two'}", env=process_env
    )
    run_script(
        "lerobot-vla0", "sft", f"--policy.path={first}", *data, "--use_cpu", "--max_steps=1",
        "--per_device_train_batch_size=2", f"--output_dir={tmp_path / 'three'}", env=process_env,
    )  # fmt: skip
    last = [tmp_path / "two/checkpoints/last/pretrained_model", tmp_path / "three/final"]
    for folder in (first, *last):
        agent = Agent.from_pretrained(folder, device="cpu")
        assert agent.postprocess.steps[2].relative_step is agent.preprocess.steps[3]
        low, high = (agent.postprocess.steps[1].stats["action"][name] for name in ("min", "max"))
        assert (torch.as_tensor(high) - torch.as_tensor(low))[:6].max() < 20


@pytest.mark.slow
def test_lerobot_eval_here_and_with_a_server(tiny_vlm, process_env, tmp_path):
    """In LIBERO's environment, whose state begins with the hand's place: the numbers mean nothing, but pass
    through the script. Without and with a server that writes the middle of the range, 0 to the state."""
    policy = VLA0Policy(relative_config(tiny_vlm, size=256, chunk_size=2, n_action_steps=2)).eval()
    randomise(policy)
    for part in (policy, *make_vla0_pre_post_processors(policy.config, make_stats())):
        part.save_pretrained(tmp_path / "checkpoint")
    with serving() as server:
        server.behaviour = " ".join(["500"] * 14)
        for name, options in {"here": [], "there": [f"--policy.server={server.url}"]}.items():
            run_script(
                "lerobot-eval", f"--policy.path={tmp_path / 'checkpoint'}", "--policy.device=cpu", *options,
                "--env.type=vla0_libero", "--env.task=libero_object", "--env.task_ids=[7]",
                "--env.assets=primitive", "--env.episode_length=3", "--eval.batch_size=1",
                "--eval.n_episodes=1", f"--output_dir={tmp_path / name}", env=process_env,
            )  # fmt: skip
            info = json.loads((tmp_path / name / "eval_info.json").read_text())
            assert info["overall"]["n_episodes"] == 1
        assert len(server.requests) == 2  # three steps, two of a chunk
