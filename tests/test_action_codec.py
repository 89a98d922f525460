import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lerobot_vla0.action_codec import ActionCodec


@given(
    actions=hnp.arrays(np.float32, (3, 4), elements=st.floats(-1, 1, width=32)),
    num_bins=st.integers(2, 10_000),
)
def test_round_trip_within_half_a_bin(actions, num_bins):
    codec = ActionCodec(num_bins)
    bins, clipped = codec.encode(torch.from_numpy(actions))
    assert not clipped.any() and bins.min() >= 0 and bins.max() <= num_bins
    error = (codec.decode(bins) - torch.from_numpy(actions)).abs().max().item()
    assert error <= 1 / codec.num_bins + 1e-6


def test_is_the_papers_formula():
    """round((a - min) / (max - min) * 1000) on the statistics of the published LIBERO checkpoint."""
    low, high, value = -0.2582143, 0.3557143, 0.0642857
    normalised = torch.tensor([2 * (value - low) / (high - low) - 1])
    assert ActionCodec(1000).encode(normalised)[0].item() == round((value - low) / (high - low) * 1000)


def test_values_outside_clip_and_are_counted():
    bins, clipped = ActionCodec(1000).encode(torch.tensor([-3.0, -1.0005, -1.0, 1.0, 1.0005, 1.002]))
    assert bins.tolist() == [0, 0, 0, 1000, 1000, 1000]
    assert clipped.tolist() == [True, False, False, False, False, True]


def test_fractional_bins_decode_between():
    assert ActionCodec(1000).decode(torch.tensor([499.5])).item() == pytest.approx(-0.001, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    actions = torch.zeros(2, 3)
    actions[1, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or inf \(first at index \[1, 2\]"):
        ActionCodec().encode(actions)


def test_num_bins_below_two():
    with pytest.raises(ValueError, match="num_bins must be at least 2, got 1"):
        ActionCodec(1)


@given(hnp.arrays(np.int64, (2, 3), elements=st.integers(0, 1000)))
def test_text_round_trip(bins):
    codec = ActionCodec(1000)
    text = codec.to_text(torch.from_numpy(bins))
    assert codec.from_text(text, (2, 3)).tolist() == bins.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", "expected 4 integers, got 3"),
        ("1 2 3 4 5", "got 5"),
        ("1 2 3 1001", "got '1001'"),
        ("1 2 -3 4", "got '-3'"),
        ("1 2 ٣ 4", "got '٣'"),
    ],
)
def test_text_that_breaks_the_format(text, message):
    with pytest.raises(ValueError, match=message):
        ActionCodec(1000).from_text(text, (2, 2))
