import dataclasses
import re

import draccus
import pytest
import torch
import yaml
from conftest import make_config
from draccus.utils import DecodingError
from draccus.wrappers.docstring import get_attribute_docstring, get_preferred_help_text
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.envs.configs import EnvConfig

from lerobot_vla0 import VLA0Config


def test_is_registered_as_vla0():
    assert PreTrainedConfig.get_choice_class("vla0") is VLA0Config
    assert VLA0Config(device="cpu").type == "vla0"


def test_defaults_are_the_published_recipe():
    config = VLA0Config(device="cpu")
    assert (config.vlm, config.chunk_size, config.n_action_steps) == ("Qwen/Qwen2.5-VL-3B-Instruct", 8, 8)
    assert (config.num_bins, config.image_size, config.crop_ratio) == (1000, 224, 0.875)
    assert config.jitter == (0.2, 0.2, 0.2, 0.05)
    assert (config.action_mask_prob, config.action_mask_skip_prob) == (0.4, 0.1)
    optimizer = config.get_optimizer_preset()
    assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip_norm) == (4e-5, 1e-10, 1.0)
    assert config.get_scheduler_preset() is None
    assert VLA0Config(device="cpu", scheduler_warmup_steps=5).get_scheduler_preset().num_warmup_steps == 5
    assert config.action_delta_indices == list(range(8)) and config.observation_delta_indices is None


def test_cosine_decay():
    """LeRobot's schedule: after the warm-up from optimizer_lr down to scheduler_decay_lr."""
    settings = {"scheduler_warmup_steps": 10, "scheduler_decay_steps": 100, "scheduler_decay_lr": 1e-6}
    scheduler = VLA0Config(device="cpu", **settings).get_scheduler_preset()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=4e-5)
    schedule = scheduler.build(optimizer, num_training_steps=200)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(150):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] < 5e-6 and max(rates) == pytest.approx(4e-5, rel=0.03)
    assert rates[50] == pytest.approx((4e-5 + 1e-6) / 2) and rates[100:] == pytest.approx([1e-6] * 51)
    with pytest.raises(ValueError, match="scheduler_decay_steps=100 .* more than scheduler_warmup_steps"):
        VLA0Config(device="cpu", **{**settings, "scheduler_warmup_steps": 100})


def test_every_field_is_explained_in_help():
    """`lerobot-train --policy.type=vla0 --help` is the manual; its text is the comment above a field."""
    names = [f.name for f in dataclasses.fields(VLA0Config)]
    own = names[names.index("format_version") :]
    texts = [get_preferred_help_text(get_attribute_docstring(VLA0Config, name)) for name in own]
    assert all(text and "noqa" not in text and "%" not in text for text in texts)
    groups = [int(n) for text in texts for n in re.findall(r"\[(\d)\. ", text)]
    assert groups == [1, 2, 3, 4, 5, 6]


def test_round_trip(tmp_path):
    config = make_config("vlm", cameras=["observation.images.image2"], num_bins=255)
    config.save_pretrained(tmp_path)
    loaded = PreTrainedConfig.from_pretrained(tmp_path)
    assert loaded == config


def test_a_server_is_not_saved(tmp_path):
    config = make_config("vlm", server="http://localhost:8000/v1", server_model="mine")
    config.save_pretrained(tmp_path)
    assert config.server == "http://localhost:8000/v1"
    assert PreTrainedConfig.from_pretrained(tmp_path).server is None


INF, NAN = float("inf"), float("nan")
IMAGE2 = "observation.images.image2"
REFUSED = [
    ("chunk_size", 10**9, "at most 1024"),
    ("num_bins", 10**9, "at most 100000"),
    ("image_size", 10**9, "at most 4096"),
    ("temperature", INF, "at least 0 and finite"),
    ("temperature", NAN, "at least 0 and finite"),
    ("server_timeout", INF, "above 0 and finite"),
    ("optimizer_lr", NAN, "above 0 and finite"),
    ("optimizer_weight_decay", INF, "at least 0 and finite"),
    ("optimizer_grad_clip_norm", NAN, "at least 0 and finite"),
    ("dtype", "fp8", "one of bfloat16, float16, float32"),
    ("n_obs_steps", 2, "1 \\(VLA-0 has no history\\)"),
    ("chunk_size", 0, "at least 1"),
    ("n_action_steps", 9, "1..chunk_size \\(8\\)"),
    ("num_bins", 1, "at least 2"),
    ("temperature", -1.0, "at least 0"),
    ("draft_length", -1, "None or in 0..63"),
    ("ensemble_size", 0, "at least 1"),
    ("ensemble_weight", 0.0, "in \\(0, 1\\]"),
    ("cameras", [], "list of different image keys"),
    ("cameras", ["a", "a"], "list of different image keys"),
    ("camera_regions", {"a": [0.5, 0.0, 0.6, 1.0]}, "of a part that lies in it"),
    ("camera_regions", {"a": [0.0, 0.0, 0.0, 1.0]}, "of a part that lies in it"),
    ("camera_regions", {"a": [0.0, 0.0, 1.0]}, "\\[top, left, height, width\\]"),
    ("image_size", 0, "at least 1 pixel"),
    ("crop_ratio", 1.2, "in \\(0, 1\\]"),
    ("jitter_hue", 0.6, "in \\[0, 0.5\\]"),
    ("jitter_contrast", -0.1, "in \\[0, 1\\]"),
    ("action_norm", "episode", "dataset or task"),
    ("server_timeout", 0.0, "above 0"),
    ("action_mask_prob", 1.5, "in \\[0, 1\\]"),
    ("optimizer_lr", 0.0, "above 0"),
    ("scheduler_warmup_steps", -1, "at least 0"),
    ("scheduler_decay_steps", -1, "at least 0"),
    ("scheduler_decay_lr", -1e-6, "at least 0 and finite"),
    ("empty_cameras", -1, "at least 0"),
    ("image_fit", "stretch", "squash, letterbox or crop"),
    ("chunk_size", None, "at least 1"),
    ("n_action_steps", None, "1..chunk_size \\(8\\)"),
    ("optimizer_betas", (0.9, 1.0), "two numbers in \\[0, 1\\)"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED)
def test_errors_name_field_value_and_what_is_allowed(field, value, allowed):
    message = f"{field}={re.escape(repr(value))} is not allowed: it must be .*{allowed}"
    with pytest.raises(ValueError, match=message):
        VLA0Config(device="cpu", **{field: value})


@dataclasses.dataclass
class Script:
    """As the configs of LeRobot's scripts."""

    policy: PreTrainedConfig | None = None
    env: EnvConfig | None = None


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED)
def test_errors_keep_their_reason_on_a_command_line(field, value, allowed):
    text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
    value = "(?:" + "|".join(re.escape(repr(v)) for v in (value, str(value))) + ")"  # draccus makes no types
    with pytest.raises(DecodingError, match=f"{field}={value} is not allowed: it must be .*{allowed}"):
        draccus.parse(Script, args=["--policy.type=vla0", f"--policy.{field}={text}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy.type=vla0", "--policy.ensemble_size=8"], "ensemble_size=8 has nothing to average"),
        (
            ["--policy.type=vla0", "--policy.normalization_mapping={ACTION: MEAN_STD}"],
            r"normalization_mapping\['STATE'\]=None is not allowed: it must be one of MIN_MAX, QUANTILES",
        ),
        (["--env.type=vla0_libero", "--env.task=libero_foo"], "unknown LIBERO suite 'libero_foo'. Known:"),
        (["--env.type=vla0_libero", "--env.task_ids=[10]"], "libero_object has the tasks 0..9, not"),
    ],
)
def test_errors_of_several_fields_and_of_the_environment(arguments, message):
    with pytest.raises(DecodingError, match=message):
        draccus.parse(Script, args=arguments)


