"""What ends a run, what is tried again and when, and which node is left out."""

from dataclasses import replace
from pathlib import Path

import pytest

from cavmae.cluster.restarts import (
    LONGEST_WAIT_SECONDS,
    End,
    Failure,
    Kind,
    Restart,
    RestartPolicy,
    check_run_folder,
)

HOUR = 3600.0
DEAD = Failure("crash", "ActorDiedError", "the process is gone", rank=1, began=True)
MISSING = Failure("missing", "FileNotFoundError", "/data/index.json", rank=0)


def policy(*, has_trained: bool = False) -> RestartPolicy:
    return RestartPolicy(10, 48 * HOUR, has_trained=has_trained, jitter=lambda: 1.0)


def after(policy: RestartPolicy, failure: Failure, now: float = 0.0) -> Restart | End:
    return policy.after(failure, now, lambda names: True)


def ended(answer: Restart | End) -> End:
    assert isinstance(answer, End), answer
    return answer


@pytest.mark.parametrize("kind", ["missing", "refused"])
@pytest.mark.parametrize("checkpoint", [-1, 10])
def test_what_a_person_starts_or_resumes_ends_at_once_with_the_error_alone(
    kind: Kind, checkpoint: int
) -> None:
    answer = after(policy(), replace(MISSING, kind=kind, checkpoint=checkpoint))
    assert answer == End("/data/index.json", by_user=True)


@pytest.mark.parametrize("kind", ["missing", "refused", "unreachable", "crash", "peer"])
def test_once_the_ranks_have_trained_a_day_s_outage_is_survived(kind: Kind) -> None:
    tried, now = policy(), 0.0
    after(tried, replace(DEAD, checkpoint=10))
    wait = 0.0
    while now < 24 * HOUR:
        answer = after(tried, replace(MISSING, kind=kind), now)
        assert isinstance(answer, Restart)
        wait = answer.wait_seconds
        now += wait
    assert wait == LONGEST_WAIT_SECONDS
    answer = ended(after(tried, MISSING, now + 48 * HOUR))
    assert "outage_hours = 48" in answer.message and "rank 0: /data/index.json" in answer.message


def test_a_launcher_s_restart_is_as_if_the_ranks_had_trained() -> None:
    assert isinstance(after(policy(has_trained=True), MISSING), Restart)


def test_an_outage_that_data_in_a_cache_hide_for_some_steps_is_one_all_the_same() -> None:
    tried = policy(has_trained=True)
    for hour in range(24):
        away = replace(MISSING, kind="unreachable", began=True, step=13)
        assert isinstance(after(tried, away, hour * HOUR), Restart)


