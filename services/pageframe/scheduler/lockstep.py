"""Takes the tokens of a step to their sequences and gateways, a column at a time.

Whoever took a token in one step takes one in the next, and results keep their order. So what does
not change from step to step is kept in columns, with one place for each sequence:

    result     ids  [ 7   9   4   12 ]   tokens  [ 31  8  31  2 ]
                      ║   ║   ║   ║                │  │   │   │
    columns    ids  [ 7   9   4   12 ]   outputs [ ·  ·   ·   · ]     one call in C for each
               lane [ a   b   a   -- ]   handles of a [ 1 5 ]         copied whole

If a result names those that are expected, nothing is looked up and no statement is executed for
each token. What differs is found by comparing: who is missing leaves, and who else took a token is
looked at by itself and joins. Tokens that wait for others of their sequence go by a timetable, for
it is known from the start in which step they will be enough.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Numbers
from itertools import compress, pairwise

from pageframe.core.step import FinishReason, StepResult, TokenLogprobs
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.sequence import NEVER, Sequence
from pageframe.scheduler.shares import Share


class _Lane:
    """Those whose tokens go to one gateway as they come.

    Attributes:
        outbox: Of the gateway.
        is_in: One byte for each place, 1 where the sequence is of this lane.
        handles: Of those, in order.
        sample_indices: Likewise.
    """

    __slots__ = ("handles", "is_in", "outbox", "sample_indices")

    def __init__(self, outbox: Outbox, num_places: int) -> None:
        self.outbox = outbox
        self.is_in = bytearray(num_places)
        self.handles: list[int] = []
        self.sample_indices: list[int] = []

    def insert(self, place: int, sequence: Sequence, *, is_mine: bool) -> None:
        """There is one place more."""
        self.is_in.insert(place, is_mine)
        if is_mine:
            index = self.is_in.count(1, 0, place)
            self.handles.insert(index, sequence.handle)
            self.sample_indices.insert(index, sequence.sample_index)

    def remove(self, place: int) -> None:
        """There is one place less."""
        if self.is_in.pop(place):
            index = self.is_in.count(1, 0, place)
            del self.handles[index], self.sample_indices[index]

    def send(self, token_ids: Numbers[int]) -> None:
        """Send one token of each; ``token_ids`` has those of all places."""
        events, num_mine = self.outbox.events, len(self.handles)
        is_alone = num_mine == len(token_ids)
        events.handles += self.handles
        events.sample_indices += self.sample_indices
        events.num_tokens += [1] * num_mine
        events.token_ids += token_ids if is_alone else compress(token_ids, self.is_in)

    def add_logprobs(self, place: int, num_before: int, logprobs: TokenLogprobs) -> None:
        """Send them with the token of ``place``; the lane's begin at index ``num_before``."""
        self.outbox.events.logprobs[num_before + self.is_in.count(1, 0, place)] = logprobs


