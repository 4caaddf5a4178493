"""The simulation itself: its time, its network, and that it finds what it is there to find."""

import asyncio
import random

import grpc
import pytest

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.executor.model.sim import SimConfig, SimRunner
from pageframe.gateway import living
from pageframe.lab.simulation.call import pause
from pageframe.lab.simulation.event_log import EventLog
from pageframe.lab.simulation.faulty import WatchedEngine
from pageframe.lab.simulation.leaks import reachable
from pageframe.lab.simulation.network import Network
from pageframe.lab.simulation.pipe import Pipe, PipeBrokenError
from pageframe.lab.simulation.reference import ReferenceModel
from pageframe.lab.simulation.run import simulate, simulate_scenario
from pageframe.lab.simulation.scenario import draw_scenario
from pageframe.lab.simulation.virtual_time import (
    Process,
    StuckError,
    VirtualClock,
    run_virtually,
)
from pageframe.scheduler.roster import Roster
from pageframe.v1.executor_service_pb2 import DescribeRequest, DescribeResponse
from pageframe.v1.executor_service_pb2_grpc import ExecutorServiceStub
from property.test_scheduler_engine import make_driver
from unit.scheduler.driver import make_submission


def run(main):
    result, left = run_virtually(main, end_s=100.0, num_turns_max=10_000)
    assert left == []
    return result


class TestTime:
    def test_time_jumps_to_the_next_timer(self):
        async def main():
            loop = asyncio.get_running_loop()
            await asyncio.gather(asyncio.sleep(50.0), asyncio.sleep(3.5))
            return loop.time()

        assert run(main) == 50.0

    def test_waiting_for_nothing_is_told(self):
        async def main():
            await asyncio.get_running_loop().create_future()

        with pytest.raises(StuckError, match="nothing will happen any more"):
            run(main)

    def test_a_circle_without_time_is_told(self):
        async def main():
            while True:  # noqa: ASYNC110
                await asyncio.sleep(0)

        with pytest.raises(StuckError, match="10000 turns"):
            run(main)

    def test_what_is_left_behind_and_what_nobody_caught_is_told(self):
        async def fail():
            raise ValueError("nobody asked")

        async def main():
            asyncio.create_task(fail())  # noqa: RUF006
            asyncio.create_task(asyncio.sleep(50.0))  # noqa: RUF006
            await pause(1.0)

        _, told = run_virtually(main, end_s=100.0, num_turns_max=100)
        assert told[0].startswith("left behind: <coroutine object sleep")
        assert told[1].endswith("ValueError('nobody asked')")

    def test_a_clock_that_was_moved_ahead_is_caught_up_with(self):
        async def main():
            loop = asyncio.get_running_loop()
            clock = VirtualClock(loop)
            start_ns = clock.now_ns()
            clock.advance_ns(2_000_000_000)
            assert clock.now_ns() == start_ns + 2_000_000_000
            await clock.catch_up()
            assert clock.now_ns() == start_ns + 2_000_000_000
            return loop.time()

        assert run(main) == 2.0

    def test_tasks_of_a_process_die_with_it_and_so_do_theirs(self):
        async def child(ended):
            try:
                await asyncio.sleep(1000.0)
            finally:
                ended.append("child")

        async def parent(ended):
            asyncio.create_task(child(ended))  # noqa: RUF006
            await asyncio.sleep(1000.0)

        async def main():
            process, ended = Process("p"), []
            process.spawn(parent(ended))
            other = asyncio.create_task(child(["other"]))
            await pause(1.0)
            process.kill()
            await process.wait_gone()
            assert not other.done()
            other.cancel()
            await asyncio.wait((other,))
            return ended

        assert run(main) == ["child"]


class TestPipe:
    def test_messages_keep_their_order_whatever_their_delays(self):
        async def main():
            delays = iter((0.9, 0.1, 0.5, 0.0))
            ends = []
            loop = asyncio.get_running_loop()
            pipe = Pipe(loop, lambda: next(delays), 8, lambda: ends.append(loop.time()))
            for data in (b"a", b"b", b"c"):
                await pipe.send(data)
            pipe.finish()
            received = [await pipe.receive() for _ in range(4)]
            return received, ends

        assert run(main) == ([b"a", b"b", b"c", None], [0.9])

    def test_a_full_window_holds_the_sender_up_until_somebody_reads(self):
        async def main():
            pipe = Pipe(asyncio.get_running_loop(), lambda: 0.0, 1, lambda: None)
            await pipe.send(b"a")
            second = asyncio.create_task(pipe.send(b"b"))
            await pause(1.0)
            assert not second.done()
            assert await pipe.receive() == b"a"
            await second
            return await pipe.receive()

        assert run(main) == b"b"

    @pytest.mark.parametrize(("keeps", "received"), [(True, [b"a", None]), (False, [None, None])])
    def test_a_cut_pipe_refuses_senders_and_gives_what_had_arrived(self, keeps, received):
        async def main():
            pipe = Pipe(asyncio.get_running_loop(), lambda: 0.5, 1, lambda: None)
            await pipe.send(b"a")
            held_up = asyncio.create_task(pipe.send(b"b"))
            await pause(0.1)
            pipe.cut(keeps_in_flight=keeps)
            with pytest.raises(PipeBrokenError):
                await held_up
            return [await pipe.receive() for _ in range(2)]

        assert run(main) == received


class Describer:
    """A service of one method, which may take its time."""

    def __init__(self) -> None:
        self.ended = ""

    async def Describe(self, request, context):  # noqa: N802
        try:
            await pause(1.0)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "answered"
        return DescribeResponse()


