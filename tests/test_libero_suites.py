import pytest

from lerobot_vla0.libero.suites import TASKS, check_init_states, episodes_of_suites

FOUR = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]


@pytest.fixture
def forty_tasks() -> list[list[str]]:
    """Tasks of a data set's episodes: two episodes of each task of the four suites, mixed."""
    tasks = [task for suite in FOUR for task in TASKS[suite]]
    return [[tasks[(7 * i) % 40]] for i in range(80)]


@pytest.mark.parametrize("suites", [*FOUR, "libero_goal, libero_10"])
def test_episodes_of_a_suite(suites, forty_tasks):
    names = suites.split(", ")
    episodes = episodes_of_suites(suites, forty_tasks)
    assert len(episodes) == 20 * len(names) and episodes == sorted(episodes)
    assert {forty_tasks[i][0] for i in episodes} == {task for name in names for task in TASKS[name]}


def test_an_episode_with_a_foreign_task_is_left_out():
    milk = "pick up the milk and place it in the basket"
    assert episodes_of_suites("libero_object", [[milk, "rest"], [milk], []]) == [1]


@pytest.mark.parametrize(
    ("suites", "episode_tasks", "message"),
    [
        ("libero_objects", [["x"]], "'libero_objects' is not known.*libero_spatial, libero_object"),
        ("", [["x"]], "'' is not known"),
        ("libero_object", [[], [""]], "this data set's episodes have none"),
        (
            "libero_object",
            [["turn on the stove"], ["put the bowl on the plate"]],
            r"no episode is left. The data set holds libero_goal \(2 episodes\), libero_90 \(1 episodes\)",
        ),
        (
            "libero_object",
            [["fold the towel"]],
            r"belong to no LIBERO suite: \['fold the towel'\]",
        ),
    ],
)
def test_no_episode(suites, episode_tasks, message):
    with pytest.raises(ValueError, match=message):
        episodes_of_suites(suites, episode_tasks)


def test_words_are_liberos(throw_away):
    from lerobot_vla0.libero.assets import prepare_libero

    prepare_libero("libero_object", "primitive")
    from libero.libero import benchmark

    for suite, tasks in TASKS.items():
        assert tasks == [task.language for task in benchmark.get_benchmark_dict()[suite]().tasks]


def test_init_states():
    check_init_states(50, 0)
    check_init_states(1, 49)
    for episodes, first in ((0, 0), (51, 0), (1, 50), (1, -1), (10, 41)):
        with pytest.raises(ValueError, match=f"episodes={episodes}, first_init_state={first}: .*0..49"):
            check_init_states(episodes, first)