class Lockstep:
    """Sequences that took a token in the newest step, in the order of its result."""

    def __init__(self) -> None:
        self._step = 0
        self._members: set[int] = set()
        self._ids: list[int] = []
        self._sequences: list[Sequence] = []
        self._outputs: list[array[int]] = []
        self._lanes: dict[Outbox, _Lane] = {}
        self._num_of: dict[Share, int] = {}
        # Who will have tokens enough for an event, by step and id; and the step by id.
        self._due: dict[int, dict[int, Sequence]] = {}
        self._due_step: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def take(
        self, result: StepResult, sequences: Mapping[int, Sequence]
    ) -> list[tuple[Sequence, FinishReason]]:
        """Append each sampled token to its sequence and deliver it; returns those that ended.

        Tokens of sequences that are gone or muted are dropped: their last step crossed our cancel.
        """
        ids, token_ids = result.sampled_ids, result.token_ids
        ending = list(compress(range(len(ids)), result.finish_reasons))
        for index in ending:
            if token_ids[index] < 0 and ids[index] in sequences:
                # It failed and got no token.
                self.leave(sequences[ids[index]])
        if ids == self._ids:
            self._take_columns(token_ids, range(len(ids)), result)
        else:
            places, others = self._compare(ids)
            if places:
                is_prefix = isinstance(places, range)
                mine = token_ids[: len(places)] if is_prefix else [token_ids[k] for k in places]
                self._take_columns(mine, places, result)
            self._take_others(others, result, sequences)
        ended = [
            (sequences[ids[index]], FinishReason(result.finish_reasons[index]))
            for index in ending
            if ids[index] in sequences
        ]
        for index in reversed(ending):
            self._leave(ids[index], index)
        return ended

    def leave(self, sequence: Sequence) -> None:
        """No token of ``sequence`` is expected any more; it need not be among them."""
        self._leave(sequence.sequence_id, 0)

    def _leave(self, sequence_id: int, place: int) -> None:
        """Take one out that may be at ``place``."""
        if sequence_id not in self._members:
            return
        if place >= len(self._ids) or self._ids[place] != sequence_id:
            place = self._ids.index(sequence_id)
        self._remove(place)

    def _compare(self, ids: list[int]) -> tuple[Numbers[int], Iterable[int]]:
        """Where those that are expected are in a result, and where others; the missing leave."""
        num_expected, num_ids = len(self._ids), len(ids)
        if ids[:num_expected] == self._ids:
            return range(num_expected), range(num_expected, num_ids)
        # With drafts a sequence may be named more than once; its first place counts.
        place_of = dict(zip(reversed(ids), range(num_ids - 1, -1, -1), strict=True))
        places = list(map(place_of.get, self._ids))
        for place in [place for place, found in enumerate(places) if found is None][::-1]:
            self._remove(place)
        found = [place for place in places if place is not None]
        if any(first > second for first, second in pairwise(found)):
            self._sort(found)
            found.sort()
        mine = set(found)
        return found, [place for place in range(num_ids) if place not in mine]

    def _take_columns(self, token_ids: list[int], places: Numbers[int], result: StepResult) -> None:
        """Take one token of each; ``places`` says where in the result it is."""
        self._step += 1
        # Calls in C, one for each; nobody wants the Nones that they return.
        deque(map(array.append, self._outputs, token_ids), maxlen=0)
        for share, num_sequences in self._num_of.items():
            share.num_output_tokens += num_sequences
        num_before = {lane: len(lane.outbox.events.token_ids) for lane in self._lanes.values()}
        for lane in num_before:
            lane.send(token_ids)
        if result.logprobs:
            self._add_logprobs(num_before, places, result.logprobs)
        for sequence in list(self._due.get(self._step, {}).values()):
            sequence.outbox.flush(sequence)
            self._wait(sequence)

    def _add_logprobs(
        self,
        num_before: Mapping[_Lane, int],
        places: Numbers[int],
        logprobs: Mapping[int, TokenLogprobs],
    ) -> None:
        place_of = {found: place for place, found in enumerate(places) if found in logprobs}
        for found, place in place_of.items():
            sequence = self._sequences[place]
            if sequence.num_tokens_per_event > 1:
                sequence.pending_logprobs.append(logprobs[found])
            else:
                lane = self._lanes[sequence.outbox]
                lane.add_logprobs(place, num_before[lane], logprobs[found])

    def _take_others(
        self, places: Iterable[int], result: StepResult, sequences: Mapping[int, Sequence]
    ) -> None:
        """Look at those one by one that were not expected; they join."""
        num_passed = 0
        for place in places:
            sequence_id, token_id = result.sampled_ids[place], result.token_ids[place]
            sequence = sequences.get(sequence_id)
            if sequence is None or sequence.is_muted or token_id < 0:
                num_passed += 1
                continue
            sequence.output.append(token_id)
            sequence.share.num_output_tokens += 1
            sequence.outbox.add(sequence, token_id, result.logprobs.get(place))
            if sequence_id in self._members:
                num_passed += 1
                self._wait(sequence)
            else:
                self._insert(place - num_passed, sequence)

    def _insert(self, place: int, sequence: Sequence) -> None:
        is_sent_at_once = sequence.num_tokens_per_event == 1
        if is_sent_at_once and sequence.outbox not in self._lanes:
            self._lanes[sequence.outbox] = _Lane(sequence.outbox, len(self._ids))
        self._members.add(sequence.sequence_id)
        self._ids.insert(place, sequence.sequence_id)
        self._sequences.insert(place, sequence)
        self._outputs.insert(place, sequence.output)
        for outbox, lane in self._lanes.items():
            is_mine = is_sent_at_once and outbox is sequence.outbox
            lane.insert(place, sequence, is_mine=is_mine)
        self._num_of[sequence.share] = self._num_of.get(sequence.share, 0) + 1
        self._wait(sequence)

    def _remove(self, place: int) -> None:
        sequence = self._sequences[place]
        self._members.remove(sequence.sequence_id)
        del self._ids[place], self._sequences[place], self._outputs[place]
        for lane in self._lanes.values():
            lane.remove(place)
        if sequence.num_tokens_per_event == 1 and not self._lanes[sequence.outbox].handles:
            del self._lanes[sequence.outbox]
        self._num_of[sequence.share] -= 1
        if not self._num_of[sequence.share]:
            del self._num_of[sequence.share]
        self._stop_waiting(sequence)

    def _sort(self, found: list[int]) -> None:
        """The executor has changed the order; ``found`` has the place of each in its own."""
        in_order = sorted(range(len(found)), key=found.__getitem__)
        members = [self._sequences[place] for place in in_order]
        for place in reversed(range(len(members))):
            self._remove(place)
        for place, sequence in enumerate(members):
            self._insert(place, sequence)

    def _wait(self, sequence: Sequence) -> None:
        """Set down when the tokens of a sequence will be enough for an event, if it waits for that.

        There is at least one step until then, for who has enough is sent at once.
        """
        if not 1 < sequence.num_tokens_per_event < NEVER:
            return
        self._stop_waiting(sequence)
        num_pending = len(sequence.output) - sequence.num_delivered
        due_step = self._step + sequence.num_tokens_per_event - num_pending
        self._due_step[sequence.sequence_id] = due_step
        self._due.setdefault(due_step, {})[sequence.sequence_id] = sequence

    def _stop_waiting(self, sequence: Sequence) -> None:
        due_step = self._due_step.pop(sequence.sequence_id, None)
        if due_step is not None:
            waiting = self._due[due_step]
            del waiting[sequence.sequence_id]
            if not waiting:
                del self._due[due_step]
