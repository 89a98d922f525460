from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_vla0.action_text import IntegerGrammar, PartialAnswer
from lerobot_vla0.decoding.drafting import Drafter
from lerobot_vla0.decoding.engine import decode

DIGITS, SPACE, END = list(range(15, 25)), 220, 300
NAN, INF = float("nan"), float("inf")


class MockModel:
    """Logits are a fixed random function of the row and its tokens so far, stored as in a KV cache."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.seed, self.calls = seed, 0
        self.cached: list[tuple[int, ...]] = [() for _ in range(rows)]
        self.fed: list[list[int]] = [[] for _ in range(rows)]

    def logits(self, row: int, tokens: tuple[int, ...]) -> np.ndarray:
        seed = hash((self.seed, row, tokens)) % 2**32
        return np.random.default_rng(seed).standard_normal(12).astype(np.float32)

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        return self._feed(drafts, first=True)

    def extend(self, accepted: list[int], tokens: list[list[int]]) -> np.ndarray:
        for row, count in enumerate(accepted):
            assert 0 <= count <= len(self.fed[row])
            self.cached[row] += tuple(self.fed[row][:count])
        return self._feed(tokens, first=False)

    def _feed(self, tokens: list[list[int]], first: bool) -> np.ndarray:
        self.calls, self.fed = self.calls + 1, tokens
        out = np.zeros((len(tokens), max(map(len, tokens)) + first, 12), dtype=np.float32)
        for row, new in enumerate(tokens):
            for i in range(len(new) + first):
                out[row, i] = self.logits(row, self.cached[row] + tuple(new[: i + (not first)]))
        return out


class Teacher(MockModel):
    """Predicts the tokens of given texts by their position, whatever tokens were fed."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__(len(texts))
        self.texts = texts

    def logits(self, row: int, tokens: tuple[int, ...]) -> np.ndarray:
        ids = [*DIGITS, SPACE, END]
        place = min(len(tokens), len(self.texts[row]) - 1)
        return np.eye(12, dtype=np.float32)[ids.index(self.texts[row][place])]


def make_grammar(count: int = 6, maximum: int = 1000) -> IntegerGrammar:
    return IntegerGrammar(count, maximum, DIGITS, SPACE, END)


def plain_greedy(
    model: MockModel, row: int, grammar: IntegerGrammar, tokens: list[int] | None = None
) -> list[int]:
    """The definition of the output, independent of the grammar's code: one token at a time, argmax over those
    that keep the text valid. `tokens`: that the answer begins with."""
    tokens = list(tokens or [])
    while not tokens or tokens[-1] != END:
        text = "".join({SPACE: " "}.get(t, str(t - 15)) for t in tokens)
        number = text.split(" ")[-1]
        last = text.count(" ") == grammar.count - 1
        allowed = [15 + d for d in range(10) if number != "0" and int(number + str(d)) <= grammar.maximum]
        allowed += [END if last else SPACE] if number else []
        logits = dict(zip(grammar.token_ids, model.logits(row, tuple(tokens)).tolist(), strict=True))
        tokens.append(max(sorted(allowed), key=lambda t: logits[t]))
    return tokens


def tokens_of(grammar: IntegerGrammar, symbols: list[int]) -> list[int]:
    return [grammar.token_ids[s] for s in symbols]


def test_equals_plain_constrained_greedy():
    grammar = make_grammar()
    for seed in range(5):
        model = MockModel(3, seed)
        result = decode(model, grammar, 3)
        assert result.passes == model.calls == max(len(row.symbols) for row in result.rows)
        for index, row in enumerate(result.rows):
            expected = plain_greedy(MockModel(3, seed), index, grammar)
            assert tokens_of(grammar, row.symbols) == expected
            text = "".join(" " if t == SPACE else str(t - 15) for t in expected[:-1])
            assert row.answer.integers == [int(v) for v in text.split(" ")]


