"""Four places for a setting, one order among them, and errors that name the place."""

from pathlib import Path

import pytest

from pageframe.cli import server_address
from pageframe.config.launch import ADDRESS_FILE_NAME, Launch
from pageframe.config.option_types import DtypeName
from pageframe.config.settings import OPTION_FIELDS, Settings, load_settings, variable_name
from pageframe.core.errors import InvalidRequestError
from pageframe.core.replica import TenantQuota
from pageframe.core.trace import TraceMode


def write_toml(folder: Path, text: str, name: str = "pageframe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(
    tmp_path: Path,
    *,
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    config: Path | None = None,
) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        load_settings(flags or {}, environ or {}, config_path=config, working_dir=tmp_path)
    assert "\n" not in caught.value.message, "an error is one line"
    return caught.value


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    write_toml(tmp_path, "block-size = 32\nnum-blocks = 10\ntoken-budget = 64\n")
    environ = {"PAGEFRAME_NUM_BLOCKS": "20", "PAGEFRAME_TOKEN_BUDGET": "128"}
    settings = load_settings({"token-budget": "256"}, environ, working_dir=tmp_path)
    assert settings.token_budget == 256
    assert settings.num_blocks == 20
    assert settings.block_size == 32
    assert settings.max_model_len == 0


def test_the_file_is_found_by_flag_then_variable_then_working_folder(tmp_path: Path) -> None:
    write_toml(tmp_path, "num-blocks = 1\n")
    by_variable = write_toml(tmp_path, "num-blocks = 2\n", "two.toml")
    by_flag = write_toml(tmp_path, "num-blocks = 3\n", "three.toml")
    environ = {"PAGEFRAME_CONFIG": str(by_variable)}

    def num_blocks(config: Path | None, environ: dict[str, str]) -> int:
        loaded = load_settings({}, environ, config_path=config, working_dir=tmp_path)
        return loaded.num_blocks

    assert num_blocks(None, {}) == 1
    assert num_blocks(None, environ) == 2
    assert num_blocks(by_flag, environ) == 3


def test_every_setting_can_be_a_flag_a_variable_and_a_key(tmp_path: Path) -> None:
    words = dict.fromkeys(OPTION_FIELDS, "1") | {
        "model": "m", "runner": "sim", "device": "cuda:1", "dtype": "fp32", "kv-dtype": "int8",
        "trace": "audit", "grpc": "127.0.0.1:1", "http": "127.0.0.1:2", "log-level": "debug",
        "state-dir": str(tmp_path), "recovery": "tail", "tenant-quotas": "a=1:2",
        "shadow-policy": "victim=youngest", "tenant-weights": "a=2", "spool-size": "2MiB",
        "speculation": "ngram", "cpu-kernels": "avx2", "replicas": "2",
    }  # fmt: skip
    by_flag = load_settings(words, {}, working_dir=tmp_path)
    by_variable = load_settings(
        {}, {variable_name(name): word for name, word in words.items()}, working_dir=tmp_path
    )
    file = write_toml(
        tmp_path, "".join(f'{name.replace("-", "_")} = "{word}"\n' for name, word in words.items())
    )
    by_file = load_settings({}, {}, config_path=file)
    assert by_flag == by_variable == by_file
    defaults = load_settings({}, {}, working_dir=tmp_path / "empty")
    for field in OPTION_FIELDS.values():
        if field not in (
            "lookahead",
            "prefix_cache",
            "cuda_graphs",
        ):  # on by default, and "1" is on
            assert getattr(by_flag, field) != getattr(defaults, field), field


def test_an_unknown_variable_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    error = error_of(tmp_path, environ={"PAGEFRAME_BLOKSIZE": "16"})
    assert error.reason == "SETTING_UNKNOWN"
    assert "PAGEFRAME_BLOKSIZE" in error.message
    assert "PAGEFRAME_BLOCK_SIZE" in error.message


def test_variables_of_others_are_ignored(tmp_path: Path) -> None:
    environ = {"BLOCK_SIZE": "17", "OTEL_SERVICE_NAME": "x", "PAGEFRAME_MODELS_DIR": "/models"}
    assert load_settings({}, environ, working_dir=tmp_path).block_size == 16


def test_an_unknown_key_is_named_with_its_file(tmp_path: Path) -> None:
    path = write_toml(tmp_path, "colour = 1\n")
    error = error_of(tmp_path)
    assert error.reason == "SETTING_UNKNOWN"
    assert "colour" in error.message
    assert str(path) in error.message
    assert "block-size" in error.message, "what is allowed is said"


