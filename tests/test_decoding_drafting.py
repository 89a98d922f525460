import pytest

from lerobot_vla0.action_text import IntegerGrammar, PartialAnswer
from lerobot_vla0.decoding.drafting import Drafter, initial_rates

GRAMMAR = IntegerGrammar(8, 1000, list(range(15, 25)), 220, 300)  # four timesteps of two


def rates(**scores: float) -> dict:
    """Of sources about which much is known."""
    result = initial_rates()
    for source, score in scores.items():
        result[source].score = result[source].right = score
        result[source].total = 10
    return result


def unreliable() -> dict:
    """Predictions after a rejected symbol are mostly wrong."""
    return rates(predicted=0.01)


def make(length: int = 31, **settings) -> Drafter:
    return Drafter(GRAMMAR, 2, length, **settings)


def symbols(*integers: int, after: PartialAnswer | None = None) -> list[int]:
    answer, result = (after or PartialAnswer()).copy(), []
    for integer in integers:
        spelled = GRAMMAR.spell(integer, answer)
        GRAMMAR.append(answer, *spelled)
        result += spelled
    return result


def test_drafts_the_middle_of_the_range_where_nothing_is_known():
    """Only for the predictions after it: where those are unreliable, nothing is drafted."""
    one = PartialAnswer([1])
    assert make(length=6).draft(PartialAnswer(), 8) == symbols(500, 500)[:6]
    assert make(length=4).draft(one, 8) == symbols(500, after=one)
    assert make(rates=unreliable()).draft(one, 8) == []


def test_copies_the_timestep_before():
    answer = PartialAnswer([500, 20])
    assert make().draft(answer, 8) == symbols(500, 20, 500, 20, 500, 20, after=answer)
    assert make().draft(answer, 3) == symbols(500, after=answer)  # no further than needed
    assert len(make(length=5).draft(answer, 8)) == 5


def test_extrapolates_where_that_was_right():
    answer = PartialAnswer([100, 7, 110, 7, 120, 7])
    assert make().draft(answer, 8) == symbols(130, 7, after=answer)


def test_completes_what_is_written():
    answer = PartialAnswer([500, 20], value=4)
    assert make().draft(answer, 3) == symbols(499, after=answer)


def test_drafts_the_last_answer():
    """Its two timesteps that were not executed, then their extrapolation."""
    drafter = make(rates=unreliable(), previous=[5, 6, 7, 8], history=[1, 2, 3, 4])
    assert drafter.draft(PartialAnswer(), 6) == symbols(5, 6, 7, 8, 9, 10)
    assert make(rates=unreliable()).draft(PartialAnswer(), 6) == []


@pytest.mark.parametrize(("known", "expected"), [(rates(predicted=0.9), 497), (unreliable(), 500)])
def test_learns_the_predictions_after_a_rejected_symbol(known, expected):
    """If they are unreliable, only the correction itself (23) counts; what follows is a copy."""
    answer, after = PartialAnswer([500, 20]), PartialAnswer([500, 20, 500])
    drafter = make(rates=known)
    draft = drafter.draft(answer, 6)
    assert draft == symbols(500, 20, 500, 20, after=answer)
    drafter.learn(answer, draft, symbols(500, 23, 497, 20, after=answer))
    last = 20 if expected == 497 else 23
    assert drafter.draft(after, 6) == symbols(23, expected, last, after=after)


@pytest.mark.parametrize(("known", "expected"), [(initial_rates(), 312), (unreliable(), 319)])
def test_completes_a_correction_close_to_the_draft_if_predictions_are_unreliable(known, expected):
    answer, drafter = PartialAnswer([500, 320]), make(rates=known)
    draft = drafter.draft(answer, 6)
    # The "3" of 320 is accepted, "1" is the correction.
    drafter.learn(answer, draft, symbols(500, 312, 500, 320, after=answer))
    after = PartialAnswer([500, 320, 500], value=31)
    assert drafter.draft(after, 4) == symbols(expected, after=after)


def test_rates_are_how_good_guesses_turned_out_to_be():
    drafter, answer = make(), PartialAnswer([500, 20])
    draft = drafter.draft(answer, 8)
    drafter.learn(answer, draft, symbols(501, 999, 777, 999, 777, 999, after=answer)[: len(draft)])
    after = PartialAnswer([500, 20, 501, 20, 502, 20])
    assert drafter.draft(after, 8) == symbols(503, 20, after=after)  # extrapolated as before
    # Three predictions were wrong. As copies, 20 was right twice, 501 and 502 were not.
    expected = initial_rates()["predicted"]
    for _ in range(3):
        expected.update(1, 999)
    assert drafter.rates["predicted"].right == expected.right < 0.25
    assert drafter.rates["copy"].right == pytest.approx((0.4 * 10 + 2) / 14, abs=0.02)
    assert drafter.rates["previous"].total == 10
    known = drafter.rates["predicted"].score
    drafter.draft(after, 8)
    assert drafter.rates["predicted"].score == known  # counted once
    for _ in range(30):
        drafter.rates["predicted"].update(7, 7)
    assert drafter.rates["predicted"].score > 0.8


def test_a_source_that_fails_is_not_used_in_later_answers():
    """A policy that plans something else in every chunk: its last answer is no guess of the next one."""
    shared, previous = initial_rates(), []
    for first in range(100, 600, 100):
        make(rates=shared, previous=previous).draft(PartialAnswer([first, 7] * 4), 8)
        previous = [first, 7] * 3
    assert shared["previous"].right < 0.6 < shared["copy"].right
    after = PartialAnswer([900, 7])
    assert make(rates=shared, previous=previous).draft(after, 4) == symbols(900, 7, after=after)
    other = make(rates=rates(previous=0.95), previous=previous)
    assert other.draft(after, 4) != symbols(900, 7, after=after)


def test_learns_that_a_number_is_shorter():
    drafter, answer = make(), PartialAnswer([474, 0])
    draft = symbols(474, 0, after=answer)  # "474 0 "
    predicted = draft.copy()
    predicted[1] = GRAMMAR.space  # the model writes "4 "
    drafter.learn(answer, draft, predicted)
    assert drafter.predictions[2] == 4


def test_drafts_no_token_that_costs_more_than_it_saves():
    # No timestep is like the one before: after one integer, the probability that all is right is below 0.2.
    answer = PartialAnswer([1, 2, 300, 400, 50, 600])
    everything = make(rates=unreliable()).draft(answer, 8)
    careful = make(token_cost=0.2, rates=unreliable()).draft(answer, 8)
    assert careful.count(GRAMMAR.space) == 1 and everything[: len(careful)] == careful != everything
    # Where the predictions after a rejected symbol are reliable, any draft pays.
    assert make(token_cost=0.2).draft(answer, 8) == everything
    constant = PartialAnswer([1, 2] * 3)
    assert make(token_cost=0.2, rates=unreliable()).draft(constant, 8) == symbols(1, 2, after=constant)


def test_no_drafts():
    assert make(length=0).draft(PartialAnswer([500, 20]), 8) == []
