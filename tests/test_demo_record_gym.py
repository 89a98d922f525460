"""Settings of the recorder; what it records is tested in test_pusht.py and test_aloha.py."""

import math

import pytest

from lerobot_vla0.demo.record_gym import SCENES, GymRecordConfig, record_gym


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"env": "xarm"}, "env='xarm' must be one of pusht, aloha"),
        ({"episodes": 0}, "episodes=0 must be at least 1"),
        ({"workers": 0}, "workers=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"first_seed": -1}, "first_seed=-1"),
        ({"noise": math.nan}, "noise=nan"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        record_gym(GymRecordConfig(out=tmp_path / "data", **setting))
    assert not (tmp_path / "data").exists()


def test_never_overwrites(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        record_gym(GymRecordConfig(out=tmp_path))


@pytest.mark.parametrize("env", SCENES)
def test_names_are_those_of_lerobots_environment(env):
    """Camera, state and action, as `lerobot-eval` gives them to a policy."""
    from lerobot.envs.utils import env_to_policy_features

    features = env_to_policy_features(SCENES[env].config())
    assert SCENES[env].camera in features and features["action"].shape == (len(SCENES[env].names),)


def test_nothing_is_left_where_nothing_was_solved(tmp_path):
    pytest.importorskip("gym_pusht")
    out = tmp_path / "data"
    with pytest.raises(RuntimeError, match="the expert solved none of 1 episodes of pusht"):
        record_gym(GymRecordConfig(out=out, episodes=1, max_steps=2))
    assert not out.exists()
