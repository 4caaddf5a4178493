"""The HTTP door over loopback, before a scheduler that says what the test says."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import openai

from pageframe.core.clock import SystemClock
from pageframe.core.request import RateLevels
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.core.trace import NullTraceSink
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http.app import Door
from pageframe.gateway.http.server import HttpServer
from pageframe.gateway.tokenizer import TextCodec
from pageframe.rpc.auth import Authenticator
from unit.gateway.fake_link import FakeLink

TIMEOUT_S = 20


@dataclass
class Says:
    """One sample's output: a text, and how many of its tokens come at a time."""

    text: str = ""
    step: int = 1
    reason: FinishReason = FinishReason.STOP
    account: dict[str, int] = field(default_factory=dict)
    rates: RateLevels = field(default_factory=dict)


@dataclass
class ScriptedLink(FakeLink):
    """Answers submissions in the order of the script: one entry for each sample, or an error."""

    script: list[Any] = field(default_factory=list)
    codec: TextCodec | None = None
    saying: list[Any] = field(default_factory=list)

    def submit(self, submission, mailbox):
        handle = super().submit(submission, mailbox)
        if self.script:
            entry = self.script.pop(0)
            if isinstance(entry, Exception):
                raise entry
            asyncio.get_running_loop().call_soon(self._answer, handle, entry)
        return handle

    def _answer(self, handle, entry):
        says = entry if isinstance(entry, list) else [entry]
        for sample_index, said in enumerate(says):
            if isinstance(said, Exception):
                self.mailboxes[handle - 1].fail(said)
                return
            ids = self.codec.encode(said.text) if said.text else []
            task = asyncio.ensure_future(self._say(handle, sample_index, ids, said))
            self.saying.append(task)

    async def _say(self, handle, sample_index, ids, said):
        submission, mailbox = self.submissions[handle - 1], self.mailboxes[handle - 1]
        mailbox.put_rates(said.rates)
        if sample_index == 0 and submission.sampling.num_prompt_logprobs >= 0:
            mailbox.put_prompt_logprobs([logprob(it) for it in submission.prompt_token_ids[1:]])
        for start in range(0, len(ids), said.step):
            part = ids[start : start + said.step]
            told = submission.sampling.num_logprobs >= 0
            mailbox.put_tokens(sample_index, part, [logprob(it) for it in part] if told else [])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self.end(handle, sample_index, said.reason, **said.account)


def logprob(token_id):
    return TokenLogprobs(
        token_id=token_id,
        logprob=-token_id / 64,
        top_token_ids=[token_id, 0],
        top_logprobs=[-token_id / 64, -float("inf")],
    )


class House:
    """A door, its scheduler, and OpenAI's own client before it."""

    def __init__(self, link, service, server):
        self.link = link
        self.service = service
        self.server = server
        self.client = self.client_with("unused")

    @property
    def port(self):
        return int(self.server.address.rpartition(":")[2])

    def client_with(self, key):
        return openai.AsyncOpenAI(
            base_url=f"http://{self.server.address}/v1",
            api_key=key,
            max_retries=0,
            timeout=TIMEOUT_S,
        )

    def prompt(self, number=0):
        """The text of a submitted prompt."""
        ids = self.link.submissions[number].prompt_token_ids
        return self.link.codec.decode(ids, skip_special_tokens=False)

    async def raw(self, data, *, half_close=False):
        """Send bytes; everything that comes back until the connection closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            if half_close:
                writer.write_eof()
            return await asyncio.wait_for(reader.read(), TIMEOUT_S)
        finally:
            writer.close()

    async def post(self, path, body, *headers):
        """Send a body as JSON that may be none; the status code and the whole answer."""
        lines = [
            f"POST {path} HTTP/1.1",
            "host: x",
            "connection: close",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *headers,
        ]
        answer = await self.raw("\r\n".join([*lines, "", ""]).encode() + body)
        return int(answer.split(b" ", 2)[1]), answer


@contextlib.asynccontextmanager
async def http_house(folder, facts, *script, keys=None, metrics=lambda: b""):
    link = ScriptedLink(facts, script=list(script), codec=TextCodec.load(folder))
    clock, authenticator = SystemClock(), Authenticator(keys or {})
    service = GenerationService(link, CodecStore(), authenticator, clock, NullTraceSink())
    server = HttpServer(Door(service, authenticator, clock, metrics).app(), "127.0.0.1:0")
    await server.start()
    house = House(link, service, server)
    try:
        yield house
    finally:
        await house.client.close()
        await server.stop()


async def eventually(condition):
    """Let the loop go round until a condition holds."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - whoever sets it knows nothing of an event
            await asyncio.sleep(0)
