"""Clients of a simulation: each asks one thing, does what was drawn, and checks what it hears."""

import asyncio
import contextlib
from typing import NamedTuple

from pageframe.client.aio import AsyncPageframeClient
from pageframe.client.types import Delta, Event, Started
from pageframe.core.errors import PageframeError
from pageframe.core.step import FinishReason
from pageframe.lab.simulation.call import pause
from pageframe.lab.simulation.letters import letters_of
from pageframe.lab.simulation.network import Network
from pageframe.lab.simulation.scenario import MODEL, Behaviour, ClientPlan, Harm, Scenario
from pageframe.lab.simulation.services import GATEWAY
from pageframe.lab.simulation.virtual_time import Process, wait_until

_RETRY_FOR_S = 1000.0
_ENDS_ITSELF = {Behaviour.CLOSE, Behaviour.CANCEL, Behaviour.VANISH, Behaviour.STOP_READING}


class Expected(NamedTuple):
    """One output that is still to come."""

    token_ids: list[int]
    reason: FinishReason
    text: str


class Caller:
    """One client and its request.

    Args:
        plan: What was drawn.
        scenario: Around it, for what may go wrong.
        network: To call over.
        expected: Its outputs; None to take what comes.

    Attributes:
        plan: What was drawn.
        process: Its own.
        error: What its generation raised, if it did.
        has_ended: Whether its generation came to an end, good or bad, by itself.
    """

    def __init__(
        self,
        plan: ClientPlan,
        scenario: Scenario,
        network: Network,
        expected: list[Expected] | None,
    ) -> None:
        self.plan = plan
        self.process = Process(f"client-{plan.request.request_id}")
        self.error: PageframeError | None = None
        self.has_ended = False
        self._scenario = scenario
        self._network = network
        self._expected = expected
        self._reasons: dict[int, FinishReason] = {}
        self._token_ids: list[list[int]] = [[] for _ in range(self._num_samples)]
        self._text = [""] * self._num_samples
        self._has_started = False
        self._started_s = 0.0
        self._was_recalled = False

    @property
    def _num_samples(self) -> int:
        return self.plan.request.num_outputs

    @property
    def heard(self) -> list[Expected]:
        """Its outputs, once they have ended."""
        parts = zip(sorted(self._reasons.items()), self._token_ids, self._text, strict=True)
        return [Expected(token_ids, reason, text) for (_, reason), token_ids, text in parts]

    async def run(self) -> None:
        """Wait for its time, ask, and behave as drawn."""
        plan = self.plan
        await wait_until(plan.start_s)
        self._started_s = plan.start_s
        asking = self.process.spawn(self._ask())
        if plan.behaviour in (Behaviour.CANCEL, Behaviour.VANISH, Behaviour.RECALL):
            await pause(plan.after_s)
            if plan.behaviour is Behaviour.CANCEL:
                asking.cancel()
            elif plan.behaviour is Behaviour.RECALL:
                await self._recall()
            else:
                self._network.bury(self.process)
                self.process.kill()
        elif plan.behaviour is Behaviour.STOP_READING:
            # It reads no more, and after a long time it is gone.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20.0):
                    await asyncio.wait((asking,))
            asking.cancel()
        await asyncio.wait((asking,))
        if not asking.cancelled() and (error := asking.exception()) is not None:
            self._network.fail(f"{self.process.name}: {error!r}")
        await self.process.wait_gone()
        self._check_end()

    async def _ask(self) -> None:
        plan, num_events = self.plan, 0
        async with AsyncPageframeClient(
            api_key=plan.tenant,
            retry_for_s=_RETRY_FOR_S,
            channel=self._network.channel(self.process, GATEWAY),
        ) as client:
            try:
                stream = client.generate(plan.request, timeout_s=plan.timeout_s)
                async with contextlib.aclosing(stream) as events:
                    async for event in events:
                        self._hear(event)
                        num_events += 1
                        if num_events > plan.after_events:
                            if plan.behaviour is Behaviour.CLOSE:
                                return
                            if plan.behaviour is Behaviour.STOP_READING:
                                await pause(1000.0)
                        if plan.pause_s:
                            await pause(plan.pause_s)
            except PageframeError as error:
                self.error = error
            self.has_ended = True

    async def _recall(self) -> None:
        channel = self._network.channel(self.process, GATEWAY)
        async with AsyncPageframeClient(api_key=self.plan.tenant, channel=channel) as client:
            with contextlib.suppress(PageframeError):
                await client.cancel(self.plan.request.request_id)
            self._was_recalled = True

    def _hear(self, event: Event) -> None:
        if isinstance(event, Started):
            self._check(not self._has_started, "was told twice that it started")
            self._has_started = True
            return
        index = event.sample_index
        self._check(index not in self._reasons, f"sample {index} went on after its end")
        if isinstance(event, Delta):
            self._token_ids[index] += event.token_ids
            self._text[index] += event.text
            if self._expected is not None:
                self._check_so_far(index, self._expected[index])
            return
        self._reasons[index] = event.finish_reason
        if event.finish_reason is FinishReason.CANCELLED:
            self._check(False, f"sample {index} was cancelled without an error")
        elif self._expected is not None:
            got = Expected(self._token_ids[index], event.finish_reason, self._text[index])
            expected = self._expected[index]
            self._check(got == expected, f"sample {index} ended as {got} instead of {expected}")

    def _check_so_far(self, index: int, expected: Expected) -> None:
        """What is delivered never changes: it is a beginning of what is due."""
        got, text = self._token_ids[index], self._text[index]
        is_begun = got == expected.token_ids[: len(got)] and expected.text.startswith(text)
        self._check(is_begun, f"sample {index}: {got} {text!r} of {expected}")

    def _check_end(self) -> None:
        """Its end is one that what happened to it allows."""
        if not self.has_ended:
            self._check(self.plan.behaviour in _ENDS_ITSELF, "did not end")
            return
        if self.error is not None:
            self._check(self._is_allowed(self.error), f"got {self.error!r}")
        else:
            self._check(len(self._reasons) == self._num_samples, "ended without its completions")

    def _is_allowed(self, error: PageframeError) -> bool:
        plan, scenario = self.plan, self._scenario
        now_s = asyncio.get_running_loop().time()
        if error.reason == "DEADLINE_UNREACHABLE":
            return plan.timeout_s is not None
        if error.status == "DEADLINE_EXCEEDED":
            due_s = self._started_s + (plan.timeout_s or float("inf"))
            return now_s >= due_s - 0.001
        if error.status == "CANCELLED":
            return plan.behaviour is Behaviour.RECALL
        if error.status == "INTERNAL":
            return scenario.may_fail and error.reason == "SEQUENCE_FAILED"
        if error.reason == "QUEUE_FULL":
            # Those of a gateway that died wait there, too, until the scheduler has heard of it.
            return scenario.settings.max_queued_requests <= len(scenario.clients)
        if error.status == "OUT_OF_RANGE":
            if plan.request.beam_search is not None:
                return True
            return scenario.has(Harm.RESIZE) and error.reason in ("EXCEEDS_POOL", "OVER_QUOTA")
        if error.status == "UNAVAILABLE":
            # Outputs that are ranked cannot be resumed once one of them is known.
            return plan.request.is_ranked and (
                scenario.has(Harm.KILL_GATEWAY, Harm.CUT_CLIENTS) or scenario.lost_after_s < 1
            )
        return False

    def _check(self, is_true: bool, what: str) -> None:
        if not is_true:
            self._network.fail(f"{self.process.name} {what}")


def expected_outputs(plan: ClientPlan) -> list[Expected]:
    """The outputs of a request whose samples do not depend on one another."""
    return [_expected_output(plan, index) for index in range(plan.request.num_outputs)]


def _expected_output(plan: ClientPlan, sample_index: int) -> Expected:
    request = plan.request
    prompt, resumed = request.token_ids or (), list(request.resume_token_ids)
    token_ids, reason = MODEL.output(
        prompt,
        seed=None if request.temperature == 0 else request.seed,
        sample_index=sample_index,
        max_tokens=request.max_tokens or 0,
        min_tokens=request.min_tokens,
        stop_token_ids=request.stop_token_ids,
    )
    text = letters_of(token_ids)
    # Stop strings are looked for behind the first ``min_tokens`` tokens, and all have two letters.
    ends = [
        place + 2 for stop in request.stop if (place := text.find(stop, request.min_tokens)) >= 0
    ]
    if ends:
        end = min(ends)
        token_ids, text, reason = token_ids[:end], text[: end - 2], FinishReason.STOP
    num_resumed = min(len(resumed), len(token_ids))
    return Expected(token_ids[num_resumed:], reason, text[num_resumed:])
