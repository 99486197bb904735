"""The scheduler of sequences over a fake model: chunks, turns, ends, and what is reused."""

import pytest
from tests.unit.support_engine import (
    FakeModel,
    answers,
    cached,
    drain,
    expected,
    first_seed,
    make_engine,
    make_job,
)

from meshd_plugins.builtin.llama.engine.jobs import Broken, Finished, Text
from meshd_plugins.builtin.llama.engine.scheduler import EngineFull
from meshd_plugins.builtin.llama.engine.sequences import common_prefix

KEEP = 1_000_000  # bytes, for all that any test keeps
STORY = tuple(1 + n % 9 for n in range(100))


def test_prompts_are_computed_in_chunks_and_only_the_last_token_is_an_output() -> None:
    model = FakeModel(1)
    subject = make_engine(model, chunk=4)
    subject.submit(make_job(1, range(1, 11), max_tokens=1))
    drain(subject)
    assert [len(batch) for batch in model.batches] == [4, 4, 2]
    assert [row.position for batch in model.batches for row in batch if row.output] == [9]


def test_a_long_prompt_does_not_stall_a_running_sequence() -> None:
    model = FakeModel(2)
    subject = make_engine(model, slots=2, context=200, chunk=4)
    subject.submit(make_job(1, (1,), seed=first_seed((1,), 10), max_tokens=10))
    subject.step()
    subject.submit(make_job(2, [5] * 40, max_tokens=1))
    for _ in range(3):
        subject.step()
        rows = model.batches[-1]
        assert rows[0].slot == 0
        assert rows[0].output
        assert len([row for row in rows if row.slot == 1]) == 4 + 1  # goes with the token beside it


def test_cancel_frees_the_slot_at_once_and_the_next_job_gets_it() -> None:
    model = FakeModel(1)
    subject = make_engine(model)
    subject.submit(make_job(1, max_tokens=40))
    subject.submit(make_job(2, (4, 5), max_tokens=5))
    subject.step()
    assert (subject.free_slots, subject.waiting) == (0, 1)
    subject.cancel(1)
    assert subject.free_slots == 1
    outputs = drain(subject)
    assert {output.job for output in outputs} == {2}
    assert answers(outputs)[2] == expected(make_job(2, (4, 5), max_tokens=5), 50)[0]


def test_a_waiting_job_can_be_cancelled() -> None:
    subject = make_engine(FakeModel(1))
    subject.submit(make_job(1))
    subject.submit(make_job(2))
    subject.step()
    subject.cancel(2)
    assert {output.job for output in drain(subject)} <= {1}


def test_too_many_jobs_are_refused() -> None:
    subject = make_engine(FakeModel(1), waiting=2)
    for number in range(3):
        subject.submit(make_job(number))
    with pytest.raises(EngineFull):
        subject.submit(make_job(9))


def test_where_too_many_wait_who_has_most_gives_way_to_who_has_least() -> None:
    subject = make_engine(FakeModel(1), waiting=4)
    given_way = [subject.submit(make_job(number, caller="greedy")) for number in range(5)]
    assert given_way == [None] * 5
    modest = [subject.submit(make_job(10 + number, caller="modest")) for number in range(2)]
    assert [job.id if job else None for job in modest] == [4, 3], "the latest of the other's"
    with pytest.raises(EngineFull):  # who has as many as anybody, or but one less, is refused
        subject.submit(make_job(20, caller="modest"))
    with pytest.raises(EngineFull):
        subject.submit(make_job(21, caller="greedy"))
    late = subject.submit(make_job(30, caller="late"))
    assert late is not None
    assert {output.job for output in drain(subject)} == {0, 1, 2, 10, 11, 30} - {late.id}


def test_an_answer_ends_where_the_context_is_full() -> None:
    subject = make_engine(FakeModel(1), context=6)
    subject.submit(make_job(1, seed=first_seed((1, 2, 3), 3), max_tokens=100))
    *_, last = drain(subject)
    assert last == Finished(1, "length", 3, 3, 0)


def test_a_stop_string_ends_the_answer_and_is_not_shown() -> None:
    seed = first_seed((1, 2, 3), 3, distinct=3)
    first, second, third = expected(make_job(1, seed=seed, max_tokens=3), 50)[0]
    subject = make_engine(FakeModel(1))
    subject.submit(make_job(1, seed=seed, max_tokens=20, stop=(f"<{third}>",)))
    outputs = drain(subject)
    text = "".join(output.piece.text for output in outputs if isinstance(output, Text))
    assert text == f"<{first}><{second}>"
    assert outputs[-1] == Finished(1, "stop", 3, 3, 0)


