"""`pageframe pool` in front of the real service over a small real engine."""

import asyncio
import json
import os

import pytest
from typer.testing import CliRunner

from pageframe.cli.commands import build_app
from pageframe.cli.executor_address import find_executors
from pageframe.cli.main import main
from pageframe.config.launch import Launch
from pageframe.config.settings import Settings
from pageframe.core.errors import PreconditionError
from unit.executor.memory_house import KEYS, prompt, run_in_house


@pytest.fixture
def run(tmp_path):
    """Run a scenario with a house and a way to call the command before it."""

    def run(scenario, **options):
        async def with_command(house):
            async def pool(*arguments):
                def invoke():
                    server = ("--server", f"unix:{tmp_path}/executor.sock")
                    return CliRunner().invoke(build_app("pool"), ["pool", *arguments, *server])

                return await asyncio.to_thread(invoke)

            await scenario(house, pool)

        run_in_house(tmp_path, with_command, **options)

    return run


def content(result):
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_without_a_terminal_it_is_shown_once(run):
    async def scenario(house, pool):
        await house.run(1, 10)
        result = await pool()
        assert result.exit_code == 0
        assert "12 blocks of 4 tokens" in result.stdout
        assert "r1" in result.stdout
        assert result.stdout == (await pool("--once")).stdout

    run(scenario)


def test_json_has_every_block_and_every_table(run):
    async def scenario(house, pool):
        await house.run(1, 10)
        shown = content(await pool("--json"))
        assert shown["pool"] == {
            "total": 12,
            "free": 9,
            "held": 3,
            "cached": 0,
            "fenced": 0,
            "quarantined": 0,
            "pinned": 0,
        }
        assert shown["blocks"]["state"] == ["held"] * 3 + ["free"] * 9
        assert shown["blocks"]["references"] == [1] * 3 + [0] * 9
        assert shown["blocks"]["indexed"] == [True] * 2 + [False] * 10
        assert shown["blocks"]["group"] == [0] * 12
        (sequence,) = shown["sequences"]
        assert (sequence["request_id"], sequence["block_ids"]) == ("r1", [0, 1, 2])
        assert sequence["state"] == "running"
        assert shown["operation"] == house.log.num_operations

    run(scenario)


def test_a_block_is_explained(run):
    async def scenario(house, pool):
        await house.run(1, 10)
        result = await pool("--block", "0")
        assert "block 0 is held: 1 reference; in the prefix index" in result.stdout
        block = content(await pool("--block", "0", "--json"))
        assert (block["operation"], block["cause"]) == ("kv.index", "sealed")
        assert block["sequence_ids"] == [1]

    run(scenario)


def test_a_refusal_is_exit_code_1_and_says_why(run):
    async def scenario(house, pool):
        result = await pool("--block", "12")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == (
            "pageframe: BLOCK_UNKNOWN: block 12 is not in the pool of 12 blocks\n"
        )
        result = await pool("--block", "12", "--json")
        assert result.exit_code == 1
        error = json.loads(result.stdout)["error"]
        assert (error["status"], error["reason"]) == ("OUT_OF_RANGE", "BLOCK_UNKNOWN")
        assert error["limits"] == {"block_id": "12", "num_blocks": "12"}

    run(scenario)


def test_a_prefix_is_kept_and_given_back(run):
    async def scenario(house, pool):
        await house.run(1, 10)
        tokens = ",".join(map(str, prompt(1, 10)))
        result = await pool("--retain-tokens", tokens, "--ttl", "30s", "--request-id", "a")
        assert result.exit_code == 0
        assert result.stderr == "8 of 10 tokens are kept now\n"
        (handle,) = result.stdout.split()
        again = content(
            await pool("--retain-tokens", tokens.replace(",", " "), "--request-id", "a", "--json")
        )
        assert (again["handle"], again["num_tokens"]) == (handle, 8)
        assert again["expire_ns"] == house.clock.now_ns() + 600 * 10**9
        assert handle in (await pool()).stdout
        assert content(await pool("--release", handle, "--json")) == {"released": handle}
        assert handle not in (await pool()).stdout
        result = await pool("--release", "unknown")
        assert result.exit_code == 1
        assert "HANDLE_UNKNOWN" in result.stderr

    run(scenario)


