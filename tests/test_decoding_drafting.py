from lerobot_vla0.decoding.drafting import Drafter, Trust
from lerobot_vla0.decoding.grammar import IntegerGrammar, Text

GRAMMAR = IntegerGrammar(8, 1000, list(range(15, 25)), 220, 300)  # four timesteps of two


def distrust() -> Trust:
    return Trust(right=0.1, judged=10.0)


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


def test_where_nothing_is_known_the_middle_shows_what_the_model_says():
    assert make(length=6).draft(Text(), 8) == symbols(500, 500)[:6]
    assert make(length=4).draft(Text([1]), 8) == symbols(500, text=Text([1]))
    assert make(trust=distrust()).draft(Text([1]), 8) == []  # such guesses are hardly ever right themselves


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
    drafter = make(trust=distrust())
    drafter.remember([1, 2, 3, 4, 5, 6, 7, 8], executed=2)
    drafter.start()
    # the two timesteps that were not executed, then on as those went
    assert drafter.draft(Text(), 6) == symbols(5, 6, 7, 8, 9, 10)
    drafter.reset()
    assert drafter.draft(Text(), 6) == []


def test_learns_what_the_model_says_behind_a_wrong_guess():
    text, after = Text([500, 20]), Text([500, 20, 500])
    for trust, expected in ((Trust(right=9, judged=10), (23, 497, 20)), (distrust(), (23, 500, 23))):
        drafter = make(trust=trust)
        draft = drafter.draft(text, 6)
        assert draft == symbols(500, 20, 500, 20, text=text)
        drafter.learn(text, draft, symbols(500, 23, 497, 20, text=text))
        # A model that is not trusted is believed where its text is certain: up to its first correction.
        # What follows is a copy of what is known by then.
        assert drafter.draft(after, 6) == symbols(*expected, text=after)


def test_completes_a_correction_close_to_the_draft_without_trust():
    text = Text([500, 320])
    for trust, expected in ((Trust(), 312), (distrust(), 319)):
        drafter = make(trust=trust)
        draft = drafter.draft(text, 6)
        drafter.learn(text, draft, symbols(500, 312, 500, 320, text=text))  # "3" holds, "1" is the correction
        after = Text([500, 320, 500], value=31)
        assert drafter.draft(after, 4) == symbols(expected, text=after)


def test_trust_is_what_its_predictions_turned_out_to_be():
    drafter, text = make(), Text([500, 20])
    draft = drafter.draft(text, 8)
    drafter.learn(text, draft, symbols(501, 999, 777, 999, 777, 999, text=text)[: len(draft)])
    after = Text([500, 20, 501, 20, 502, 20])
    assert drafter.draft(after, 8) == symbols(503, 20, text=after)  # goes on as before
    assert drafter.trust.share < 0.4
    drafter.reset()
    assert drafter.trust.share < 0.4  # lies in the model, not in the episode
    for _ in range(20):
        drafter.trust.judge(True)
    assert drafter.trust.share > 0.8


def test_learns_that_a_number_is_shorter():
    drafter, text = make(), Text([474, 0])
    draft = symbols(474, 0, text=text)  # "474 0 "
    predicted = draft.copy()
    predicted[1] = GRAMMAR.space  # the model writes "4 "
    drafter.learn(text, draft, predicted)
    assert drafter.own[2] == 4


def test_drafts_only_what_is_worth_its_cost():
    # No timestep is like the one before: the chance that a guess is right sinks below 0.2 after one integer.
    text = Text([1, 2, 300, 400, 50, 600])
    everything = make(trust=distrust()).draft(text, 8)
    careful = make(worth=0.2, trust=distrust()).draft(text, 8)
    assert careful.count(GRAMMAR.space) == 1 and everything[: len(careful)] == careful != everything
    # A trusted model's own predictions are worth it whatever the guess.
    assert make(worth=0.2).draft(text, 8) == everything
    constant = Text([1, 2] * 3)
    assert make(worth=0.2, trust=distrust()).draft(constant, 8) == symbols(1, 2, text=constant)


def test_no_drafts():
    assert make(length=0).draft(Text([500, 20]), 8) == []