@pytest.mark.parametrize(
    ("option", "word", "allowed"),
    [
        ("block-size", "17", "power of two from 1 to 256"),
        ("block-size", "512", "power of two from 1 to 256"),
        ("block-size", "0", "power of two from 1 to 256"),
        ("block-size", "x", "power of two from 1 to 256"),
        ("num-blocks", "many", "integer"),
        ("num-blocks", "-1", "greater than or equal to 0"),
        ("token-budget", "0", "greater than or equal to 1"),
        ("trace", "loud", "'audit', 'all', 'sampled' or 'off'"),
        ("runner", "fast", "'auto', 'native', 'transformers' or 'sim'"),
        ("dtype", "int4", "'auto', 'bf16', 'fp16' or 'fp32'"),
        ("kv-dtype", "int4", "'fp8' or 'int8'"),
        ("device", "gpu", "auto, cpu, cuda or cuda:INDEX"),
        ("kv-memory", "lots", "2GiB"),
        ("kv-memory", "-1", "2GiB"),
        ("lookahead", "maybe", "boolean"),
        ("grpc", "50051", "HOST:PORT"),
        ("http", "80", "HOST:PORT"),
        ("drain-timeout", "soon", "30s"),
        ("host-kv-memory", "some", "2GiB"),
        ("num-blocks-max", "-1", "greater than or equal to 0"),
        ("shadow-policy", "youngest", "must be GROUP=NAME,..."),
        ("tenant-quotas", "alice", "alice=100:500"),
        ("tenant-quotas", "a=5:4", "floor of 5 above the ceiling of 4"),
        ("tenant-weights", "alice", "alice=3,bob=0.5"),
        ("tenant-weights", "a=0", "must lie in [0.001, 1000]"),
        ("priority-ageing", "-1s", "500ms"),
        ("max-queued-requests", "0", "greater than or equal to 1"),
        ("session-ttl", "25h", "less than or equal to 86400"),
        ("eviction-policy", "", "at least 1 character"),
        ("model", "", "at least 1 character"),
        ("state-dir", "", "folder"),
    ],
)
def test_a_malformed_value_is_named_with_origin_and_what_is_allowed(
    tmp_path: Path, option: str, word: str, allowed: str
) -> None:
    for flags, environ, origin in (
        ({option: word}, {}, f"--{option}"),
        ({}, {variable_name(option): word}, variable_name(option)),
    ):
        error = error_of(tmp_path, flags=flags, environ=environ)
        assert error.reason == "SETTING_MALFORMED"
        assert origin in error.message
        assert repr(word) in error.message
        assert allowed in error.message


@pytest.mark.parametrize("line", ["block-size = true", "num-blocks = true", "kv-memory = false"])
def test_a_truth_value_is_no_number(tmp_path: Path, line: str) -> None:
    path = write_toml(tmp_path, line)
    error = error_of(tmp_path)
    assert line.split()[0] in error.message
    assert str(path) in error.message


@pytest.mark.parametrize("text", ["block-size = ", "\xff"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    error = error_of(tmp_path, config=path)
    assert error.reason == "SETTING_MALFORMED"
    assert str(path) in error.message


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    assert "absent.toml" in error_of(tmp_path, config=tmp_path / "absent.toml").message
    error = error_of(tmp_path, environ={"PAGEFRAME_CONFIG": str(tmp_path / "gone.toml")})
    assert "gone.toml" in error.message


def test_auto_and_off_and_long_names_mean_what_they_say(tmp_path: Path) -> None:
    settings = load_settings(
        {"kv-memory": "auto", "http": "off", "dtype": "float32", "lookahead": "off"},
        {},
        working_dir=tmp_path,
    )
    assert settings.kv_memory_bytes == 0
    assert settings.http is None
    assert settings.dtype is DtypeName.FP32
    assert settings.lookahead is False


def test_the_state_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert load_settings({}, {}, working_dir=tmp_path).state_dir == tmp_path / "pageframe"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings({}, {}, working_dir=tmp_path).state_dir == tmp_path / ".pageframe"


def test_a_launch_file_round_trips_and_is_private(tmp_path: Path) -> None:
    settings = Settings(
        kv_memory_bytes=1024,
        trace=TraceMode.AUDIT,
        state_dir=tmp_path,
        recovery="swap",
        shadow_policy=(("victim", "youngest"),),
        tenant_quotas=(TenantQuota(tenant="a", floor_blocks=1),),
    )
    launch = Launch(
        settings=settings,
        model_path=tmp_path / "model",
        run_dir=tmp_path,
        num_threads=2,
        supervisor_pid=7,
    ).with_addresses(grpc="127.0.0.1:4000", http=None)
    path = tmp_path / "launch.json"
    launch.write(path)
    assert Launch.read(path) == launch
    assert launch.settings.grpc == "127.0.0.1:4000"
    assert launch.executor_address == f"unix:{tmp_path}/executor.sock"
    assert launch.scheduler_address == f"unix:{tmp_path}/scheduler.sock"
    assert path.stat().st_mode & 0o077 == 0


def test_a_published_address_is_found_by_clients_and_taken_back(tmp_path: Path) -> None:
    def launch(port: int) -> Launch:
        return Launch(
            settings=Settings(state_dir=tmp_path, grpc=f"127.0.0.1:{port}"),
            model_path=tmp_path,
            run_dir=tmp_path,
            num_threads=1,
            supervisor_pid=1,
        )

    assert server_address.ADDRESS_FILE_NAME == ADDRESS_FILE_NAME
    launch(4000).publish_address()
    assert server_address.find_server(None, tmp_path, {}) == "127.0.0.1:4000"
    launch(5000).withdraw_address()
    assert (tmp_path / ADDRESS_FILE_NAME).exists(), "it is another system's"
    launch(4000).withdraw_address()
    launch(4000).withdraw_address()
    assert not (tmp_path / ADDRESS_FILE_NAME).exists()


def test_bounds_of_what_is_kept_are_settings():
    settings = load_settings({"handle-ttl-max": "2h", "spool-size": "3MiB"}, {})
    assert settings.handle_ttl_max_seconds == 7200
    assert settings.spool_size_bytes == 3 << 20
    with pytest.raises(InvalidRequestError, match="spool-size"):
        load_settings({"spool-size": "0"}, {})
