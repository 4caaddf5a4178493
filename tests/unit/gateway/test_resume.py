"""A caller brings the tokens of a broken stream, and gets what is missing."""

import asyncio

import pytest

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.gateway.output import Header
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.sample_stream import SampleStream
from pageframe.gateway.stop_strings import StopAutomaton
from pageframe.gateway.tokenizer import TextCodec
from unit.gateway.driving import collect, encode, make_service, start


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_resumed_generation_gives_what_is_missing(link, model_folder, cut):
    ids = encode(model_folder, "one € fox two")[:9]

    async def run(resumed):
        service = make_service(link)
        outputs, _, following = await start(
            service, seed=7, stop=["fo!"], resume_token_ids=ids[:resumed]
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
        self.text = SampleStream(codec.detokenizer(), StopAutomaton(["fo!"])).feed(ids).text


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
                GenerateInput(text="x", seed=1, resume_token_ids=token_ids, **fields)
            )
        )

    outputs = asyncio.run(scenario())
    assert isinstance(outputs[0], Header)
    assert outputs[-1].finish_reason is reason
    assert outputs[-1].completion.num_output_tokens == 2
    assert link.submissions == []
