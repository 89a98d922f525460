import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_vla0.grammar import IntegerGrammar

DIGITS, SPACE, END = list(range(15, 25)), 220, 151645  # Qwen's ids


def make(count: int, maximum: int) -> IntegerGrammar:
    return IntegerGrammar(count, maximum, DIGITS, SPACE, END)


def spell(grammar: IntegerGrammar, symbols) -> str:
    names = {**{t: str(d) for d, t in enumerate(DIGITS)}, SPACE: " ", END: "."}
    return "".join(names[grammar.token_ids[s].item()] for s in symbols)


@settings(deadline=None, max_examples=60)
@given(
    horizon=st.integers(1, 4),
    dim=st.integers(1, 8),
    maximum=st.integers(2, 12_345),
    seed=st.integers(0, 2**31),
)
def test_random_logits_always_give_a_valid_text(horizon, dim, maximum, seed):
    grammar, rows = make(horizon * dim, maximum), 3
    generator = torch.Generator().manual_seed(seed)
    state, symbols = grammar.start(rows), []
    while not (state.index == grammar.count).all():
        logits = torch.randn(rows, 12, generator=generator).masked_fill(~grammar.allowed(state), -torch.inf)
        symbols.append(logits.argmax(-1))
        state = grammar.advance(state, symbols[-1])
    for row, integers in zip(torch.stack(symbols, 1), state.integers, strict=True):
        text = spell(grammar, row)
        body, end, padding = text.partition(".")
        assert end and set(padding) <= {"."}
        assert re.fullmatch(r"(0|[1-9]\d*)( (0|[1-9]\d*))*", body)
        values = [int(v) for v in body.split(" ")]
        assert len(values) == grammar.count and max(values) <= maximum
        assert integers.tolist() == values


@pytest.mark.parametrize("maximum", [2, 9, 10, 15, 100, 105, 1000])
def test_language_is_exactly_the_integers(maximum):
    """Every text of one integer that the automaton admits, by exhaustive search."""
    grammar = make(1, maximum)
    texts, frontier = set(), [((), grammar.start(1))]
    while frontier:
        path, state = frontier.pop()
        for symbol in grammar.allowed(state)[0].nonzero()[:, 0].tolist():
            after = grammar.advance(state, torch.tensor([symbol]))
            if after.index.item() == 1:
                texts.add(spell(grammar, (*path, symbol)))
            else:
                frontier.append(((*path, symbol), after))
    assert texts == {f"{v}." for v in range(maximum + 1)}


def test_forced_tokens_at_1000_bins():
    """After 0, after three digits other than 100 and after 1000 only the separator may follow (FACTS: 56 of
    208)."""
    grammar = make(2, 1000)
    for text, forced in {
        "0": True,
        "7": False,
        "10": False,
        "100": False,
        "101": True,
        "1000": True,
        "": False,
    }.items():
        state = grammar.start(1)
        for digit in text:
            state = grammar.advance(state, (grammar.digits == int(digit)).nonzero()[0])
        assert (grammar.allowed(state).sum() == 1).item() == forced, text


def test_symbols_ascend_by_token_id():
    grammar = IntegerGrammar(1, 10, [90, 80, 70, 60, 50, 40, 30, 20, 10, 5], 7, 1)
    assert grammar.token_ids.tolist() == sorted(grammar.token_ids.tolist())
    assert grammar.digits.tolist() == [-1, 9, -1, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_rows_are_independent():
    """A batch of rows at different places moves as each row alone would."""
    grammar = make(2, 99)
    texts = ["7 12.", "0 0..", "99 5.", "12 34"]
    ids = {" ": grammar.space, ".": grammar.end}
    batch = grammar.start(len(texts))
    alone = [grammar.start(1) for _ in texts]
    for column in itertools.islice(zip(*texts, strict=True), 5):
        symbols = [ids[c] if c in ids else (grammar.digits == int(c)).nonzero()[0].item() for c in column]
        assert all(grammar.allowed(batch)[i, s] for i, s in enumerate(symbols))
        batch = grammar.advance(batch, torch.tensor(symbols))
        alone = [grammar.advance(a, torch.tensor([s])) for a, s in zip(alone, symbols, strict=True)]
    for i, state in enumerate(alone):
        assert [field[i].tolist() for field in batch] == [field[0].tolist() for field in state]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 10, DIGITS[:9], SPACE, END), "12 different tokens"),
        ((1, 10, DIGITS, DIGITS[0], END), "12 different tokens"),
        ((0, 10, DIGITS, SPACE, END), "count and maximum must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntegerGrammar(*arguments)
