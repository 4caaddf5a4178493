"""A gateway before several schedulers that the test plays: who gets what, and who takes over."""

import asyncio
import contextlib
import functools

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pageframe.core.clock import SystemClock
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.core.request import Submission
from pageframe.core.sampling import SamplingParams
from pageframe.gateway.client import SchedulerLink
from pageframe.gateway.mailbox import Mailbox
from pageframe.gateway.replica import least_of
from pageframe.gateway.replicas import ReplicaSet
from pageframe.gateway.routing import RoutingOptions
from pageframe.rpc.addresses import ReplicaAddresses, short_name
from pageframe.rpc.health import EXECUTOR_HEALTH, SCHEDULER_HEALTH, SchedulerHealth
from pageframe.v1 import scheduler_service_pb2_grpc, sequence_pb2
from unit.gateway.gateway_house import TIMEOUT_S, PlayedScheduler
from unit.gateway.replicas import make_facts

ERROR = sequence_pb2.FINISH_REASON_ERROR


class Played:
    """One scheduler that the test plays, with gRPC's health service."""

    def __init__(self, address, facts):
        self.address = address
        self.scheduler = PlayedScheduler(facts)
        self.health = health.aio.HealthServicer()
        self.server = None

    @property
    def name(self):
        return short_name(self.address)

    async def start(self):
        self.server = grpc.aio.server()
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(
            self.scheduler, self.server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        for name in (SCHEDULER_HEALTH, EXECUTOR_HEALTH):
            await self.say(name, is_well=True)
        self.server.add_insecure_port(self.address)
        await self.server.start()

    async def say(self, name, *, is_well):
        status = health_pb2.HealthCheckResponse
        await self.health.set(name, status.SERVING if is_well else status.NOT_SERVING)

    async def stop(self):
        await self.server.stop(None)

    async def submitted(self):
        return await asyncio.wait_for(self.scheduler.submitted.get(), TIMEOUT_S)

    async def cancelled(self):
        return await asyncio.wait_for(self.scheduler.cancelled.get(), TIMEOUT_S)

    def refuse(self, submission, reason, status="RESOURCE_EXHAUSTED"):
        self.scheduler.end(
            submission, ERROR, error_status=status, error_reason=reason, error_message="no"
        )


class Quarter:
    """A set of replicas over real gRPC."""

    def __init__(self, played, replicas, directory):
        self.directory = directory
        self.played = {entry.name: entry for entry in played}
        self.replicas = replicas

    def submit(self, token_ids=(5, 6, 7), **fields):
        """Submit a request; its handle and mailbox."""
        submission = Submission(
            handle=0,
            request_id="r",
            prompt_token_ids=list(token_ids),
            sampling=SamplingParams(max_tokens=8),
            tenant="t",
            cache_salt=b"salt",
            **fields,
        )
        mailbox = Mailbox()
        return self.replicas.submit(submission, mailbox), mailbox

    def of(self, mailbox):
        """The played scheduler that has a request."""
        return self.played[mailbox.replica]

    def other(self, mailbox):
        """The one of two that does not."""
        return next(it for name, it in self.played.items() if name != mailbox.replica)

    def placed(self):
        """A request of two replicas: its handle, its mailbox, who has it and who has not."""
        handle, mailbox = self.submit()
        return handle, mailbox, self.of(mailbox), self.other(mailbox)

    async def lose_all(self):
        for entry in self.played.values():
            await entry.stop()

    async def are_named(self, entry, *, num_open, num_known):
        """Name this one alone, and wait until so many are open and known."""
        self.directory.change([entry.address])
        await self.until(lambda: self.replicas.count() == (num_open, num_known))

    async def until(self, condition):
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - any part of the system may change it
                await asyncio.sleep(0)

    async def is_seen(self, name, *, is_open):
        """Wait until the gateway knows whether a replica takes requests."""
        (replica,) = [it for it in self.replicas.replicas if it.name == name]
        await self.until(lambda: replica.is_open == is_open)


class Directory(ReplicaAddresses):
    """Addresses that the test changes."""

    def __init__(self, addresses):
        super().__init__(addresses)
        self.addresses = list(addresses)
        self._due = asyncio.Event()

    def change(self, addresses):
        self.addresses = list(addresses)
        self._due.set()

    async def find(self):
        return self.addresses

    async def wait_due(self):
        await self._due.wait()
        self._due.clear()


@contextlib.asynccontextmanager
async def quarter(folder, *facts, options=None, lost_after_s=30.0):
    facts = facts or (make_facts(), make_facts())
    played = [
        Played(f"unix:{folder / f'scheduler-{number}.sock'}", entry)
        for number, entry in enumerate(facts)
    ]
    for entry in played:
        await entry.start()

    directory = Directory([entry.address for entry in played])
    replicas = ReplicaSet(
        directory,
        functools.partial(SchedulerLink, gateway_id="gateway-0", lost_after_s=lost_after_s),
        options or RoutingOptions(),
        SystemClock(),
    )
    running = asyncio.create_task(replicas.run())
    await asyncio.wait_for(replicas.wait_ready(), TIMEOUT_S)
    try:
        yield Quarter(played, replicas, directory)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for entry in played:
            await entry.stop()


async def tokens_of(mailbox):
    """The next tokens."""
    await asyncio.wait_for(mailbox.wait(), TIMEOUT_S)
    return mailbox.take()[0].token_ids


async def failure_of(mailbox):
    """The reason for which a request ends."""
    await asyncio.wait_for(mailbox.wait(), TIMEOUT_S)
    with pytest.raises(PageframeError) as caught:
        mailbox.take()
    return caught.value.reason


def scene(*facts, **options):
    """Make a test of a coroutine function that takes a quarter, by default of two schedulers."""

    def make(scenario):
        async def play(folder):
            async with quarter(folder, *facts, **options) as house:
                await scenario(house)

        def test(tmp_path):
            asyncio.run(play(tmp_path))

        return test

    return make


@scene()
async def test_one_prefix_goes_to_one_replica_and_many_go_to_all(house):
    prefix = [1] * 256
    for number in range(6):
        handle, first = house.submit([*prefix, number])
        again, second = house.submit([*prefix, number, number])
        assert first.replica == second.replica
        house.replicas.cancel(handle)
        house.replicas.cancel(again)
    placed = set()
    for number in range(40):
        handle, mailbox = house.submit([number] * 256)
        placed.add(mailbox.replica)
        house.replicas.cancel(handle)
    assert placed == set(house.played)


@scene(options=RoutingOptions(num_light=2))
async def test_a_busy_replica_spills_to_the_next_but_keeps_its_sessions(house):
    placed = [house.submit()[1].replica for _ in range(20)]
    home = placed[0]
    assert 10 <= placed.count(home) <= 13
    (spilled,) = [it for it in house.replicas.replicas if it.name == home]
    assert spilled.num_spills == 20 - placed.count(home)
    turns = [house.submit(session_id="chat")[1].replica for _ in range(20)]
    assert len(set(turns)) == 1


@scene()
async def test_a_lost_replica_leaves_its_requests_to_the_other_one(house):
    handle, mailbox, first, second = house.placed()
    sent = await first.submitted()
    first.scheduler.tokens(sent, [11, 12])
    assert await tokens_of(mailbox) == [11, 12]
    await first.stop()
    resumed = await second.submitted()
    assert list(resumed.prompt_token_ids) == [5, 6, 7]
    assert [list(part.token_ids) for part in resumed.resume] == [[11, 12]]
    assert resumed.is_resubmitted
    second.scheduler.tokens(resumed, [13])
    assert await tokens_of(mailbox) == [13]
    assert (mailbox.replica, mailbox.num_moves) == (second.name, 1)
    assert mailbox.lost_ns > 0
    house.replicas.cancel(handle, 0)
    assert (await second.cancelled()).handle == resumed.handle
    await first.start()


@scene()
async def test_what_waits_for_a_lost_replica_goes_to_the_first_that_comes_back(house):
    await house.lose_all()
    for entry in house.played.values():
        await house.is_seen(entry.name, is_open=False)
    _, mailbox, _, second = house.placed()
    await second.start()
    sent = await second.submitted()
    assert list(sent.prompt_token_ids) == [5, 6, 7]
    assert not sent.is_resubmitted
    assert mailbox.replica == second.name


@scene()
async def test_a_replica_without_an_executor_runs_nothing_and_one_that_drains_takes_nothing(house):
    _, mailbox, first, second = house.placed()
    sent = await first.submitted()
    await first.say(SCHEDULER_HEALTH, is_well=False)
    await house.is_seen(first.name, is_open=False)
    assert house.submit()[1].replica == second.name
    assert mailbox.replica == first.name, "a drain ends what it has"
    await first.say(EXECUTOR_HEALTH, is_well=False)
    assert (await first.cancelled()).handle == sent.handle
    await house.until(lambda: mailbox.replica == second.name)
    assert mailbox.lost_ns > 0
    for name in (SCHEDULER_HEALTH, EXECUTOR_HEALTH):
        await first.say(name, is_well=True)
    await house.is_seen(first.name, is_open=True)
    assert mailbox.replica == second.name, "it is not torn back"


@scene()
async def test_one_that_is_no_longer_named_ends_what_it_has_and_a_new_one_takes_its_part(house):
    first, second = house.played.values()
    await house.are_named(first, num_open=1, num_known=1)
    handle, mailbox = house.submit()
    assert mailbox.replica == first.name
    await house.are_named(second, num_open=1, num_known=2)
    assert {house.submit([it])[1].replica for it in range(8)} == {second.name}
    assert mailbox.replica == first.name
    house.replicas.cancel(handle)
    await house.are_named(second, num_open=1, num_known=1)


@scene()
async def test_a_full_replica_hands_on_once(house):
    _, mailbox, first, second = house.placed()
    first.refuse(await first.submitted(), "QUEUE_FULL")
    resent = await second.submitted()
    assert not resent.is_resubmitted, "it has run nowhere"
    second.refuse(resent, "QUEUE_FULL")
    assert await failure_of(mailbox) == "QUEUE_FULL"


@scene()
async def test_a_refusal_that_speaks_of_the_request_is_passed_on(house):
    _, mailbox, first, second = house.placed()
    first.refuse(await first.submitted(), "PREFIX_MISMATCH", "INVALID_ARGUMENT")
    assert await failure_of(mailbox) == "PREFIX_MISMATCH"
    assert second.scheduler.submitted.empty()


@scene()
async def test_a_moved_request_that_nobody_has_room_for_waits_for_its_replica(house):
    _, mailbox, first, second = house.placed()
    first.scheduler.tokens(await first.submitted(), [11])
    assert await tokens_of(mailbox) == [11]
    await first.stop()
    second.refuse(await second.submitted(), "QUEUE_FULL")
    await house.until(lambda: mailbox.replica == first.name)
    await first.start()
    resumed = await first.submitted()
    assert [list(part.token_ids) for part in resumed.resume] == [[11]]
    assert mailbox.error is None


@scene(*(make_facts() for _ in range(3)))
async def test_a_retained_prefix_is_looked_for_at_all_replicas_and_then_known(house):
    _, mailbox = house.submit(prefix_handle="abc")
    for _ in range(2):
        holder = house.of(mailbox)
        sent, name = await holder.submitted(), mailbox.replica
        holder.refuse(sent, "HANDLE_UNKNOWN", "NOT_FOUND")
        await house.until(lambda name=name: mailbox.replica != name)
    home = mailbox.replica
    assert (await house.of(mailbox).submitted()).prefix_handle == "abc"
    for number in range(8):
        assert house.submit([number] * 70, prefix_handle="abc")[1].replica == home
    house.of(mailbox).refuse(sent, "HANDLE_UNKNOWN", "NOT_FOUND")


@scene(make_facts(), make_facts(model="other"))
async def test_a_model_is_served_by_those_that_have_it(house):
    assert [facts.model for facts in house.replicas.served] == ["tiny", "other"]
    placed = {house.submit([it], model="other")[1].replica for it in range(20)}
    assert placed == {"scheduler-1"}


@scene(lost_after_s=0.05)
async def test_nothing_lasts_without_any_replica(house):
    _, mailbox = house.submit()
    await house.lose_all()
    assert await failure_of(mailbox) == "SCHEDULER_LOST"
    await house.until(lambda: all(it.link.is_lost for it in house.replicas.replicas))
    with pytest.raises(UnavailableError):
        house.submit()


def test_a_replica_that_does_not_answer_is_silent_and_one_that_refuses_is_not(tmp_path):
    async def scenario():
        reached, hangs = asyncio.Event(), asyncio.Event()

        class Mute(health_pb2_grpc.HealthServicer):
            async def Check(self, request, context):  # noqa: N802
                if not reached.is_set():
                    reached.set()
                    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
                await hangs.wait()

        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(Mute(), server)
        server.add_insecure_port(f"unix:{tmp_path}/s.sock")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
            health = SchedulerHealth(lambda: None)
            probing = health.probe(channel, pause_s=0, silence_s=0.5)
            await asyncio.wait_for(probing, TIMEOUT_S)
            assert reached.is_set()
        hangs.set()
        await server.stop(None)

    asyncio.run(scenario())


def test_several_replicas_promise_what_all_of_them_can_do():
    facts = [
        make_facts(max_model_len=512, num_blocks=8),
        make_facts(max_model_len=128, num_blocks=64),
    ]
    least = least_of(facts)
    assert (least.max_model_len, least.num_blocks) == (128, 8)
    assert least_of(facts[:1]) == facts[0]


def test_a_name_stands_for_all_of_its_addresses_and_outlives_its_server():
    answers = [["10.0.0.2", "10.0.0.1", "10.0.0.1"], OSError("no answer"), ["10.0.0.2", "::1"]]

    async def resolve(host, port):
        assert (host, port) == ("schedulers.example", 50052)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def scenario():
        addresses = ReplicaAddresses(["h:1", "dns:///schedulers.example:50052"], resolve)
        both = ["h:1", "10.0.0.1:50052", "10.0.0.2:50052"]
        assert await addresses.find() == both
        assert await addresses.find() == both
        assert await addresses.find() == ["h:1", "10.0.0.2:50052", "[::1]:50052"]

    asyncio.run(scenario())