def test_one_sequence_gets_a_part_of_its_prompt_and_the_others_what_completes_them() -> None:
    model = FakeModel(4)
    subject = make_engine(model, slots=4, context=200, chunk=10)
    for job, tokens in enumerate((30, 6, 3, 4), start=1):
        subject.submit(make_job(job, [job] * tokens, max_tokens=50))
    subject.step()  # the first step favours who waited longest: all of the chunk is one part
    assert [row.token for row in model.batches[-1]] == [1] * 10
    subject.step()  # 3 and 4 fit, and leave 3 for a prompt of 6: it waits rather than be cut
    assert sorted(row.token for row in model.batches[-1]) == [3] * 3 + [4] * 4
    subject.step()
    prompts = [row.token for row in model.batches[-1] if not row.output or row.token == 2]
    assert prompts == [2] * 6


def test_a_batch_that_is_refused_breaks_its_jobs_and_leaks_nothing() -> None:
    model = FakeModel(2)
    subject = make_engine(model, slots=2, chunk=60)
    subject.submit(make_job(1))
    subject.submit(make_job(2))
    model.refuse_next = True
    assert subject.step() == [Broken(1, "full"), Broken(2, "full")]
    assert (subject.free_slots, model.samplers, subject.busy) == (2, 0, False)
    subject.submit(make_job(3, max_tokens=2))
    assert isinstance(drain(subject)[-1], Finished)


# -- order -----------------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    model = FakeModel(2)
    subject = make_engine(model, slots=2, context=200, chunk=8)
    subject.submit(make_job(1, [5] * 150, max_tokens=1))
    for _ in range(3):
        subject.step()
    subject.submit(make_job(2, [7] * 6, seed=first_seed([7] * 6, 1), max_tokens=1))
    ended = [output.job for _ in range(2) for output in subject.step()]
    assert 2 in ended


def test_a_long_prompt_comes_to_its_end_among_short_ones() -> None:
    model = FakeModel(2)
    subject = make_engine(model, slots=2, context=200, chunk=8, waiting=100)
    subject.submit(make_job(0, [5] * 64, max_tokens=1))
    ended: list[int] = []
    for number in range(1, 60):
        subject.submit(make_job(number, [7] * 8, max_tokens=1))
        ended += [output.job for output in subject.step() if isinstance(output, Finished)]
    assert 0 in ended


def test_callers_take_turns() -> None:
    subject = make_engine(FakeModel(1), waiting=50)
    for number in range(10):
        subject.submit(make_job(number, caller="many", max_tokens=1))
    subject.submit(make_job(99, caller="one", max_tokens=1))
    order = [output.job for output in drain(subject) if isinstance(output, Finished)]
    assert order.index(99) == 1


# -- what is computed already -----------------------------------------------------------------------------


def test_the_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    model = FakeModel(2)
    subject = make_engine(model, slots=2, context=300)
    subject.submit(make_job(1, STORY, seed=first_seed(STORY, 5), max_tokens=5))
    first = answers(drain(subject))[1]
    model.batches.clear()
    # The last token of an answer was never computed.
    longer = (*STORY, *first, 3, 3, 3)
    subject.submit(make_job(2, longer, max_tokens=1))
    assert cached(drain(subject)) == {2: len(STORY) + len(first) - 1}
    assert sum(len(batch) for batch in model.batches) == 4


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    model = FakeModel(1)
    subject = make_engine(model, context=300)
    for number in (1, 2):
        subject.submit(make_job(number, STORY, max_tokens=3))
        outputs = drain(subject)
    assert cached(outputs) == {2: len(STORY) - 1}
    assert answers(outputs)[2] == expected(make_job(2, STORY, max_tokens=3), 300)[0]


def test_nothing_of_another_caller_is_reused() -> None:
    model = FakeModel(3)
    subject = make_engine(model, slots=3, context=300, kept_bytes_max=KEEP)
    for number, caller in enumerate(["ada", "bob"]):
        subject.submit(make_job(number, STORY, caller=caller, max_tokens=1))
        assert cached(drain(subject)) == {number: 0}


def test_what_is_cut_off_a_copy_does_not_become_the_last_caller_s() -> None:
    subject = make_engine(FakeModel(1), context=300, kept_bytes_max=KEEP)
    beginning = STORY[:20]
    for number, (prompt, caller) in enumerate(
        [(STORY, "bob"), (STORY[::-1][:20], "ada"), ((*beginning, 9), "bob")]
    ):
        subject.submit(make_job(number, prompt, caller=caller, max_tokens=1))
        drain(subject)
    subject.submit(make_job(9, (*STORY, 7), caller="ada", max_tokens=1))
    assert cached(drain(subject)) == {9: 0}, "bob's story, brought into the slot that was ada's"


def test_a_conversation_that_lost_its_slot_is_taken_from_outside_of_the_context() -> None:
    model = FakeModel(1)
    subject = make_engine(model, context=300, kept_bytes_max=KEEP)
    subject.submit(make_job(1, STORY, max_tokens=1))
    subject.submit(make_job(2, STORY[::-1], max_tokens=1))
    drain(subject)
    assert subject.kept_bytes > 0
    subject.submit(make_job(3, (*STORY, 4), max_tokens=1))
    assert cached(drain(subject)) == {3: len(STORY)}


