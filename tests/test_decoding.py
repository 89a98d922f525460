import pytest
import torch

from lerobot_vla0.decoding import decode
from lerobot_vla0.grammar import IntegerGrammar

DIGITS, SPACE, END = list(range(15, 25)), 220, 300


class MockModel:
    """Logits that are a fixed random function of the tokens so far; counts its passes and checks its
    input."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.seed, self.history, self.calls = seed, [() for _ in range(rows)], 0

    def logits(self) -> torch.Tensor:
        rows = []
        for i, tokens in enumerate(self.history):
            generator = torch.Generator().manual_seed(hash((self.seed, i, tokens)) % 2**31)
            rows.append(torch.randn(12, generator=generator))
        return torch.stack(rows)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (len(self.history), 1)
        self.calls += 1
        self.history = [(*h, t) for h, t in zip(self.history, tokens[:, 0].tolist(), strict=True)]
        return self.logits()[:, None]


def make_grammar(count: int = 6, maximum: int = 1000) -> IntegerGrammar:
    return IntegerGrammar(count, maximum, DIGITS, SPACE, END)


def plain_greedy(model: MockModel, row: int, grammar: IntegerGrammar) -> list[int]:
    """The definition, one token at a time, on text: argmax over what may follow."""
    tokens: list[int] = []
    while not tokens or tokens[-1] != END:
        model.history[row] = tuple(tokens)
        text = "".join({SPACE: " "}.get(t, str(t - 15)) for t in tokens)
        number = text.split(" ")[-1]
        last = text.count(" ") == grammar.count - 1
        allowed = [15 + d for d in range(10) if number != "0" and int(number + str(d)) <= grammar.maximum]
        allowed += [END if last else SPACE] if number else []
        logits = dict(zip(grammar.token_ids.tolist(), model.logits()[row].tolist(), strict=True))
        tokens.append(max(sorted(allowed), key=lambda t: logits[t]))
    return tokens


def test_equals_plain_constrained_greedy():
    grammar = make_grammar()
    for seed in range(5):
        model = MockModel(3, seed)
        result = decode(model.logits(), model.step, grammar)
        assert result.passes == model.calls + 1 == result.tokens.shape[1]
        for row in range(3):
            expected = plain_greedy(MockModel(3, seed), row, grammar)
            tokens = result.tokens[row].tolist()
            assert tokens[: len(expected)] == expected and set(tokens[len(expected) :]) <= {END}
            text = "".join(" " if t == SPACE else str(t - 15) for t in expected[:-1])
            assert result.integers[row].tolist() == [int(v) for v in text.split(" ")]


def test_stops_early():
    grammar = make_grammar()
    full_model, model = MockModel(2), MockModel(2)
    full = decode(full_model.logits(), full_model.step, grammar)
    some = decode(model.logits(), model.step, grammar, count=2)
    assert torch.equal(some.integers[:, :2], full.integers[:, :2]) and some.passes < full.passes


def test_ties_take_the_lowest_token_id():
    result = decode(torch.zeros(1, 12), lambda t: torch.zeros(1, 1, 12), make_grammar(2, 9))
    assert result.integers.tolist() == [[0, 0]]


def test_temperature_samples_from_the_restricted_softmax():
    grammar, rows = make_grammar(1, 5), 4000
    logits = torch.linspace(0, 2, 12).expand(rows, 12)
    generator = torch.Generator().manual_seed(0)
    result = decode(
        logits, lambda t: torch.zeros(len(t), 1, 12), grammar, temperature=0.7, generator=generator
    )
    counts = torch.bincount(result.integers[:, 0], minlength=6).float()
    expected = (torch.linspace(0, 2, 12)[:6] / 0.7).softmax(0) * rows
    # chi-square, 5 degrees of freedom: 20.5 is exceeded with probability 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"count": 0}, "count must be"),
        ({"count": 7}, "1..6"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode(torch.zeros(1, 12), lambda t: t, make_grammar(), **arguments)
