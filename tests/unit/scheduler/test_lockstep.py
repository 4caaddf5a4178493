"""Tokens of a step taken by columns are those that would be taken one by one."""

import random
from array import array

import pytest

from pageframe.core.request import Delivery
from pageframe.core.step import FinishReason, StepResult, TokenLogprobs
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.lockstep import Lockstep
from pageframe.scheduler.sequence import Sequence
from pageframe.scheduler.shares import Share
from pageframe.scheduler.stalls import StallMeter
from unit.scheduler.driver import make_submission


def make_sequence(sequence_id, outbox, share, delivery=Delivery.EVERY_TOKEN, num_each=3):
    return Sequence(
        sequence_id=sequence_id,
        sample_index=sequence_id % 2,
        submission=make_submission(
            10 * sequence_id, delivery=delivery, num_tokens_per_event_max=num_each
        ),
        gateway_id=outbox.gateway_id,
        outbox=outbox,
        output=array("i"),
        span_id=0,
        submit_ns=0,
        stalls=StallMeter(),
        share=share,
    )


def take_one_by_one(result, sequences):
    """What ``Lockstep.take`` does, in the obvious way."""
    ended = []
    for index, (sequence_id, token_id, reason) in enumerate(
        zip(result.sampled_ids, result.token_ids, result.finish_reasons, strict=True)
    ):
        sequence = sequences.get(sequence_id)
        if sequence is None:
            continue
        if reason:
            ended.append((sequence_id, FinishReason(reason)))
            if token_id < 0:
                continue
        if sequence.is_muted:
            continue
        sequence.output.append(token_id)
        sequence.share.num_output_tokens += 1
        sequence.outbox.add(sequence, token_id, result.logprobs.get(index))
    return ended


def heard(outbox):
    """By handle: its tokens, in how many events, and their log-probabilities."""
    events, start = outbox.events, 0
    found = {}
    for handle, sample_index, num_tokens in zip(
        events.handles, events.sample_indices, events.num_tokens, strict=True
    ):
        entries = found.setdefault((handle, sample_index), [])
        tokens = events.token_ids[start : start + num_tokens]
        logprobs = [events.logprobs.get(start + k) for k in range(num_tokens)]
        entries.append((tokens, logprobs))
        start += num_tokens
    assert start == len(events.token_ids)
    return found


class House:
    """Two gateways, two tenants and some sequences, of every delivery."""

    def __init__(self, num_sequences):
        self.outboxes = [Outbox(0), Outbox(1)]
        self.shares = [Share("a"), Share("b")]
        deliveries = list(Delivery)
        self.sequences = {
            k: make_sequence(
                k, self.outboxes[k % 3 == 0], self.shares[k % 5 == 0], deliveries[(k - 1) % 7 % 3]
            )
            for k in range(1, num_sequences + 1)
        }

    def hear(self):
        """What each gateway hears now."""
        found = [heard(outbox) for outbox in self.outboxes]
        for outbox in self.outboxes:
            outbox.events = type(outbox.events)(step=0)
        return found


def step(ids, tokens, reasons=None, **parts):
    return StepResult(
        step=1,
        sampled_ids=ids,
        token_ids=tokens,
        finish_reasons=reasons or [0] * len(ids),
        **parts,
    )


def test_who_is_named_again_is_taken_by_column():
    house, lockstep = House(2), Lockstep()
    lockstep.take(step([1, 2], [5, 6]), house.sequences)
    assert len(lockstep) == 2
    house.hear()
    lockstep.take(step([1, 2], [7, 8]), house.sequences)
    assert [list(s.output) for s in house.sequences.values()] == [[5, 7], [6, 8]]
    # Sequence 2 waits until it has three.
    assert house.hear() == [{(10, 1): [([7], [None])]}, {}]
    assert house.shares[0].num_output_tokens == 4


def test_a_token_of_who_has_left_meanwhile_is_dropped():
    house, lockstep = House(3), Lockstep()
    lockstep.take(step([1, 2, 3], [5, 6, 7]), house.sequences)
    house.sequences[2].is_muted = True
    lockstep.leave(house.sequences[2])
    lockstep.take(step([1, 2, 3], [8, 9, 10]), house.sequences)
    assert [list(s.output) for s in house.sequences.values()] == [[5, 8], [6], [7, 10]]
    assert len(lockstep) == 2


def test_nothing_is_kept_of_who_is_over():
    house, lockstep = House(6), Lockstep()
    ids = list(house.sequences)
    lockstep.take(step(ids, [5] * 6), house.sequences)
    lockstep.take(step(ids, [5] * 6, [FinishReason.LENGTH] * 6), house.sequences)
    kept = [getattr(lockstep, name) for name in ("_members", "_lanes", "_num_of", "_due")]
    assert (len(lockstep), *map(len, kept)) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(60))
def test_columns_give_what_one_by_one_gives(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    fast, slow, lockstep = House(24), House(24), Lockstep()
    running, waiting = list(range(1, 9)), list(range(9, 25))
    for _ in range(60):
        if waiting and rng.random() < 0.3:
            running.insert(len(running) if rng.random() < 0.8 else 0, waiting.pop())
        if rng.random() < 0.1:
            rng.shuffle(running)
        ids = [k for k in running if rng.random() < 0.97]
        # Drafts that were kept; failures; and who nobody knows any more.
        ids += [k for k in ids if rng.random() < 0.05]
        ids += [99] * (rng.random() < 0.1)
        tokens = [rng.randrange(1000) for _ in ids]
        reasons = [0] * len(ids)
        for index, sequence_id in enumerate(ids):
            if rng.random() < 0.02 and sequence_id not in ids[index + 1 :]:
                reasons[index] = rng.choice([FinishReason.STOP, FinishReason.ERROR])
                if reasons[index] is FinishReason.ERROR:
                    tokens[index] = -1
        told = {
            index: TokenLogprobs(token_id=token, logprob=-1.0)
            for index, token in enumerate(tokens)
            if token >= 0 and rng.random() < 0.2
        }
        result = step(ids, tokens, reasons, logprobs=told)
        ended = lockstep.take(result, fast.sequences)
        assert [(s.sequence_id, reason) for s, reason in ended] == take_one_by_one(
            result, slow.sequences
        )
        if rng.random() < 0.6:
            # Else it finds what the step before left.
            assert fast.hear() == slow.hear()
        gone = {s.sequence_id for s, _ in ended}
        muted = {k for k in running if rng.random() < 0.02}
        for sequence_id in gone:
            del fast.sequences[sequence_id], slow.sequences[sequence_id]
        for sequence_id in muted - gone:
            for house in (fast, slow):
                house.sequences[sequence_id].is_muted = True
            lockstep.leave(fast.sequences[sequence_id])
        running = [k for k in running if k not in gone]
        for sequence_id, sequence in fast.sequences.items():
            assert sequence.output == slow.sequences[sequence_id].output
    counts = [[share.num_output_tokens for share in house.shares] for house in (fast, slow)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 50
