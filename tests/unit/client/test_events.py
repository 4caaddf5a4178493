"""Parts of a generation that are taken together, as events."""

import pytest

from pageframe.client import Delta, Finished, Started
from pageframe.client.convert import event_from_proto, events_from_proto
from pageframe.core.errors import InternalError
from pageframe.core.step import TokenLogprobs
from pageframe.v1 import gateway_service_pb2 as pb
from unit.client.played_gateway import delta, end, header


def parts(*messages: pb.GenerateResponse) -> list[pb.GeneratePart]:
    return [pb.GeneratePart.FromString(_as_part(message)) for message in messages]


def _as_part(message: pb.GenerateResponse) -> bytes:
    kind = message.WhichOneof("message")
    return pb.GeneratePart(handle=7, **{kind: getattr(message, kind)}).SerializeToString()


def test_tokens_in_a_row_of_one_sample_are_one_delta():
    started, *deltas, finished = events_from_proto(
        parts(header(), delta("a", 1), delta("", 2, 3), delta("bc", 4), end(4))
    )
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert deltas == [Delta(sample_index=0, text="abc", token_ids=[1, 2, 3, 4])]


def test_samples_stay_apart_in_their_order():
    events = events_from_proto(
        parts(
            delta("a", 1),
            delta("b", 2),
            delta("x", 8, sample_index=1),
            delta("c", 3),
        )
    )
    assert [(event.sample_index, event.text, event.token_ids) for event in events] == [
        (0, "ab", [1, 2]),
        (1, "x", [8]),
        (0, "c", [3]),
    ]


def test_what_the_end_makes_certain_stays_by_itself():
    # Whoever resumes a stream that broke right behind it has to know that it has come.
    events = events_from_proto(parts(delta("a", 1), delta("b", 2), delta("\ufffd"), end(2)))
    assert [event.text for event in events[:-1]] == ["ab", "\ufffd"]


def test_figures_stay_with_their_tokens():
    def figured(token_id: int) -> pb.GenerateResponse:
        message = delta("a", token_id)
        message.delta.logprobs.add(token_id=token_id, logprob=-token_id / 2)
        return message

    first, second = figured(1), figured(2)
    first.delta.prompt_logprobs.add(token_id=9, logprob=-9.0)
    (event,) = events_from_proto(parts(first, second))
    assert event.token_ids == [1, 2]
    assert [(entry.token_id, entry.logprob) for entry in event.logprobs] == [(1, -0.5), (2, -1.0)]
    assert [entry.token_id for entry in event.prompt_logprobs] == [9]
    assert isinstance(event.logprobs[0], TokenLogprobs)
    alone = [event_from_proto(part) for part in parts(first, second)]
    assert event.logprobs == alone[0].logprobs + alone[1].logprobs


def test_a_part_of_a_kind_that_is_not_known_is_an_error():
    with pytest.raises(InternalError) as caught:
        events_from_proto([*parts(delta("a", 1)), pb.GeneratePart(handle=7)])
    assert caught.value.reason == "UNKNOWN_MESSAGE"