class AnyDrafter(Drafter):
    """Drafts given integers, most of which are wrong."""

    def __init__(self, grammar, length, numbers) -> None:
        super().__init__(grammar, 1, length)
        self.numbers = numbers

    def _guess(self, integers):
        return self.numbers[len(integers) % len(self.numbers)], 1.0


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 7),
    maximum=st.sampled_from([1, 9, 10, 100, 1000, 4095]),
    rows=st.integers(1, 4),
    needed=st.integers(1, 7),
    length=st.integers(0, 20),
    numbers=st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    dim=st.integers(1, 3),
    adversarial=st.booleans(),
)
def test_drafts_never_change_the_tokens(
    seed, count, maximum, rows, needed, length, numbers, dim, adversarial
):
    """Whatever is drafted, however the rows' drafts differ, wherever decoding stops early."""
    grammar, needed = make_grammar(count, maximum), min(needed, count)
    drafters = [
        AnyDrafter(grammar, length, numbers[i % len(numbers) :] + numbers)
        if adversarial
        else Drafter(grammar, dim, length, token_cost=0.2 * (i % 2))
        for i in range(rows)
    ]
    plain_model, model = MockModel(rows, seed), MockModel(rows, seed)
    plain = decode(plain_model, grammar, rows, count=needed)
    drafted = decode(model, grammar, rows, count=needed, drafters=drafters)
    assert drafted.passes == model.calls <= plain.passes == plain_model.calls
    for one, other in zip(plain.rows, drafted.rows, strict=True):
        shorter = min(len(one.symbols), len(other.symbols))
        assert one.symbols[:shorter] == other.symbols[:shorter]
        assert one.answer.integers[:needed] == other.answer.integers[:needed]


def spell(*integers: int) -> list[int]:
    text = " ".join(map(str, integers))
    return [SPACE if c == " " else DIGITS[int(c)] for c in text] + [END]


def test_forced_tokens_cost_no_pass():
    """Three digits force the space, which is fed with the next token; the end of turn needs no pass."""
    grammar, text = make_grammar(2), [spell(123, 456)]
    assert decode(Teacher(text), grammar, 1).passes == 8
    assert decode(Teacher(text), grammar, 1, drafters=[Drafter(grammar, 1, 0)]).passes == 6


def test_a_right_draft_takes_one_pass():
    """The last answer as draft for the same one: the pass over the prompt accepts all of it."""
    grammar, integers = make_grammar(6), [474, 479, 460, 471, 479, 460]
    drafter = Drafter(grammar, 3, 31, previous=integers)
    model = Teacher([spell(*integers)])
    assert decode(model, grammar, 1, drafters=[drafter]).passes == model.calls == 1


def test_rows_accept_different_lengths():
    """One row's draft is right, the other's wrong: both end with their own text."""
    grammar, integers = make_grammar(4), [474, 479, 460, 471]
    drafters = [Drafter(grammar, 4, 31, previous=integers) for _ in range(2)]
    texts = [spell(*integers), spell(1, 22, 333, 1000)]
    result = decode(Teacher(texts), grammar, 2, drafters=drafters)
    assert [tokens_of(grammar, row.symbols) for row in result.rows] == texts


def test_ties_take_the_lowest_token_id():
    model = MockModel(1)
    model.logits = lambda row, tokens: np.zeros(12, dtype=np.float32)
    assert decode(model, make_grammar(2, 9), 1).integers == [[0, 0]]


@pytest.mark.parametrize("draft", [None, [3], [5, 5]])
def test_temperature_samples_from_the_restricted_softmax(draft):
    """With and without drafts: a draft must not change the distribution."""
    grammar, rows = make_grammar(1, 5), 4000
    model = MockModel(rows)
    model.logits = lambda row, tokens: np.linspace(0, 2, 12, dtype=np.float32)
    drafters = None if draft is None else [AnyDrafter(grammar, 4, draft) for _ in range(rows)]
    generator = torch.Generator().manual_seed(0)
    result = decode(model, grammar, rows, temperature=0.7, generator=generator, drafters=drafters)
    counts = np.bincount([row[0] for row in result.integers], minlength=6)
    weights = np.exp(np.linspace(0, 2, 12)[:6] / 0.7)
    expected = weights / weights.sum() * rows
    # chi-square, 5 degrees of freedom: 20.5 is exceeded with probability 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


