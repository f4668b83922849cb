"""Admission in order, shared prompts, and dense rows; no model is needed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.engine.scheduler import PromptTable, Scheduler
from tafkir.engine.sequence import Sequence
from tafkir.records import Request, SamplingParams


@dataclass
class Room:
    """A cache of so many token places."""

    places: int = 10**9
    asked: list[tuple[int, int, int, int]] = field(default_factory=list)

    def fits(self, prompt_rows: int, prompt_length: int, rows: int, length: int) -> bool:
        self.asked.append((prompt_rows, prompt_length, rows, length))
        return prompt_rows * prompt_length + rows * length <= self.places


def sequence(name: str, prompt: tuple[int, ...] = (1, 2), limit: int = 4) -> Sequence:
    return Sequence(Request(name, prompt, SamplingParams()), key=0, limit=limit, stop_ids=())


def names(sequences: list[Sequence]) -> list[str]:
    return [seq.request.id for seq in sequences]


def test_first_come_first_served_up_to_the_batch() -> None:
    scheduler = Scheduler(max_batch=3, max_prefill_tokens=100)
    scheduler.waiting.extend(sequence(str(i)) for i in range(5))
    assert names(scheduler.admit(0, 0, PromptTable(), Room())) == ["0", "1", "2"]
    assert scheduler.admit(3, 4, PromptTable(), Room()) == []
    assert names(scheduler.admit(1, 4, PromptTable(), Room())) == ["3", "4"]


def test_a_full_batch_prefills_several_at_once() -> None:
    scheduler = Scheduler(max_batch=64, max_prefill_tokens=100)
    scheduler.waiting.extend(sequence(str(i)) for i in range(10))
    assert scheduler.admit(62, 4, PromptTable(), Room()) == [], "two free rows of 64 are not worth a prefill yet"
    assert len(scheduler.admit(60, 4, PromptTable(), Room())) == 4
    scheduler.waiting.clear()
    scheduler.waiting.append(sequence("last"))
    assert names(scheduler.admit(63, 4, PromptTable(), Room())) == ["last"], "nobody else is to come"


def test_the_prefill_limit_counts_a_shared_prompt_once() -> None:
    scheduler = Scheduler(max_batch=64, max_prefill_tokens=10)
    long = tuple(range(9))
    scheduler.waiting.extend(sequence(str(i), long) for i in range(4))
    scheduler.waiting.extend(sequence(f"other{i}", (i, i)) for i in range(2))
    assert names(scheduler.admit(0, 0, PromptTable(), Room())) == ["0", "1", "2", "3"]
    assert names(scheduler.admit(4, 4, PromptTable(), Room())) == ["other0", "other1"]
    scheduler.waiting.append(sequence("huge", tuple(range(50))))
    assert names(scheduler.admit(6, 4, PromptTable(), Room())) == ["huge"], "one longer prompt runs alone"


def test_memory_is_kept_for_all_that_may_still_come() -> None:
    scheduler = Scheduler(max_batch=64, max_prefill_tokens=100)
    scheduler.waiting.extend([sequence("small", limit=10), sequence("large", limit=90), sequence("after", limit=1)])
    room = Room(places=100)
    assert names(scheduler.admit(0, 0, PromptTable(), room)) == ["small"]
    assert room.asked[-1] == (1, 2, 2, 90), "both rows would need the longer one's length"
    assert names(list(scheduler)) == ["large", "after"], "nobody overtakes"


def test_removing_a_waiting_request() -> None:
    scheduler = Scheduler(max_batch=1, max_prefill_tokens=100)
    scheduler.waiting.extend(sequence(str(i)) for i in range(3))
    removed = scheduler.remove("1")
    assert removed is not None
    assert removed.request.id == "1"
    assert scheduler.remove("1") is None
    assert names(list(scheduler)) == ["0", "2"]


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=40))
@settings(max_examples=200, deadline=None)
def test_prompt_rows_stay_dense_and_hold_their_own(actions: list[tuple[int, bool]]) -> None:
    """A model of the cache follows the moves; every living prompt must find its content in its row."""
    table, cache, users = PromptTable(), {}, []
    for which, leave in actions:
        if leave and users:
            users.pop(which % len(users)).users -= 1
        elif leave:
            for src, dst in table.compact():
                cache[dst] = cache[src]
        else:
            prompt, is_new = table.acquire((which,))
            users.append(prompt)
            if is_new:
                cache[prompt.row] = prompt.ids
        assert [prompt.row for prompt in table.prompts] == list(range(len(table)))
        assert all(cache[prompt.row] == prompt.ids for prompt in users)
    for src, dst in table.compact():
        cache[dst] = cache[src]
    assert len(table) == len({prompt.ids for prompt in users})
    assert all(cache[prompt.row] == prompt.ids for prompt in users)
