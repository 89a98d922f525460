import pytest

from lerobot_vla0.decoding.drafting import AcceptanceRate, Drafter
from lerobot_vla0.decoding.grammar import IntegerGrammar, PartialAnswer

GRAMMAR = IntegerGrammar(8, 1000, list(range(15, 25)), 220, 300)  # four timesteps of two


def unreliable() -> AcceptanceRate:
    return AcceptanceRate(accepted=0.1, total=10.0)


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
    assert make(acceptance=unreliable()).draft(one, 8) == []


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


def test_remembers_the_last_answer():
    drafter = make(acceptance=unreliable())
    drafter.remember([1, 2, 3, 4, 5, 6, 7, 8], executed=2)
    drafter.start()
    # The two timesteps that were not executed, then their extrapolation.
    assert drafter.draft(PartialAnswer(), 6) == symbols(5, 6, 7, 8, 9, 10)
    drafter.reset()
    assert drafter.draft(PartialAnswer(), 6) == []


@pytest.mark.parametrize(
    ("acceptance", "expected"), [(AcceptanceRate(accepted=9, total=10), 497), (unreliable(), 500)]
)
def test_learns_the_predictions_after_a_rejected_symbol(acceptance, expected):
    """If they are unreliable, only the correction itself (23) counts; what follows is a copy."""
    answer, after = PartialAnswer([500, 20]), PartialAnswer([500, 20, 500])
    drafter = make(acceptance=acceptance)
    draft = drafter.draft(answer, 6)
    assert draft == symbols(500, 20, 500, 20, after=answer)
    drafter.learn(answer, draft, symbols(500, 23, 497, 20, after=answer))
    last = 20 if expected == 497 else 23
    assert drafter.draft(after, 6) == symbols(23, expected, last, after=after)


@pytest.mark.parametrize(("acceptance", "expected"), [(AcceptanceRate(), 312), (unreliable(), 319)])
def test_completes_a_correction_close_to_the_draft_if_predictions_are_unreliable(acceptance, expected):
    answer, drafter = PartialAnswer([500, 320]), make(acceptance=acceptance)
    draft = drafter.draft(answer, 6)
    # The "3" of 320 is accepted, "1" is the correction.
    drafter.learn(answer, draft, symbols(500, 312, 500, 320, after=answer))
    after = PartialAnswer([500, 320, 500], value=31)
    assert drafter.draft(after, 4) == symbols(expected, after=after)


def test_acceptance_is_how_good_predictions_turned_out_to_be():
    drafter, answer = make(), PartialAnswer([500, 20])
    draft = drafter.draft(answer, 8)
    drafter.learn(answer, draft, symbols(501, 999, 777, 999, 777, 999, after=answer)[: len(draft)])
    after = PartialAnswer([500, 20, 501, 20, 502, 20])
    assert drafter.draft(after, 8) == symbols(503, 20, after=after)  # extrapolated as before
    assert drafter.acceptance.value < 0.4
    drafter.reset()
    assert drafter.acceptance.value < 0.4  # depends on the model, not on the episode
    for _ in range(20):
        drafter.acceptance.update(1.0)
    assert drafter.acceptance.value > 0.8


def test_learns_that_a_number_is_shorter():
    drafter, answer = make(), PartialAnswer([474, 0])
    draft = symbols(474, 0, after=answer)  # "474 0 "
    predicted = draft.copy()
    predicted[1] = GRAMMAR.space  # the model writes "4 "
    drafter.learn(answer, draft, predicted)
    assert drafter.predictions[2] == 4


def test_drafts_only_what_is_worth_its_cost():
    # No timestep is like the one before: after one integer, the probability that all is right is below 0.2.
    answer = PartialAnswer([1, 2, 300, 400, 50, 600])
    everything = make(acceptance=unreliable()).draft(answer, 8)
    careful = make(worth=0.2, acceptance=unreliable()).draft(answer, 8)
    assert careful.count(GRAMMAR.space) == 1 and everything[: len(careful)] == careful != everything
    # Where the predictions after a rejected symbol are reliable, any draft is worth making.
    assert make(worth=0.2).draft(answer, 8) == everything
    constant = PartialAnswer([1, 2] * 3)
    assert make(worth=0.2, acceptance=unreliable()).draft(constant, 8) == symbols(1, 2, after=constant)


def test_no_drafts():
    assert make(length=0).draft(PartialAnswer([500, 20]), 8) == []
