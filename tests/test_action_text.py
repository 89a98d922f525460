"""Numbers ↔ text: the codec, and the grammar with its regular expression."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lerobot_vla0.action_text import ActionCodec, IntegerGrammar, PartialAnswer, integer_regex


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


def test_not_finite_is_refused():
    actions = torch.zeros(2, 3)
    actions[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf \(first at index \[1, 2\]"):
        ActionCodec().encode(actions)


@given(hnp.arrays(np.int64, (2, 3), elements=st.integers(0, 1000)))
def test_text_round_trip(bins):
    codec = ActionCodec(1000)
    text = codec.to_text(torch.from_numpy(bins))
    assert codec.from_text(text, (2, 3)).tolist() == bins.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 4 5", "got 5"),
        ("1 2 3 1001", "got '1001'"),
        ("1 2 ٣ 4", "got '٣'"),
    ],
)
def test_text_that_breaks_the_format(text, message):
    with pytest.raises(ValueError, match=message):
        ActionCodec(1000).from_text(text, (2, 2))


# grammar

DIGITS, SPACE, END = list(range(15, 25)), 220, 151645  # Qwen's ids


def make(count: int, maximum: int) -> IntegerGrammar:
    return IntegerGrammar(count, maximum, DIGITS, SPACE, END)


def spell(grammar: IntegerGrammar, symbols) -> str:
    names = {**{t: str(d) for d, t in enumerate(DIGITS)}, SPACE: " ", END: "."}
    return "".join(names[grammar.token_ids[s]] for s in symbols)


def after(grammar: IntegerGrammar, text: str) -> PartialAnswer:
    """The state after `text`, every character of which must be allowed."""
    state = PartialAnswer()
    for character in text:
        symbol = {" ": grammar.space, ".": grammar.end}.get(character)
        symbol = grammar.digit_symbols[int(character)] if symbol is None else symbol
        assert grammar.allowed(state)[symbol], text
        grammar.append(state, symbol)
    return state


@settings(deadline=None, max_examples=60)
@given(
    horizon=st.integers(1, 4),
    dim=st.integers(1, 8),
    maximum=st.integers(2, 12_345),
    seed=st.integers(0, 2**31),
)
def test_random_logits_always_give_a_valid_text(horizon, dim, maximum, seed):
    grammar, generator = make(horizon * dim, maximum), np.random.default_rng(seed)
    state, symbols = PartialAnswer(), []
    while not grammar.finished(state):
        logits = np.where(grammar.allowed(state), generator.standard_normal(12), -np.inf)
        symbols.append(int(logits.argmax()))
        grammar.append(state, symbols[-1])
    text = spell(grammar, symbols)
    assert re.fullmatch(r"(0|[1-9]\d*)( (0|[1-9]\d*))*\.", text)
    values = [int(v) for v in text[:-1].split(" ")]
    assert len(values) == grammar.count and max(values) <= maximum
    assert state.integers == values


@pytest.mark.parametrize("maximum", [2, 9, 10, 15, 100, 105, 1000])
def test_language_is_exactly_the_integers(maximum):
    """Every text of one integer that the automaton admits, by exhaustive search."""
    grammar = make(1, maximum)
    texts, frontier = set(), [((), PartialAnswer())]
    while frontier:
        path, state = frontier.pop()
        for symbol in grammar.allowed(state).nonzero()[0].tolist():
            longer = state.copy()
            grammar.append(longer, symbol)
            if grammar.finished(longer):
                texts.add(spell(grammar, (*path, symbol)))
            else:
                frontier.append(((*path, symbol), longer))
    assert texts == {f"{v}." for v in range(maximum + 1)}


def test_forced_tokens_at_1000_bins():
    """After 0, after three digits other than 100 and after 1000 only the separator may follow (FACTS: 56 of
    208)."""
    grammar = make(2, 1000)
    for text in ("0", "101", "999", "1000"):
        assert grammar.forced(after(grammar, text)) == grammar.space
        assert grammar.forced(after(grammar, f"5 {text}")) == grammar.end
    for text in ("", "7", "10", "100", "5 "):
        assert grammar.forced(after(grammar, text)) is None


@given(count=st.integers(1, 60), maximum=st.sampled_from([1, 9, 10, 1000, 4095]))
def test_longest_answer(count, maximum):
    grammar = make(count, maximum)
    answer, tokens = PartialAnswer(), 0
    for _ in range(count):
        spelled = grammar.spell(maximum, answer)
        grammar.append(answer, *spelled)
        tokens += len(spelled)
    assert grammar.finished(answer) and tokens == grammar.max_tokens


def test_symbols_ascend_by_token_id():
    grammar = IntegerGrammar(1, 10, [90, 80, 70, 60, 50, 40, 30, 20, 10, 5], 7, 1)
    assert grammar.token_ids == sorted(grammar.token_ids)
    assert [grammar.token_ids[s] for s in grammar.digit_symbols] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 5]
    assert (grammar.token_ids[grammar.space], grammar.token_ids[grammar.end]) == (7, 1)


@given(
    maximum=st.integers(1, 3000),
    integer=st.integers(-50, 5000),
    written=st.integers(-1, 3000),
)
def test_nearest_integer_that_begins_with_what_is_written(maximum, integer, written):
    written = min(written, maximum)
    candidates = range(maximum + 1)
    if written >= 0:
        candidates = [v for v in candidates if str(v).startswith(str(written))]
    nearest = make(1, maximum).nearest(integer, written)
    assert nearest in candidates
    assert abs(nearest - integer) == min(abs(v - integer) for v in candidates)


def test_spelling_completes_what_is_written():
    grammar = make(2, 1000)
    assert spell(grammar, grammar.spell(474, PartialAnswer())) == "474 "
    assert spell(grammar, grammar.spell(474, after(grammar, "47"))) == "4 "
    assert spell(grammar, grammar.spell(0, after(grammar, "5 "))) == "0."


@pytest.mark.parametrize("maximum", [1, 2, 9, 10, 19, 20, 100, 101, 255, 407, 999, 1000, 1001, 2047])
def test_regex_is_the_same_language(maximum):
    number = re.compile(integer_regex(maximum))
    assert [i for i in range(3000) if number.fullmatch(str(i))] == list(range(maximum + 1))
    assert not any(number.fullmatch(text) for text in ("00", "01", "", "-1", " 1"))
    text = re.compile(IntegerGrammar(3, maximum, list(range(10)), 10, 11).regex())
    assert text.fullmatch(f"0 {maximum} 1")
    for wrong in ("0 1", "0 1 1 1", f"0 1 {maximum + 1}", "0  1 1", "0 1 1 "):
        assert not text.fullmatch(wrong)


@pytest.mark.parametrize("prefix", [[], [0], [7, 12], [7, 12, 3]])
def test_regex_behind_a_prefix(prefix):
    text = re.compile(IntegerGrammar(3, 12, list(range(10)), 10, 11).regex(prefix))
    for integers in itertools.product([0, 3, 7, 12], repeat=3):
        matches = text.fullmatch(" ".join(map(str, integers)))
        assert bool(matches) == (list(integers[: len(prefix)]) == prefix)
    assert not text.fullmatch(" ".join(map(str, [*prefix, *[1] * (4 - len(prefix))])))
