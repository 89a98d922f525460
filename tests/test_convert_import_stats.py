import json
import pickle

import numpy as np
import pytest

from lerobot_vla0.convert.import_stats import read_stats


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_pickle_gets_no_builtin_function(name, tmp_path):
    (tmp_path / "stats.pkl").write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"it asks for builtins.{name}"):
        read_stats(tmp_path / "stats.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"action": {"min": [0], "max": [1]}}, r"expected \{'out_ori_act'.*found \['action'\]"),
        ([1, 2], "expected .*found list"),
        ({"out_ori_act": {"mean": [0]}}, r"found \['mean'\]"),
        ({"out_ori_act": {"min": ["a"], "max": [1]}}, "no lists of numbers"),
        ({"out_ori_act": {"min": [0, 0], "max": [1]}}, "two lists of finite numbers"),
        ({"out_ori_act": {"min": [0], "max": [float("nan")]}}, "two lists of finite numbers"),
        ({"out_ori_act": {"min": [2], "max": [1]}}, "min not above max"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_other_statistics(content, message, suffix, tmp_path):
    file = tmp_path / f"stats.{suffix}"
    file.write_bytes(json.dumps(content).encode() if suffix == "json" else pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_stats(file)


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol(protocol, tmp_path):
    stats = {"out_ori_act": {"min": np.array([-0.9375, -1.0]), "max": np.array([0.375, 1.0], np.float32)}}
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(stats, protocol))
    np.testing.assert_allclose(read_stats(tmp_path / "stats.pkl")["max"], [0.375, 1.0])
