import pytest

from lerobot_vla0.libero.suites import TASKS, check_init_states, episodes_of_suites

FOUR = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]


@pytest.mark.parametrize("suites", [*FOUR, "libero_goal, libero_10"])
def test_episodes_of_a_suite(suites):
    all_tasks = [task for suite in FOUR for task in TASKS[suite]]
    episode_tasks = [[all_tasks[(7 * i) % 40]] for i in range(80)]  # two episodes of each task, mixed
    names, episodes = suites.split(", "), episodes_of_suites(suites, episode_tasks)
    assert len(episodes) == 20 * len(names) and episodes == sorted(episodes)
    assert {episode_tasks[i][0] for i in episodes} == {task for name in names for task in TASKS[name]}


def test_an_episode_with_a_foreign_task_is_left_out():
    milk = "pick up the milk and place it in the basket"
    assert episodes_of_suites("libero_object", [[milk, "rest"], [milk], []]) == [1]


def test_no_episode():
    with pytest.raises(ValueError, match="'libero_objects' is not known.*libero_spatial, libero_object"):
        episodes_of_suites("libero_objects", [["x"]])
    with pytest.raises(ValueError, match=r"tasks of these suites only; its tasks are \['fold the towel'"):
        episodes_of_suites("libero_object", [["fold the towel"]])


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