class BrokenModel(MockModel):
    """Some logits of the second row, after `count` tokens, have another value."""

    def __init__(self, count: int, value: float, tokens: list[int]) -> None:
        super().__init__(2)
        self.count, self.value = count, value
        self.symbols = [make_grammar().token_ids.index(token) for token in tokens]

    def logits(self, row: int, tokens: tuple[int, ...]) -> np.ndarray:
        logits = super().logits(row, tokens)
        if row == 1 and len(tokens) == self.count:
            logits[self.symbols] = self.value
        return logits


ALL = [*DIGITS, SPACE, END]


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 0.5])
@pytest.mark.parametrize(("count", "value", "tokens", "is_error"), [
    (0, NAN, ALL, True),
    (1, -INF, ALL, True),
    (4, INF, ALL, True),
    (0, NAN, [*DIGITS[3:], SPACE], True),
    (0, NAN, [SPACE, END], False),  # not allowed there
    (0, -INF, DIGITS[:9], False),  # one is left
    (99, NAN, ALL, False),  # never reached
])  # fmt: skip
def test_broken_logits_are_an_error_where_they_decide(drafted, temperature, count, value, tokens, is_error):
    grammar, model = make_grammar(), BrokenModel(count, value, tokens)
    drafters = [AnyDrafter(grammar, 31, [7, 450]) for _ in range(2)] if drafted else None
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="no token can be chosen") if is_error else nullcontext():
        result = decode(model, grammar, 2, drafters=drafters, temperature=temperature, generator=generator)
        assert all(len(row) == 6 and max(row) <= 1000 for row in result.integers)


def test_broken_logits_after_a_rejected_draft_do_not_matter():
    """They only serve the next draft."""
    grammar = make_grammar(2)
    model = Teacher([spell(123, 456)])
    plain = model.logits
    model.logits = lambda row, tokens: plain(row, tokens) * (NAN if tokens[:1] == (DIGITS[9],) else 1)
    drafters = [AnyDrafter(grammar, 31, [999])]
    assert decode(model, grammar, 1, drafters=drafters).integers == [[123, 456]]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    maximum=st.sampled_from([1, 9, 100, 1000]),
    needed=st.integers(1, 6),
    length=st.integers(0, 20),
    data=st.data(),
)
def test_a_prefix_is_continued_as_one_token_at_a_time(seed, maximum, needed, length, data):
    """Whatever the prefixes, however they differ between the rows, with and without drafts."""
    grammar, dim = make_grammar(6, maximum), 2
    previous = data.draw(st.lists(st.lists(st.integers(0, maximum), max_size=6), min_size=1, max_size=3))
    prefixes = [row[: data.draw(st.integers(0, min(len(row), needed)))] for row in previous]
    drafters = [Drafter(grammar, dim, length, previous=row) for row in previous]
    rows, model = len(previous), MockModel(len(previous), seed)
    drafted = decode(model, grammar, rows, count=needed, drafters=drafters, prefixes=prefixes)
    plain = decode(MockModel(rows, seed), grammar, rows, count=needed, prefixes=prefixes)
    assert drafted.passes == model.calls <= plain.passes
    for index, (row, prefix) in enumerate(zip(drafted.rows, prefixes, strict=True)):
        assert row.answer.integers[:needed] == plain.rows[index].answer.integers[:needed]
        begin, answer = [], PartialAnswer()
        for integer in prefix:
            symbols = grammar.spell(integer, answer)
            grammar.append(answer, *symbols)
            begin += tokens_of(grammar, symbols)
        expected = plain_greedy(MockModel(rows, seed), index, grammar, begin)
        written = tokens_of(grammar, row.symbols)
        assert written == expected[: len(written)] and len(row.answer.integers) >= needed