@pytest.mark.parametrize(
    "text", ["[observation.images.image2, observation.images.image]", '["b", "a"]', "[b]", "null"]
)
def test_lists_and_dicts_are_yaml_for_new_policies_and_for_saved_ones(text, tmp_path):
    make_config("vlm", cameras=["a"]).save_pretrained(tmp_path)
    mapping = "{VISUAL: IDENTITY, STATE: QUANTILES, ACTION: QUANTILE10}"
    arguments = [
        f"--cameras={text}",
        f"--normalization_mapping={mapping}",
        "--camera_regions={b: [0, 0, 1, 0.5]}",
    ]
    saved = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=arguments)
    new = draccus.parse(VLA0Config, args=arguments)
    for config in (saved, new):
        assert config.cameras == yaml.safe_load(text) and config.camera_regions == {"b": [0, 0, 1, 0.5]}
        assert config.normalization_mapping == yaml.safe_load(mapping)
        assert config.normalization_mapping["ACTION"] is NormalizationMode.QUANTILE10
    saved.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path) == saved


def test_ensembling_needs_overlap():
    with pytest.raises(ValueError, match="ensemble_size=8 has nothing to average: n_action_steps=8"):
        VLA0Config(device="cpu", ensemble_size=8)
    assert VLA0Config(device="cpu", ensemble_size=8, n_action_steps=7).ensemble_size == 8
    with pytest.raises(ValueError, match="stream=True is not allowed: it must be False with ensemble_size"):
        VLA0Config(device="cpu", ensemble_size=8, n_action_steps=1, stream=True)


@pytest.mark.parametrize("kind", ["ACTION", "STATE", "VISUAL"])
def test_normalization_without_bounds_is_refused(kind):
    mapping = VLA0Config(device="cpu").normalization_mapping | {kind: NormalizationMode.MEAN_STD}
    with pytest.raises(ValueError, match=f"normalization_mapping\\['{kind}'\\]"):
        VLA0Config(device="cpu", normalization_mapping=mapping)


def test_quantiles_are_accepted():
    mapping = VLA0Config(device="cpu").normalization_mapping | {"ACTION": NormalizationMode.QUANTILES}
    VLA0Config(device="cpu", normalization_mapping=mapping)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"output_features": {}}, "needs an `action` feature"),
        ({"output_features": {"action": PolicyFeature(FeatureType.ACTION, (2, 7))}}, "must be a vector"),
        (
            {"input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (8,))}},
            "at least one camera",
        ),
        (
            {"cameras": ["observation.images.top"]},
            "which are not there. Present: .*observation.images.image2",
        ),
        (
            {"camera_regions": {"observation.images.top": [0, 0, 1, 1]}},
            r"camera_regions=.* names \['observation.images.top'\], which are not there",
        ),
        (
            {"cameras": [IMAGE2], "camera_regions": {"observation.images.image": [0, 0, 1, 1]}},
            f"which are not there. Present: .'{IMAGE2}'",
        ),
        (
            {
                "input_features": {
                    "observation.images.colour": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
                    "observation.images.depth": PolicyFeature(FeatureType.VISUAL, (1, 64, 64)),
                }
            },
            r"camera observation.images.depth has shape \(1, 64, 64\): .*"
            r"--policy.cameras='\[observation.images.colour\]'",
        ),
        (
            {
                "use_state": True,
                "input_features": {"observation.images.a": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))},
            },
            "use_state=True needs the feature observation.state",
        ),
    ],
)
def test_features(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_config("vlm", **overrides).validate_features()