def test_what_is_kept_stays_within_its_bound() -> None:
    model = FakeModel(1)
    subject = make_engine(model, context=300, kept_bytes_max=2500)
    for number in range(1, 8):
        subject.submit(make_job(number, [number, *STORY], max_tokens=1))
        drain(subject)
        assert subject.kept_bytes <= 2500
    assert subject.kept_bytes > 0


def test_two_jobs_at_once_share_what_one_of_them_has_computed() -> None:
    model = FakeModel(2)
    subject = make_engine(model, slots=2, context=300, chunk=200)
    subject.submit(make_job(1, STORY, seed=first_seed(STORY, 20), max_tokens=20))
    subject.step()
    subject.submit(make_job(2, (*STORY, 4, 4), max_tokens=1))
    assert cached(drain(subject))[2] == len(STORY)


@pytest.mark.parametrize("broken", ["forgets_parts", "saves", "restores"])
def test_a_model_without_a_memory_that_can_be_cut_or_copied_computes_it_all(broken: str) -> None:
    model = FakeModel(1)
    setattr(model, broken, False)
    subject = make_engine(model, context=300, kept_bytes_max=KEEP)
    for number, prompt in enumerate([STORY, STORY[::-1], STORY[:90]]):
        subject.submit(make_job(number, prompt, max_tokens=2))
        outputs = drain(subject)
        assert cached(outputs) == {number: 0}
        wanted = expected(make_job(number, prompt, max_tokens=2), 300)[0]
        assert answers(outputs).get(number, []) == wanted


def test_a_prompt_that_the_operator_named_serves_everybody() -> None:
    pin = STORY[:40]
    model = FakeModel(1)
    subject = make_engine(model, context=300, kept_bytes_max=KEEP, pinned=(pin,))
    found = []
    for number, caller in enumerate(["ada", "bob", "cal"]):
        subject.submit(make_job(number, (*pin, 9, number + 1), caller=caller, max_tokens=1))
        found.append(cached(drain(subject))[number])
    assert found == [0, 40, 40]


# -- gaps --------------------------------------------------------------------------------------------------


def test_sequences_move_together_when_one_between_them_ends() -> None:
    model = FakeModel(3)
    subject = make_engine(model, slots=3, context=300, chunk=300, kept_bytes_max=KEEP)
    seed = first_seed((1,), 60)
    subject.submit(make_job(1, (1,), seed=seed, max_tokens=60))
    subject.submit(make_job(2, (1, 2), seed=first_seed((1, 2), 1), max_tokens=1))
    subject.submit(make_job(3, (1,), seed=seed, max_tokens=60))
    outputs = drain(subject)
    assert subject.slots.moved == 1
    assert {row.slot for row in model.batches[-1]} <= {0, 1}
    assert answers(outputs)[3] == expected(make_job(3, (1,), seed=seed, max_tokens=60), 300)[0]


# -- to and from other nodes ------------------------------------------------------------------------------


def test_what_has_a_tag_can_be_exported_by_its_caller_and_adopted_elsewhere() -> None:
    here = make_engine(FakeModel(2), slots=2, context=300, kept_bytes_max=KEEP)
    here.submit(make_job(1, STORY, caller="ada", tag=b"tag", privacy=1, max_tokens=1))
    drain(here)
    assert [(w.tag, w.tokens, w.scope.privacy) for w in here.warm()] == [(b"tag", len(STORY), 1)]
    assert here.export(b"tag", "bob") is None
    assert here.export(b"other", "ada") is None
    kept = here.export(b"tag", "ada")
    assert kept is not None

    there = make_engine(FakeModel(1), context=300, kept_bytes_max=KEEP)
    assert there.adopt(kept)
    assert not there.adopt(kept), "it is there already"
    there.submit(make_job(2, (*STORY, 4), caller="ada", max_tokens=1))
    there.submit(make_job(3, (*STORY, 5), caller="bob", max_tokens=1))
    assert cached(drain(there)) == {2: len(STORY), 3: 0}


def test_a_sequence_is_as_private_as_the_most_private_request_in_it() -> None:
    subject = make_engine(FakeModel(1), context=300, kept_bytes_max=KEEP)
    subject.submit(make_job(1, STORY, caller="ada", privacy=0, max_tokens=1))
    drain(subject)
    subject.submit(make_job(2, (*STORY, 4), caller="ada", privacy=2, tag=b"tag", max_tokens=1))
    drain(subject)
    [warm] = subject.warm()
    assert warm.scope.privacy == 0


def test_common_prefix_is_found_at_every_length() -> None:
    for length in range(len(STORY) + 1):
        other = [*STORY[:length], 77, 78]
        assert common_prefix(list(STORY), other) == length
        assert common_prefix(other, list(STORY)) == length
