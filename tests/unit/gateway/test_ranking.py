"""Outputs that are ranked: ``best_of`` and beam searches at the gateway."""

import asyncio

import pytest

from pageframe.core.beams import BeamParams
from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.request import Completion, Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.gateway.convert import input_from_proto, output_to_proto
from pageframe.gateway.output import OutputDelta, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.validation import check_input, resolve_sampling
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import sequence_pb2
from unit.gateway.driving import collect, encode, make_service, start
from unit.gateway.replicas import make_facts

FACTS = make_facts(max_model_len=100, num_blocks=5, block_size=16, vocab_size=50)
BEAMS = BeamParams(num_beams=4, num_return=2)
NUMBER = Grammar(GrammarForm.REGEX, "[0-9]+")


def request(**fields) -> GenerateInput:
    return GenerateInput(**({"text": "hi", "delivery": Delivery.FINAL} | fields))


def logprobs(token_ids, each):
    return [TokenLogprobs(token_id=token_id, logprob=each) for token_id in token_ids]


def ranked(link, samples, *, stop=(), num_logprobs=-1, **fields):
    """Run a request whose samples get (tokens, log-probability of each); the last ends first."""

    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(
            service,
            delivery=Delivery.FINAL,
            stop=stop,
            sampling=SamplingParams(num_logprobs=num_logprobs),
            **fields,
        )
        mailbox = link.mailboxes[0]
        for index in reversed(range(len(samples))):
            token_ids, each = samples[index]
            assert not following.done()
            mailbox.put_tokens(index, token_ids, logprobs(token_ids, each))
            link.end(1, index, num_prompt_tokens=3)
            await asyncio.sleep(0)
        return [await following, *await collect(outputs)]

    return asyncio.run(scenario())


def test_the_most_probable_for_each_token_come_back_best_first(link, model_folder):
    dog, fox, runs = (encode(model_folder, text) for text in ("the dog", "the fox runs", "runs"))
    # The third is worst in all, for it is longest; for each token it is second best.
    outputs = ranked(
        link, [(dog, -2.0), (runs, -0.5), (fox, -1.0), (dog, -3.0)], num_samples=2, best_of=4
    )
    assert link.submissions[0].num_samples == 4
    assert link.submissions[0].sampling.num_logprobs == 0
    deltas = [output for output in outputs if isinstance(output, OutputDelta)]
    ends = [output for output in outputs if isinstance(output, SampleEnd)]
    assert [(delta.sample_index, delta.token_ids) for delta in deltas] == [(0, runs), (1, fox)]
    assert [(end.sample_index, end.completion.score) for end in ends] == [(0, -0.5), (1, -1.0)]
    assert [delta.logprobs for delta in deltas] == [[], []]
    # All that was computed is accounted for.
    assert ends[0].completion.num_unreturned_tokens == 2 * len(dog)
    assert ends[1].completion.num_unreturned_tokens == 0


def test_equals_come_in_the_order_of_their_samples(link, model_folder):
    dog, fox = encode(model_folder, "the dog"), encode(model_folder, "the fox")
    outputs = ranked(link, [(fox, -1.0), (dog, -1.0)], num_samples=1, best_of=2)
    assert outputs[0].token_ids == fox


def test_what_a_stop_string_cut_off_does_not_count(link, model_folder):
    token_ids = encode(model_folder, "the dog runs")

    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(
            service, delivery=Delivery.FINAL, stop=("dog",), num_samples=1, best_of=2
        )
        mailbox = link.mailboxes[0]
        # Only what stands behind the stop string is improbable.
        each = [-1.0, -1.0, *([-90.0] * (len(token_ids) - 2))]
        figures = [
            TokenLogprobs(token_id=token_id, logprob=logprob)
            for token_id, logprob in zip(token_ids, each, strict=True)
        ]
        mailbox.put_tokens(0, token_ids, figures)
        mailbox.put_tokens(1, token_ids[:1], logprobs(token_ids[:1], -2.0))
        for index in (0, 1):
            link.end(1, index)
        return [await following, *await collect(outputs)]

    outputs = asyncio.run(scenario())
    assert outputs[0].text == "the "
    assert outputs[1].stop == "dog"
    assert outputs[1].completion.score == -1.0


def test_log_probabilities_are_told_where_asked_for(link, model_folder):
    dog = encode(model_folder, "the dog")
    outputs = ranked(link, [(dog, -1.0), (dog, -2.0)], num_samples=1, best_of=2, num_logprobs=3)
    assert link.submissions[0].sampling.num_logprobs == 3
    assert outputs[0].logprobs == logprobs(dog, -1.0)


def test_best_of_no_more_than_is_returned_streams_as_ever(link, model_folder):
    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service, num_samples=2, best_of=2)
        link.mailboxes[0].put_tokens(0, encode(model_folder, "the dog"))
        delta = await following
        for index in (0, 1):
            link.end(1, index)
        return delta, await collect(outputs)

    delta, ends = asyncio.run(scenario())
    assert delta.token_ids
    assert [end.completion.score for end in ends] == [None, None]