def test_waits_grow_and_are_never_alike_for_all_runs() -> None:
    tried = policy(has_trained=True)
    waits = [after(tried, MISSING) for _ in range(10)]
    assert [one.wait_seconds for one in waits if isinstance(one, Restart)] == [
        *(1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    ]
    drawn = {after(RestartPolicy(10, HOUR), DEAD).wait_seconds for _ in range(9)}  # pyright: ignore
    assert len(drawn) > 1 and all(0.5 <= one <= 1 for one in drawn)


def test_failures_with_a_new_checkpoint_between_them_are_never_too_many() -> None:
    tried = policy()
    for step in range(0, 1000, 10):
        answer = after(tried, replace(DEAD, checkpoint=step, step=step + 3))
        assert isinstance(answer, Restart) and answer.wait_seconds == 1
        assert answer.reason == "failure 1 of 10 without a new checkpoint"


def test_failures_without_a_new_checkpoint_are_limited() -> None:
    tried = policy()
    for step in range(10):
        assert isinstance(after(tried, replace(DEAD, checkpoint=0, step=step)), Restart)
    answer = ended(after(tried, replace(DEAD, checkpoint=0, step=11)))
    assert answer.message.startswith("11 failures without a new checkpoint (max_failures = 10)")
    assert not answer.by_user


def test_the_same_failure_at_the_same_step_is_in_the_run_itself() -> None:
    tried = policy()
    bug = replace(DEAD, error_type="RuntimeError", text="a bug", checkpoint=10, step=13)
    assert isinstance(after(tried, bug), Restart)
    assert isinstance(after(tried, bug), Restart)
    assert ended(after(tried, bug)).message == (
        "the same failure 3 times at step 13 without a new checkpoint; the last one: rank 1: a bug "
        "(RuntimeError); rerun the same command to resume from the newest checkpoint"
    )


def test_a_start_that_crashes_is_not_tried_for_days() -> None:
    tried = policy()
    crash = replace(DEAD, began=False)
    assert [type(after(tried, crash)) for _ in range(3)] == [Restart, Restart, End]


@pytest.mark.parametrize("has_trained", [False, True])
def test_bad_clips_and_fields_that_contradict_the_run_are_never_tried_again(
    has_trained: bool,
) -> None:
    lasting = Failure("lasting", "DataFaultError", "5% of the clips", began=True)
    answer = after(policy(has_trained=has_trained), lasting)
    assert answer == End("5% of the clips", by_user=True)


def test_updates_that_are_not_finite_send_the_run_back_once() -> None:
    """To its newest checkpoint, as any failure does; the same again is the user's to mend."""
    tried = policy()
    first = Failure("not finite", "NonFiniteError", "up to step 7", began=True)
    assert isinstance(after(tried, first), Restart)
    assert isinstance(after(tried, replace(first, text="up to step 9", checkpoint=8)), Restart)
    answer = after(tried, replace(first, text="up to step 9", checkpoint=8))
    assert answer == End("repeated after resuming from a checkpoint: up to step 9", by_user=True)


def test_no_failure_is_tried_again_where_none_is_allowed() -> None:
    for failure in (DEAD, MISSING):
        tried = RestartPolicy(0, HOUR, has_trained=True)
        assert isinstance(after(tried, failure), End)


def test_a_node_that_fails_three_times_in_a_row_is_left_out_and_named() -> None:
    tried = policy()
    a, b = frozenset({"a"}), frozenset({"b"})
    answers = [
        after(tried, replace(DEAD, nodes=nodes, checkpoint=step))
        for step, nodes in enumerate([a, a, b, a, a, a])
    ]
    assert tried.left_out == {"a"}
    assert isinstance(answers[-1], Restart)
    assert answers[-1].reason.endswith("; node a failed 3 times in a row and is left out")


def test_a_node_is_not_blamed_for_what_fails_on_several() -> None:
    tried = policy()
    for step in range(9):
        after(tried, replace(DEAD, nodes=frozenset({"a", "b"}), checkpoint=step))
    assert not tried.left_out


def test_another_node_gets_its_own_tries_at_the_same_step() -> None:
    tried = policy()
    bad = replace(DEAD, nodes=frozenset({"a"}), checkpoint=0, step=1)
    answers = [after(tried, bad) for _ in range(3)]
    answers += [after(tried, replace(bad, nodes=frozenset({"b"}))) for _ in range(2)]
    assert all(isinstance(one, Restart) for one in answers) and tried.left_out == {"a"}


def test_a_node_without_which_too_few_are_left_stays_and_that_is_said() -> None:
    tried, asked = policy(), []

    def too_few(names: set[str]) -> bool:
        asked.append(names)
        return False

    bad = replace(DEAD, nodes=frozenset({"a"}))
    *_, answer = [tried.after(replace(bad, checkpoint=step), 0.0, too_few) for step in range(3)]
    assert asked == [{"a"}] and not tried.left_out
    assert isinstance(answer, Restart)
    assert answer.reason.endswith("and is used again, as too few are left without it")


def test_a_run_folder_that_is_not_mounted_is_not_made_anew(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    check_run_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run_dir .*/away .*is its file system mounted"):
        check_run_folder(tmp_path / "away")