def make_network() -> Network:
    return Network(asyncio.get_running_loop(), random.Random(1), EventLog(), delay_s=0.01)


class TestCalls:
    def test_a_call_goes_through_and_comes_back(self):
        async def main():
            network, service = make_network(), Describer()
            network.listen("there", Process("server"), service)
            stub = ExecutorServiceStub(network.channel(Process("client"), "there"))
            assert await stub.Describe(DescribeRequest()) == DescribeResponse()
            return service.ended

        assert run(main) == "answered"

    def test_nobody_listening_is_unavailable_at_once_unless_one_waits(self):
        async def main():
            network, service = make_network(), Describer()
            stub = ExecutorServiceStub(network.channel(Process("client"), "there"))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Describe(DescribeRequest())
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            waiting = asyncio.create_task(stub.Describe(DescribeRequest(), wait_for_ready=True))
            await pause(5.0)
            network.listen("there", Process("server"), service)
            await waiting
            return asyncio.get_running_loop().time()

        assert 6.0 < run(main) < 6.1

    @pytest.mark.parametrize(
        ("harm", "code"),
        [
            ("deadline", grpc.StatusCode.DEADLINE_EXCEEDED),
            ("cut", grpc.StatusCode.UNAVAILABLE),
            ("death", grpc.StatusCode.UNAVAILABLE),
        ],
    )
    def test_both_ends_learn_that_a_call_is_over(self, harm, code):
        async def main():
            network, service, server = make_network(), Describer(), Process("server")
            network.listen("there", server, service)
            stub = ExecutorServiceStub(network.channel(Process("client"), "there"))
            timeout_s = 0.5 if harm == "deadline" else None
            calling = asyncio.create_task(stub.Describe(DescribeRequest(), timeout=timeout_s))
            await pause(0.3)
            if harm == "cut":
                assert network.sever("server", "client") == 1
            elif harm == "death":
                network.bury(server)
                server.kill()
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await calling
            await pause(0.1)
            return ended.value.code(), service.ended

        assert run(main) == (code, "cancelled")


def test_what_can_be_reached_is_found_through_closures_methods_and_containers():
    class Thing:
        pass

    class Holder:
        def __init__(self, thing):
            self.things = {"a": [lambda: thing]}

        def method(self):
            pass

    found = reachable([Holder(Thing()).method], (Thing,))
    assert [type(entry.thing) for entry in found] == [Thing]
    assert found[0].path.startswith("method > Holder")
    assert reachable([Holder(3).method], (Thing,)) == []


@pytest.mark.parametrize("seed", [None, 7])
def test_the_reference_gives_the_tokens_of_the_sim_runner(seed: int | None) -> None:
    model = ReferenceModel(vocab_size=32_000, eos_token_id=0, eos_probability=0.0)
    driver = make_driver(100, 16, token_budget=64)
    runner = SimRunner(SimConfig())
    assert runner.facts.vocab_size == model.vocab_size
    sampling = {"temperature": 1.0 if seed else 0.0, "seed": seed or 0, "max_tokens": 20}
    driver.submit(make_submission(1, [5, 6, 7], sampling=SamplingParams(**sampling), num_samples=2))
    driver.run()
    for sample_index in range(2):
        expected, reason = model.output(
            [5, 6, 7], seed=seed, sample_index=sample_index, max_tokens=20
        )
        assert driver.output(1, sample_index) == expected
        assert reason is FinishReason.LENGTH


# A seed in which nobody dies, but much is asked.
CALM_SEED = next(seed for seed in range(100) if not draw_scenario(seed).harms)


class TestFinding:
    """Bugs put in on purpose are found."""

    def test_a_calm_seed_is_well_and_the_same_again(self):
        first, second = simulate(CALM_SEED), simulate(CALM_SEED)
        assert first.violations == []
        assert first == second
        assert first.num_events > 50

    def test_a_token_that_is_lost_on_its_way(self, monkeypatch):
        take, lost = living._take_tokens, []

        def lossy(entry, sample_index, events, start, end):
            if lost:
                take(entry, sample_index, events, start, end)
            lost.append(events.token_ids[start:end])

        monkeypatch.setattr(living, "_take_tokens", lossy)
        assert any("sample 0" in line for line in simulate(CALM_SEED).violations)

    def test_an_end_that_is_never_told(self, monkeypatch):
        take, lost = living.LivingRequests._take_completion, []

        def forgetful(self, completion):
            lost.append(completion)
            return take(self, completion) if len(lost) > 1 else False

        monkeypatch.setattr(living.LivingRequests, "_take_completion", forgetful)
        # Who has no deadline waits for ever.
        assert simulate(CALM_SEED).violations

    def test_a_lost_result_is_met_by_starting_over(self, monkeypatch):
        """Not a bug, for a change: the scheduler does not believe what comes next."""
        step, lost = WatchedEngine.step, []

        def forgetful(self, plan):
            result = step(self, plan)
            if plan.step != 5 or lost:
                return result
            # Once: who starts over counts steps from 1 again.
            lost.append(plan)
            return StepResult(step=0, account=result.account)

        monkeypatch.setattr(WatchedEngine, "step", forgetful)
        assert simulate(CALM_SEED).violations == []
        assert lost

    def test_a_request_that_is_kept_after_its_end(self, monkeypatch):
        forget, kept = Roster.forget, []

        def hoard(self, sequence):
            self.kept = kept
            kept.append(sequence)
            return forget(self, sequence)

        monkeypatch.setattr(Roster, "forget", hoard)
        found = simulate_scenario(draw_scenario(CALM_SEED)).violations
        assert any("Roster > list > Sequence" in line for line in found), found[:3]
