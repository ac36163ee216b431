"""Whose turn it is."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from nibble.engines.queue import FairQueue

visits = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10_000)), unique_by=lambda visit: visit[1], max_size=40)


def filled(arrivals: list[tuple[int, int]]) -> FairQueue[int]:
    queue: FairQueue[int] = FairQueue()
    for visitor, item in arrivals:
        queue.put(item, visitor)
    return queue


def drained(queue: FairQueue[int]) -> list[int]:
    return [item for _ in queue.in_order() if (item := queue.take()) is not None]


@given(visits)
def test_the_order_told_is_the_order_served_and_nothing_is_lost(arrivals):
    queue = filled(arrivals)
    told = queue.in_order()
    assert drained(queue) == told
    assert sorted(told) == sorted(item for _, item in arrivals)


@given(visits)
def test_each_visitor_is_served_in_order_and_at_most_one_turn_behind_the_others(arrivals):
    owner = {item: visitor for visitor, item in arrivals}
    served: dict[int, list[int]] = {}
    total = {visitor: sum(1 for who, _ in arrivals if who == visitor) for visitor in owner.values()}
    for item in drained(filled(arrivals)):
        served.setdefault(owner[item], []).append(item)
        waiting = [who for who in total if len(served.get(who, [])) < total[who]]
        counts = [len(served.get(who, [])) for who in waiting]
        assert len(served[owner[item]]) <= min(counts, default=len(arrivals)) + 1
    for visitor, items in served.items():
        assert items == [item for who, item in arrivals if who == visitor]


def test_one_who_asks_a_hundred_times_delays_another_by_one():
    queue = filled([("busy", number) for number in range(100)])
    queue.take()
    queue.put(1000, "other")
    assert queue.in_order().index(1000) == 1


def test_whoever_leaves_is_not_served():
    queue = filled([("a", 1), ("a", 2), ("b", 3)])
    assert queue.remove(1)
    assert not queue.remove(1)
    assert drained(queue) == [2, 3]


def test_closing_wakes_whoever_waits_and_returns_the_rest():
    queue: FairQueue[int] = FairQueue()
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.append(queue.take()))
    thread.start()
    queue.close()
    thread.join(5)
    assert got == [None]
    assert filled([("a", 1), ("b", 2)]).close() == [1, 2]
