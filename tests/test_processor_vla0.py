import pytest
import torch
from conftest import make_batch, make_config, make_stats
from lerobot.configs import NormalizationMode
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline

from lerobot_vla0.processor_vla0 import ACTION_CLIPPED, make_vla0_pre_post_processors


def test_actions_to_integers_and_back():
    config = make_config("vlm")
    pre, post = make_vla0_pre_post_processors(config, make_stats(-2.0, 2.0))
    batch = make_batch()
    actions = batch["action"] * 2
    bins = pre({**batch, "action": actions})["action"]
    assert bins.dtype == torch.int64 and bins.shape == (4, 8, 7)
    assert torch.equal(bins, ((actions + 2) / 4 * 1000).round().long())
    assert (post(bins.float()) - actions).abs().max() <= 4 / 1000 / 2 + 1e-6
    assert post(bins[:, 0].float()).shape == (4, 7)


def test_constant_dimensions():
    """min == max (a gripper that never moved): no NaN, and the constant comes back."""
    stats = make_stats()
    for bound in ("min", "max"):
        stats["action"][bound][3] = 0.25
    pre, post = make_vla0_pre_post_processors(make_config("vlm"), stats)
    batch = make_batch()
    batch["action"][..., 3] = 0.25
    out = pre(batch)
    assert (out["action"][..., 3] == 0).all() and (out[ACTION_CLIPPED] == 0).all()
    for bins in (out["action"], torch.full_like(out["action"], 1000)):
        assert torch.allclose(post(bins.float())[..., 3], torch.tensor(0.25), atol=1e-6)


def test_clipping_is_counted_per_sample():
    pre, _ = make_vla0_pre_post_processors(make_config("vlm"), make_stats())
    batch = make_batch(rows=2)
    batch["action"][1, :2] = 1.7
    out = pre(batch)
    assert out[ACTION_CLIPPED].tolist() == [0.0, 0.25]
    assert out["action"].max() == 1000


def test_quantiles():
    config = make_config("vlm")
    config.normalization_mapping["ACTION"] = NormalizationMode.QUANTILES
    stats = make_stats()
    stats["action"] |= {"q01": torch.full((7,), -0.5), "q99": torch.full((7,), 0.5)}
    pre, post = make_vla0_pre_post_processors(config, stats)
    bins = pre({**make_batch(), "action": torch.full((1, 8, 7), 0.25)})["action"]
    assert (bins == 750).all() and torch.allclose(post(bins.float()), torch.tensor(0.25))
    with pytest.raises(ValueError, match=r"\['q01', 'q99'\] of 'action' are missing"):
        make_vla0_pre_post_processors(config, make_stats())


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_not_finite_actions(bad):
    pre, _ = make_vla0_pre_post_processors(make_config("vlm"), make_stats())
    batch = make_batch()
    batch["action"][2, 3, 4] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        pre(batch)


def test_save_load_and_overrides_of_lerobots_scripts(tmp_path):
    config = make_config("vlm", num_bins=500)
    pre, post = make_vla0_pre_post_processors(config, make_stats(-2, 2))
    pre.save_pretrained(tmp_path)
    post.save_pretrained(tmp_path)
    loaded = PolicyProcessorPipeline.from_pretrained(tmp_path, config_filename="policy_preprocessor.json")
    batch = make_batch()
    assert torch.equal(loaded(dict(batch))["action"], pre(dict(batch))["action"])
    # what lerobot-train passes when it fine-tunes a checkpoint on another data set
    stats = make_stats(-4, 4)
    features = {**config.input_features, **config.output_features}
    norm = {"features": features, "norm_map": config.normalization_mapping, "stats": stats}
    new_pre, new_post = make_pre_post_processors(
        config,
        pretrained_path=str(tmp_path),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "normalizer_processor": norm,
            "rename_observations_processor": {
                "rename_map": {"observation.images.front": "observation.images.image"}
            },
        },
        postprocessor_overrides={"unnormalizer_processor": {**norm, "features": config.output_features}},
    )
    front = batch.pop("observation.images.image")
    out = new_pre({**batch, "observation.images.front": front, "action": torch.full((1, 8, 7), 2.0)})
    assert (out["action"] == 375).all() and torch.equal(out["observation.images.image"], front)
    assert torch.allclose(new_post(out["action"].float()), torch.tensor(2.0))
