"""LeRobot's next version (0.6.2, unreleased): the policy on a stand-in of its base class, with the contract
that its main branch has."""

from typing import ClassVar

import pytest
import torch
from conftest import make_batch, make_config, observation
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION

from lerobot_vla0.modeling_vla0 import VLA0Policy


class NextPreTrainedPolicy(PreTrainedPolicy):
    """What changes in the base class, in behaviour; names and calls as there."""

    config_class = name = "stand-in"
    _fsdp_wrap_modules: ClassVar[list[str] | None] = None
    _action_queue_attrs: ClassVar[tuple[str, ...]] = ("_queues", "_action_queue")

    def post_init(self) -> None:
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, self.config.dtype))

    def save_pretrained(self, save_directory, **kwargs) -> None:
        save_directory.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(save_directory)  # in every process, without state_dict

    def _save_pretrained(self, save_directory) -> None:
        super()._save_pretrained(save_directory)

    def drop_queued_actions(self) -> None:
        for name in self._action_queue_attrs:
            queue = getattr(self, name, None)
            if isinstance(queue, dict):
                if ACTION in queue:
                    queue[ACTION].clear()
            elif queue is not None:
                queue.clear()

    def supports_text_generation(self) -> bool:
        return False

    def generate_text(self, batch) -> str:
        raise NotImplementedError


@pytest.fixture
def next_lerobot():
    VLA0Policy.__bases__ = (NextPreTrainedPolicy,)
    yield
    VLA0Policy.__bases__ = (PreTrainedPolicy,)


def make_policy(vlm, **overrides) -> VLA0Policy:
    policy = VLA0Policy(make_config(vlm, **overrides)).eval()
    policy.post_init()  # LeRobot calls it when construction has finished
    return policy


def test_rotary_buffers_stay_float32(next_lerobot, tiny_vlm):
    policy = make_policy(tiny_vlm, dtype="bfloat16")
    assert policy.model.dtype == torch.bfloat16
    assert policy.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_saves_without_state_dict_and_loads(next_lerobot, tiny_vlm, processors, tmp_path):
    policy = make_policy(tiny_vlm)
    policy.save_pretrained(tmp_path / "checkpoint")
    for processor in processors:
        processor.save_pretrained(tmp_path / "checkpoint")
    loaded = VLA0Policy.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in policy.state_dict().items())


def test_only_the_main_process_writes_the_vlms_files(next_lerobot, tiny_vlm, tmp_path, monkeypatch):
    policy = make_policy(tiny_vlm)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    policy.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint/vlm").exists()


@pytest.mark.parametrize("settings", [{"n_action_steps": 4}, {"n_action_steps": 2, "ensemble_size": 3}])
def test_dropped_actions_are_decided_anew(settings, next_lerobot, tiny_vlm, processors):
    """As when a person gives another instruction in the middle of a chunk."""
    policy = make_policy(tiny_vlm, **settings)
    before, after = (observation(processors[0](make_batch(rows=1, seed=seed))) for seed in (0, 3))
    expected = policy.predict_action_chunk(after)[:, 0]
    policy.reset()
    first = policy.select_action(before)
    assert not torch.equal(policy.select_action(after), expected)  # still the first chunk's
    policy.drop_queued_actions()
    assert torch.equal(policy.select_action(after), expected) and first.shape == (1, 7)


def test_blocks_that_fsdp_wraps(next_lerobot, tiny_vlm):
    policy = make_policy(tiny_vlm)
    names = {type(module).__name__ for module in policy.modules()}
    assert type(policy)._fsdp_wrap_modules and names.issuperset(type(policy)._fsdp_wrap_modules)


def test_text_is_not_promised(next_lerobot, tiny_vlm):
    """The new base class refuses one of the two methods without the other."""
    policy = make_policy(tiny_vlm)
    assert not policy.supports_text_generation()
    assert type(policy).generate_text is NextPreTrainedPolicy.generate_text