def test_bounds_and_size_are_set(run):
    async def scenario(house, pool):
        await house.run(1, 10)
        result = await pool("--quota", "default", "1", "9")
        assert result.stdout == "tenant default holds 3 blocks now\n"
        answer = content(await pool("--quota", "default", "2", "-", "--json"))
        assert answer == {"tenant": "default", "num_blocks_held": 3}
        quota = house.engine.memory.quotas.quota_of("default")
        assert (quota.floor_blocks, quota.ceiling_blocks) == (2, None)
        result = await pool("--resize", "20")
        assert result.stdout == "the pool has 20 blocks; 0 were moved\n"
        assert content(await pool("--resize", "16", "--json"))["pool"]["total"] == 16
        result = await pool("--resize", "0")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "RESIZE_TOO_SMALL" in result.stderr

    run(scenario)


def test_a_key_comes_from_a_file(run, tmp_path):
    red, operator = tmp_path / "red", tmp_path / "operator"
    red.write_text("k-red\n")
    operator.write_text("  k-op")

    async def scenario(house, pool):
        assert "CREDENTIALS_MISSING" in (await pool()).stderr
        result = await pool("--resize", "20", "--api-key-file", str(red))
        assert result.exit_code == 1
        assert "OPERATOR_NEEDED" in result.stderr
        result = await pool("--resize", "20", "--api-key-file", str(operator))
        assert result.exit_code == 0

    run(scenario, keys=KEYS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--block", "1", "--resize", "5"),
        ("--watch", "--release", "x"),
        ("--retain", "x", "--retain-tokens", "1"),
        ("--block", "-1"),
        ("--block", "4294967296"),
        ("--resize", "-5"),
        ("--watch", "--from-operation", "-1"),
        ("--quota", "red", "1"),
        ("--quota", "red", "-1", "5"),
        ("--quota", "red", "1", "-5"),
        ("--quota", "red", "1", "many"),
        ("--quota", "red", "1", "4294967296"),
        ("--retain-tokens", ""),
        ("--retain-tokens", "1,x"),
        ("--retain-tokens", "4294967296"),
        ("--retain-tokens", "1", "--ttl", "soon"),
        ("--interval", "0"),
        ("--surprise",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = CliRunner().invoke(build_app("pool"), ["pool", *arguments, "--server", "unix:/none"])
    assert result.exit_code == 2, result.output


@pytest.mark.parametrize("content_", ["", "two words", None])
def test_a_key_file_that_holds_no_key_is_exit_code_2(content_, tmp_path, capsys):
    path = tmp_path / "key"
    if content_ is not None:
        path.write_text(content_)
    with pytest.raises(SystemExit) as caught:
        main(["pool", "--api-key-file", str(path), "--server", "unix:/none"])
    assert caught.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_where_nothing_listens_it_fails(tmp_path):
    result = CliRunner().invoke(
        build_app("pool"), ["pool", "--server", f"unix:{tmp_path}/none.sock"]
    )
    assert result.exit_code == 1
    assert "TRANSPORT" in result.stderr


def launch_file(folder, state_dir, supervisor_pid):
    folder.mkdir(parents=True)
    launch = Launch(
        settings=Settings(state_dir=state_dir),
        model_path=state_dir,
        run_dir=folder,
        num_threads=1,
        supervisor_pid=supervisor_pid,
    )
    launch.write(folder / "launch.json")
    return launch.executor_address


def test_the_executor_is_found_by_its_state_folder(tmp_path, monkeypatch):
    state_dir, other = tmp_path / "state", tmp_path / "other"
    runtime = tmp_path / "runtime"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    environ = {"XDG_RUNTIME_DIR": str(runtime), "PAGEFRAME_STATE_DIR": str(state_dir)}

    def found(folder=None):
        (address,) = find_executors(None, folder, environ).values()
        return address

    with pytest.raises(PreconditionError) as caught:
        found()
    assert caught.value.reason == "EXECUTOR_NOT_FOUND"
    # One that has ended, one of another folder, and one that is no launch file.
    launch_file(state_dir / "run" / "1", state_dir, 2**22 + 1)
    launch_file(runtime / "pageframe-a", other, os.getpid())
    (tmp_path / "tmp" / "pageframe-b").mkdir(parents=True)
    (tmp_path / "tmp" / "pageframe-b" / "launch.json").write_text("{}")
    with pytest.raises(PreconditionError):
        found()
    assert found(other) == f"unix:{runtime / 'pageframe-a' / 'executor.sock'}"
    # The path of the state folder was too long for a socket.
    address = launch_file(runtime / "pageframe-c", state_dir, os.getpid())
    assert found() == address
    newer = launch_file(state_dir / "run" / "2", state_dir, os.getpid())
    os.utime(runtime / "pageframe-c" / "launch.json", ns=(1, 1))
    assert found() == newer
    assert find_executors("127.0.0.1:7", state_dir, environ) == {"127.0.0.1:7": "127.0.0.1:7"}
