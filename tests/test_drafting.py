import pytest

from lerobot_vla0.drafting import Drafter
from lerobot_vla0.grammar import IntegerGrammar, Text

GRAMMAR = IntegerGrammar(8, 1000, list(range(15, 25)), 220, 300)  # four timesteps of two


def make(length: int = 31, **settings) -> Drafter:
    return Drafter(GRAMMAR, 2, length, **settings)


def symbols(*integers: int, text: Text | None = None) -> list[int]:
    text, result = (text or Text()).copy(), []
    for integer in integers:
        spelled = GRAMMAR.spell(integer, text)
        for symbol in spelled:
            GRAMMAR.write(text, symbol)
        result += spelled
    return result


def test_nothing_is_known_at_first():
    assert make().draft(Text(), 8) == []
    assert make().draft(Text([500]), 8) == []


def test_copies_the_timestep_before():
    assert make().draft(Text([500, 20]), 8) == symbols(500, 20, 500, 20, 500, 20, text=Text([500, 20]))
    assert make().draft(Text([500, 20]), 3) == symbols(500, text=Text([500, 20]))  # no further than needed
    assert len(make(length=5).draft(Text([500, 20]), 8)) == 5


def test_extrapolates_where_that_was_right():
    text = Text([100, 7, 110, 7, 120, 7])
    assert make().draft(text, 8) == symbols(130, 7, text=text)


def test_completes_what_is_written():
    text = Text([500, 20], value=4)
    assert make().draft(text, 3) == symbols(499, text=text)


def test_remembers_the_last_answer():
    drafter = make()
    drafter.remember([1, 2, 3, 4, 5, 6, 7, 8], executed=2)
    drafter.start()
    # the two timesteps that were not executed, then the last of them again
    assert drafter.draft(Text(), 6) == symbols(5, 6, 7, 8, 9, 10)
    drafter.reset()
    assert drafter.draft(Text(), 6) == []


def test_learns_what_the_model_says_behind_a_wrong_guess():
    drafter, text = make(), Text([500, 20])
    draft = drafter.draft(text, 6)
    predicted = symbols(500, 23, 498, 20, text=text)
    drafter.learn(text, draft, predicted, accepted=5)
    # Of 498 only the 4 is known, the rest was said behind a wrong digit: the nearest to the draft is 499.
    assert drafter.draft(Text([500, 20, 500]), 6) == symbols(23, 499, 20, text=Text([500, 20, 500]))


def test_distrusts_a_model_that_was_wrong_behind_wrong_guesses():
    drafter, text = make(), Text([500, 20])
    draft = drafter.draft(text, 8)
    drafter.learn(text, draft, symbols(501, 999, 777, 999, 777, 999, text=text)[: len(draft)], accepted=2)
    # 999 was said of the fourth integer, which turns out as 20: what it said of the others counts no more.
    after = Text([500, 20, 501, 20])
    assert drafter.draft(after, 6) == symbols(502, 20, text=after)  # goes on as before


def test_learns_that_a_number_is_shorter():
    drafter, text = make(), Text([474, 0])
    draft = symbols(474, 0, text=text)  # "474 0 "
    predicted = draft.copy()
    predicted[1] = GRAMMAR.space  # the model writes "4 "
    drafter.learn(text, draft, predicted, accepted=1)
    assert drafter.revised[2] == 4


def test_drafts_get_shorter_while_they_are_rejected():
    drafter, text = make(length=16), Text([500, 20])
    for expected in (16, 8, 4, 2, 1, 1):  # the first is forgiven
        draft = drafter.draft(text, 8)
        drafter.learn(text, draft, draft, accepted=0)
        assert drafter.current == expected
    draft = drafter.draft(text, 8)
    drafter.learn(text, draft, draft, accepted=len(draft))
    assert drafter.current == 2
    drafter.start()
    assert drafter.current == 16
    fixed = make(length=16, adaptive=False)
    draft = fixed.draft(text, 8)
    fixed.learn(text, draft, draft, accepted=0)
    assert fixed.current == 16


@pytest.mark.parametrize("length", [0])
def test_no_drafts(length):
    assert make(length=length).draft(Text([500, 20]), 8) == []
