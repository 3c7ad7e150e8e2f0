"""Decisions: what shares an engine call, who waits, and that nothing is lost, by random schedules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache import CachePlan
from fastcache.serve.engine.scheduler import PATIENCE, Job, QueueFull, Scheduler


def job(
    name: str,
    *,
    steps: int = 6,
    interval: int = 3,
    count: int = 1,
    guided: bool = True,
    bundle: int = 0,
    size: str = "8x8",
) -> Job:
    return Job(name, bundle, size, CachePlan.uniform(steps, interval), guided, count, deadline=1e9, content=None)


def added(scheduler: Scheduler, *jobs: Job) -> None:
    for one in jobs:
        scheduler.reserve(one.count, one.bundle)
        scheduler.add(one)


def opened(slots: int = 4, queue: int = 100) -> Scheduler:
    scheduler = Scheduler(queue)
    scheduler.open(0, slots)
    return scheduler


def tick(scheduler: Scheduler) -> tuple[list[str], bool] | None:
    """One turn as the worker takes it. Returns who ran, and whether in full."""
    scheduler.admit()
    batch = scheduler.next_batch()
    if batch is None:
        return None
    for image in scheduler.advance(batch.images):
        if image.is_finished:
            scheduler.finish(image)
    return [image.job.id for image in batch.images], batch.kind.name == "full"


def test_requests_at_different_steps_share_calls() -> None:
    scheduler = opened()
    added(scheduler, job("a"))
    assert tick(scheduler) == (["a"], True)
    added(scheduler, job("b"))
    turns = [turn for _ in range(9) if (turn := tick(scheduler))]
    # a's two shallow steps first, then both in full, and from there together
    assert turns[:3] == [(["a"], False), (["a"], False), (["a", "b"], True)]
    assert [who for who, _ in turns[3:]] == [["a", "b"]] * 2 + [["b"]] * 3
    assert not scheduler.jobs


def test_only_what_runs_the_same_shares_a_call() -> None:
    scheduler = opened(slots=8)
    scheduler.open(1, 8)
    added(scheduler, job("a"), job("b", guided=False), job("c", bundle=1), job("d"), job("e", size="9x9"))
    ran = list[list[str]]()
    while (turn := tick(scheduler)) is not None:
        ran.append(sorted(turn[0]))
    assert {tuple(who) for who in ran} == {("a", "d"), ("b",), ("c",), ("e",)}
    assert len(ran) == 4 * 6


def test_a_full_step_does_not_wait_for_ever() -> None:
    scheduler = opened()
    added(scheduler, job("long", steps=200, interval=200))
    tick(scheduler)
    added(scheduler, job("short", steps=1))
    turns = [tick(scheduler) for _ in range(PATIENCE + 1)]
    assert (["short"], True) in turns


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 5), queue=st.integers(0, 12))
def test_every_job_ends_once_and_no_slot_is_shared(seed: int, slots: int, queue: int) -> None:
    rng, scheduler = random.Random(seed), opened(slots, queue)
    waiting, ended, dropped, steps = list[Job](), dict[str, int](), set[str](), dict[str, int]()
    drawn: dict[str, int] = {}
    for k in range(rng.randint(1, 25)):
        count = rng.choice((1, 1, 1, 2, 3))
        waiting.append(
            job(f"{k}", steps=rng.randint(1, 9), interval=rng.randint(1, 4), count=count, guided=rng.random() < 0.7)
        )
    capacity = scheduler.room_for(0)
    assert capacity == slots + queue
    waiting = [one for one in waiting if one.count <= capacity]
    made = {one.id: one for one in waiting}
    while waiting or scheduler.jobs:
        if waiting and rng.random() < 0.5:
            try:
                added(scheduler, waiting[0])
                waiting.pop(0)
            except QueueFull:
                assert scheduler.outstanding + waiting[0].count > slots + queue
        if scheduler.jobs and rng.random() < 0.1:
            victim = scheduler.jobs[rng.choice(sorted(scheduler.jobs))]
            scheduler.drop(victim)
            scheduler.drop(victim)
            dropped.add(victim.id)
        scheduler.admit()
        batch = scheduler.next_batch()
        taken = [image.slot for image in scheduler.running]
        assert len(set(taken)) == len(taken) <= slots
        assert scheduler.outstanding <= capacity
        if batch is None:
            continue
        assert {image.kind for image in batch.images} == {batch.kind}
        if scheduler.jobs and rng.random() < 0.05:
            scheduler.drop(rng.choice(batch.images).job)  # while it runs
        for image in scheduler.advance(batch.images):
            steps[image.job.id] = steps.get(image.job.id, 0) + 1
            if image.is_finished:
                assert image.slot is not None
                drawn[image.job.id] = drawn.get(image.job.id, 0) + 1
                if scheduler.finish(image):
                    ended[image.job.id] = ended.get(image.job.id, 0) + 1
        assert all(image.waited <= PATIENCE + slots + 1 for image in scheduler.running)
    assert scheduler.outstanding == 0
    assert set(ended.values()) <= {1}
    assert not set(ended) & dropped
    assert all(drawn[name] == made[name].count for name in ended)
    for name in ended:
        assert steps[name] == made[name].plan.num_steps * made[name].count


def test_room_is_exact() -> None:
    scheduler = opened(slots=1, queue=8)
    added(scheduler, *(job(str(k)) for k in range(9)))
    with pytest.raises(QueueFull):
        scheduler.reserve(1, 0)
    scheduler.drop(scheduler.jobs["4"])
    scheduler.reserve(1, 0)
    with pytest.raises(QueueFull):
        scheduler.reserve(1, 0)
    scheduler.release(1, 0)
    added(scheduler, job("again"))


def test_a_bundle_is_forgotten_once_its_last_job_ended() -> None:
    scheduler = opened()
    added(scheduler, job("old"), job("older"))
    scheduler.admit()
    scheduler.open(1, 2)
    scheduler.retire(0)
    assert scheduler.close_idle() == []
    added(scheduler, job("new", bundle=1))
    while {"old", "older"} & scheduler.jobs.keys():
        assert tick(scheduler)
    assert scheduler.close_idle() == [0]
    while scheduler.jobs:
        tick(scheduler)
    assert scheduler.close_idle() == []  # the other stays


def test_bundles_share_one_queue_and_have_slots_of_their_own() -> None:
    scheduler = opened(slots=2, queue=3)
    scheduler.open(1, 1)
    assert (scheduler.room_for(0), scheduler.room_for(1)) == (5, 4)
    added(scheduler, *(job(str(k)) for k in range(4)))
    assert (scheduler.room_for(0), scheduler.room_for(1)) == (1, 2)
    added(scheduler, job("other", count=2, bundle=1))
    assert (scheduler.room_for(0), scheduler.room_for(1)) == (0, 0)
    with pytest.raises(QueueFull):
        scheduler.reserve(1, 1)


def test_a_bundle_stays_for_a_job_that_is_being_prepared() -> None:
    """It may be swapped twice meanwhile: the job still finds its bundle."""
    scheduler = opened()
    scheduler.reserve(1, 0)
    for newer in (1, 2):
        scheduler.open(newer, 4)
        scheduler.retire(newer - 1)
    assert scheduler.close_idle() == [1]
    scheduler.add(job("late"))
    while scheduler.jobs:
        assert tick(scheduler)
    assert scheduler.close_idle() == [0]


def test_after_a_split_no_batch_is_larger() -> None:
    scheduler = opened(slots=5)
    added(scheduler, *(job(str(k)) for k in range(5)))
    scheduler.admit()
    batch = scheduler.next_batch()
    assert batch is not None
    halves = scheduler.split(batch)
    assert [len(half.images) for half in halves] == [3, 2]
    assert [*halves[0].images, *halves[1].images] == list(batch.images)
    for half in halves:
        scheduler.advance(half.images)
    while (turn := tick(scheduler)) is not None:
        assert len(turn[0]) <= 3


def calls_of_the_light(*others: Job) -> list[float]:
    """For each of a client's short jobs, one after another, the images' steps until it is done, beside others."""
    scheduler = Scheduler(queue=100)
    scheduler.open(0, 8, 2)
    taken = list[float]()
    for k in range(6):
        light = job(f"light {k}", steps=4, interval=1)
        coming = [*(others if k == 0 else ()), light]
        added(scheduler, *coming)
        total = 0.0
        while light.id in scheduler.jobs:
            turn = tick(scheduler)
            assert turn is not None
            total += len(turn[0])
            if scheduler.jobs.keys() == {light.id} and others[0].plan.num_steps < 10:
                added(scheduler, job(f"again {total}", steps=4, interval=1))  # the other light client's next
        taken.append(total)
    return taken


def test_a_heavy_client_takes_no_more_than_a_light_one() -> None:
    beside_light = calls_of_the_light(job("other", steps=4, interval=1))
    beside_heavy = calls_of_the_light(job("heavy", steps=150, interval=1, count=8))
    assert sorted(beside_heavy)[3] <= 1.5 * sorted(beside_light)[3]
    beside_cached = calls_of_the_light(job("heavy", steps=150, interval=5, count=8))
    assert sorted(beside_cached)[3] <= 3 * sorted(beside_light)[3]  # most of these are shallow steps


def test_a_short_job_finds_a_slot_where_a_long_one_has_all() -> None:
    scheduler = Scheduler(queue=100)
    scheduler.open(0, 4, 1)
    added(scheduler, job("heavy", steps=100, count=8), job("as long", steps=100, count=8))
    assert len(scheduler.admit()) == 4
    added(scheduler, job("short", steps=10))
    assert [image.job.id for image in scheduler.admit()] == ["short"]
    added(scheduler, job("shorter", steps=5))
    assert scheduler.admit() == []


def test_free_slots_go_round() -> None:
    scheduler = opened(slots=4)
    added(scheduler, job("first", count=6), job("second", count=2), job("third"))
    assert sorted(image.job.id for image in scheduler.admit()) == ["first", "first", "second", "third"]
