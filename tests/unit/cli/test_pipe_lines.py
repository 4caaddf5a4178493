"""What a child writes is read as lines: at once, or together where there is no hurry."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from unittest.mock import patch

import pytest

from pageframe.cli.pipe_lines import LINE_BYTES_MAX, read_lines

Write = Callable[[bytes], int]


@contextlib.asynccontextmanager
async def reading(taken: list[list[bytes]], *, pause_seconds: float = 0.0) -> AsyncIterator[Write]:
    read_end, write_end = os.pipe()
    stream = os.fdopen(read_end, "rb")
    task = asyncio.create_task(read_lines(stream, taken.append, pause_seconds=pause_seconds))
    try:
        yield lambda data: os.write(write_end, data)
    finally:
        os.close(write_end)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def turns() -> None:
    """Let the loop look for what can be read, some times over."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(writes: list[bytes], *, pause_seconds: float = 0.0) -> list[list[bytes]]:
    taken: list[list[bytes]] = []

    async def write_all() -> None:
        async with reading(taken, pause_seconds=pause_seconds) as write:
            for data in writes:
                write(data)
                await turns()

    asyncio.run(write_all())
    return taken


def test_lines_are_taken_whole_however_they_were_written() -> None:
    taken = run([b"a\nb", b"b", b"b\n\nc\r\n", b"d\re\n"])
    assert taken == [[b"a\n"], [b"bbb\n", b"\n", b"c\r\n"], [b"d\re\n"]]


def test_what_comes_last_needs_no_newline() -> None:
    taken: list[list[bytes]] = []

    async def end() -> None:
        read_end, write_end = os.pipe()
        os.write(write_end, b"a\nlast words")
        os.close(write_end)
        await read_lines(os.fdopen(read_end, "rb"), taken.append, pause_seconds=0.001)

    asyncio.run(end())
    assert taken == [[b"a\n"], [b"last words"]]


def test_a_line_without_end_comes_in_pieces() -> None:
    size = LINE_BYTES_MAX // 20
    taken = run([b"x" * size] * 21 + [b"y\nz\n"])
    assert [len(line) for lines in taken for line in lines] == [21 * size, 2, 2]


def test_between_two_reads_lines_gather() -> None:
    assert run([b"a\n", b"b\n", b"c\n"], pause_seconds=3600.0) == [[b"a\n"]]


def test_after_a_pause_all_lines_come_together() -> None:
    taken: list[list[bytes]] = []

    async def write_two() -> None:
        loop = asyncio.get_running_loop()
        pauses: list[Callable[[], object]] = []
        with patch.object(loop, "call_later", lambda _seconds, resume: pauses.append(resume)):
            async with reading(taken, pause_seconds=1.0) as write:
                for data in (b"a\n", b"b\n", b"c\n"):
                    write(data)
                    await turns()
                pauses.pop()()
                await turns()

    asyncio.run(write_two())
    assert taken == [[b"a\n"], [b"b\n", b"c\n"]]


def test_nobody_pauses_while_much_is_written() -> None:
    much = b"x" * 20_000 + b"\n"
    assert run([much, b"a\n", b"b\n"], pause_seconds=3600.0) == [[much], [b"a\n"]]


def test_an_error_of_whoever_takes_the_lines_is_raised_and_ends_the_reading() -> None:
    seen: list[bytes] = []

    def take(lines: list[bytes]) -> None:
        seen.extend(lines)
        raise ValueError(lines[0])

    async def fail() -> None:
        read_end, write_end = os.pipe()
        os.write(write_end, b"a\n")
        try:
            await read_lines(os.fdopen(read_end, "rb"), take)
        finally:
            os.close(write_end)

    with pytest.raises(ValueError, match="a"):
        asyncio.run(fail())
    assert seen == [b"a\n"]
