"""A caller brings the tokens of a broken stream, and gets what is missing."""

import asyncio

import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.gateway.convert import input_from_proto
from pageframe.gateway.output import Header, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.sample_stream import SampleStream
from pageframe.gateway.stop_strings import StopAutomaton
from pageframe.gateway.tokenizer import TextCodec
from pageframe.v1 import gateway_service_pb2 as pb
from unit.gateway.driving import collect, encode, make_service, start


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_resumed_generation_gives_what_is_missing(link, model_folder, cut):
    ids = encode(model_folder, "one € fox two")[:9]

    async def run(resumed):
        service = make_service(link)
        outputs, _, following = await start(
            service, seed=7, stop=["fo!"], resume_token_ids=[ids[:resumed]] if resumed else []
        )
        link.mailboxes[-1].put_tokens(0, ids[resumed:])
        first = await following
        link.end(len(link.mailboxes))
        return [first, *await collect(outputs)]

    whole, rest = asyncio.run(run(0)), asyncio.run(run(cut))
    assert link.submissions[1].resume_token_ids == [ids[:cut]]
    text = "".join(output.text for output in whole[:-1])
    before = GenerationPrefix(model_folder, ids[:cut]).text
    assert before + "".join(output.text for output in rest[:-1]) == text
    assert rest[-1].completion.num_output_tokens == whole[-1].completion.num_output_tokens


class GenerationPrefix:
    """What a broken stream had given out."""

    def __init__(self, model_folder, ids):

        codec = TextCodec.load(model_folder)
        self.text = SampleStream(codec.detokenizer(), StopAutomaton(["fo!"])).feed(ids)[0]


@pytest.mark.parametrize(
    ("token_ids", "fields", "reason"),
    [
        ([5, 1], {}, FinishReason.STOP),
        ([5, 1], {"sampling": SamplingParams(ignore_eos=True), "max_tokens": 2},
         FinishReason.LENGTH),
        ([5, 6], {"sampling": SamplingParams(stop_token_ids=(6,))}, FinishReason.STOP),
        ([5, 6], {"max_tokens": 2}, FinishReason.LENGTH),
    ],
)  # fmt: skip
def test_a_stream_that_broke_behind_its_last_token_just_ends(link, token_ids, fields, reason):
    async def scenario():
        return await collect(
            make_service(link).generate(
                GenerateInput(text="x", seed=1, resume_token_ids=[token_ids], **fields)
            )
        )

    outputs = asyncio.run(scenario())
    assert isinstance(outputs[0], Header)
    assert outputs[-1].finish_reason is reason
    assert outputs[-1].completion.num_output_tokens == 2
    assert link.submissions == []


def test_several_samples_go_on_where_each_stood(link, model_folder):
    stopped, going = encode(model_folder, "one fox"), encode(model_folder, "two")

    async def scenario():
        outputs, _, following = await start(
            make_service(link),
            seed=7,
            stop=["fox"],
            num_samples=3,
            resume_token_ids=[stopped, going, []],
        )
        # The scheduler knows no stop strings: it is told at once which samples need not go on.
        assert link.cancels == [(1, 0)]
        link.mailboxes[0].put_tokens(1, [5])
        first = await following
        for sample_index in range(3):
            link.end(1, sample_index)
        return [first, *await collect(outputs)]

    outputs = asyncio.run(scenario())
    assert link.submissions[0].resume_token_ids == [stopped, going, []]
    assert (outputs[0].sample_index, outputs[0].token_ids) == (1, [5])
    ends = {out.sample_index: out for out in outputs if isinstance(out, SampleEnd)}
    assert (ends[0].finish_reason, ends[0].stop) == (FinishReason.STOP, "fox")
    counts = [ends[index].completion.num_output_tokens for index in range(3)]
    assert counts == [len(stopped), len(going) + 1, 0]


def test_samples_that_had_all_ended_just_end(link):
    async def scenario():
        request = GenerateInput(
            text="x", seed=1, num_samples=2, max_tokens=2, resume_token_ids=[[5, 1], [5, 6]]
        )
        return await collect(make_service(link).generate(request))

    outputs = asyncio.run(scenario())
    ends = [(out.sample_index, out.finish_reason) for out in outputs if isinstance(out, SampleEnd)]
    assert ends == [(0, FinishReason.STOP), (1, FinishReason.LENGTH)]
    assert link.submissions == []


def test_output_is_given_for_one_sample_or_by_sample_not_both_ways():
    message = pb.GenerateRequest(
        resume_token_ids=[1], resume_outputs=[pb.ResumedOutput(token_ids=[1])]
    )
    with pytest.raises(InvalidRequestError, match="RESUME_GIVEN_TWICE"):
        input_from_proto(message, tenant="t", deadline_ns=0)


def test_the_outputs_of_a_message_are_by_sample_and_none_when_all_are_empty():
    def resumed(*outputs):
        message = pb.GenerateRequest(
            resume_outputs=[pb.ResumedOutput(token_ids=ids) for ids in outputs]
        )
        return input_from_proto(message, tenant="t", deadline_ns=0).resume_token_ids

    assert resumed([], [3]) == [[], [3]]
    assert resumed([], []) == []


def test_the_rest_of_a_text_comes_by_itself_so_that_a_caller_knows_whether_it_has_it(
    link, model_folder
):
    """Text may be held back until the end, and the stream may break right before the end."""
    ids = encode(model_folder, "the fo")

    async def scenario(**fields):
        outputs, _, following = await start(make_service(link), seed=7, stop=["fox!"], **fields)
        number = len(link.mailboxes)
        link.mailboxes[-1].put_tokens(0, ids[len(fields.get("resume_token_ids", [[]])[0]) :])
        link.end(number)
        return [await following, *await collect(outputs)]

    delta, rest, end = asyncio.run(scenario())
    assert (delta.token_ids, rest.token_ids) == (ids, [])
    assert (delta.text + rest.text, bool(rest.text)) == ("the fo", True)
    again = asyncio.run(scenario(resume_token_ids=[ids]))
    assert [out.text for out in again[:-1]] == [rest.text]
    assert again[-1].finish_reason is end.finish_reason