def test_a_search_is_submitted_as_one_and_its_scores_come_back(link, model_folder):
    dog, fox = encode(model_folder, "the dog"), encode(model_folder, "the fox")

    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service, delivery=Delivery.FINAL, beams=BEAMS)
        mailbox = link.mailboxes[0]
        for index, (token_ids, score) in enumerate(((dog, -0.5), (fox, -0.7))):
            mailbox.put_tokens(index, token_ids)
            mailbox.put_completion(
                Completion(
                    handle=1, sample_index=index, finish_reason=FinishReason.STOP, score=score
                )
            )
        return [await following, *await collect(outputs)]

    outputs = asyncio.run(scenario())
    (submission,) = link.submissions
    assert (submission.beams, submission.num_samples) == (BEAMS, 2)
    assert submission.delivery is Delivery.FINAL
    assert [output.text for output in outputs[::2]] == ["the dog", "the fox"]
    assert output_to_proto(outputs[1]).completion.score == -0.5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_samples": 3, "best_of": 2}, "BEST_OF_OUT_OF_RANGE"),
        ({"best_of": 65}, "BEST_OF_OUT_OF_RANGE"),
        ({"best_of": 0}, "BEST_OF_OUT_OF_RANGE"),
        ({"best_of": 2, "delivery": Delivery.EVERY_TOKEN}, "DELIVERY_NOT_FINAL"),
        ({"best_of": 2, "delivery": Delivery.COALESCED}, "DELIVERY_NOT_FINAL"),
        ({"best_of": 2, "resume_token_ids": [[1]], "seed": 1}, "RESUME_WITH_RANKING"),
        ({"beams": BeamParams(num_beams=0)}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"beams": BeamParams(num_beams=65)}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"beams": BeamParams(num_beams=50)}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"beams": BeamParams(num_beams=2, num_return=3)}, "NUM_RETURN_OUT_OF_RANGE"),
        ({"beams": BeamParams(num_beams=2, num_return=0)}, "NUM_RETURN_OUT_OF_RANGE"),
        ({"beams": BeamParams(num_beams=2, length_penalty=10.5)}, "LENGTH_PENALTY_OUT_OF_RANGE"),
        (
            {"beams": BeamParams(num_beams=2, length_penalty=float("nan"))},
            "LENGTH_PENALTY_OUT_OF_RANGE",
        ),
        ({"beams": BEAMS, "num_samples": 2}, "BEAMS_WITH_FIELD"),
        ({"beams": BEAMS, "best_of": 4}, "BEAMS_WITH_FIELD"),
        ({"beams": BEAMS, "stop": ("x",)}, "BEAMS_WITH_FIELD"),
        ({"beams": BEAMS, "session_id": "chat"}, "BEAMS_WITH_FIELD"),
        ({"beams": BEAMS, "delivery": Delivery.EVERY_TOKEN}, "DELIVERY_NOT_FINAL"),
        ({"beams": BEAMS, "resume_token_ids": [[1]], "seed": 1}, "RESUME_WITH_RANKING"),
        ({"beams": BEAMS, "sampling": SamplingParams(temperature=0.7)}, "BEAMS_WITH_SAMPLING"),
        ({"beams": BEAMS, "sampling": SamplingParams(top_k=3)}, "BEAMS_WITH_SAMPLING"),
        ({"beams": BEAMS, "sampling": SamplingParams(top_p=0.9)}, "BEAMS_WITH_SAMPLING"),
        ({"beams": BEAMS, "sampling": SamplingParams(min_p=0.1)}, "BEAMS_WITH_SAMPLING"),
        ({"beams": BEAMS, "sampling": SamplingParams(num_logprobs=0)}, "BEAMS_WITH_SAMPLING"),
        (
            {"beams": BEAMS, "sampling": SamplingParams(temperature=0.0, grammar=NUMBER)},
            "GRAMMAR_WITH_FIELD",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields, reason):
    with pytest.raises(InvalidRequestError) as caught:
        check_input(request(**fields), FACTS, 10**18)
    assert caught.value.reason == reason
    assert caught.value.limits


def test_output_left_open_is_as_long_as_all_beams_have_room_for():
    # 5 blocks of 16: one is shared, and each of the beams may come to hold two more.
    two = request(beams=BeamParams(num_beams=2))
    assert resolve_sampling(two, 20, FACTS).max_tokens == 48 - 20
    assert resolve_sampling(request(), 20, FACTS).max_tokens == 80 - 20


def test_a_message_without_a_delivery_is_final_where_outputs_are_ranked():
    def delivery_of(**fields):
        message = pb.GenerateRequest(text="hi", **fields)
        return input_from_proto(message, tenant="", deadline_ns=0).delivery

    assert delivery_of() is Delivery.EVERY_TOKEN
    assert delivery_of(best_of=1) is Delivery.EVERY_TOKEN
    assert delivery_of(best_of=2) is Delivery.FINAL
    assert delivery_of(num_samples=2, best_of=2) is Delivery.EVERY_TOKEN
    assert delivery_of(beam_search=sequence_pb2.BeamSearch(num_beams=2)) is Delivery.FINAL


def test_an_early_stopping_that_is_none_is_refused():
    for value in (0, 9):
        search = sequence_pb2.BeamSearch(num_beams=2, early_stopping=value)
        message = pb.GenerateRequest(text="hi", beam_search=search)
        with pytest.raises(InvalidRequestError) as caught:
            input_from_proto(message, tenant="", deadline_ns=0)
        assert caught.value.reason == "UNKNOWN_EARLY_STOPPING"
