"""The access file: its lines, what is refused, and what becomes of it while a service runs."""

import asyncio
import os
from pathlib import Path

import pytest
import structlog

from pageframe.core.errors import InvalidRequestError, UnauthenticatedError
from pageframe.core.replica import TenantQuota
from pageframe.core.terms import TenantRate, TenantTerms
from pageframe.rpc.access import Access, read_access
from pageframe.rpc.access_file import AccessFile
from pageframe.rpc.auth import Caller


def written(folder: Path, text: str) -> Path:
    path = folder / "access"
    path.write_text(text)
    return path


def test_lines_name_keys_and_what_tenants_may_have(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "# keys\n\nk1 red\n  k2\tblue\nsha256:00ff red operator\n"
        "tenant red weight=2.5 blocks=10:50 requests-per-minute=60 tokens-per-minute=9000\n"
        "tenant blue blocks=0: tokens-per-minute=5\ntenant green\n",
    )
    assert read_access(path) == Access(
        {
            "k1": Caller("red"),
            "k2": Caller("blue"),
            "sha256:00ff": Caller("red", is_operator=True),
        },
        TenantTerms(
            weights={"red": 2.5},
            quotas=(
                TenantQuota(tenant="red", floor_blocks=10, ceiling_blocks=50),
                TenantQuota(tenant="blue"),
            ),
            rates=(
                TenantRate(tenant="red", num_requests_per_minute=60, num_tokens_per_minute=9000),
                TenantRate(tenant="blue", num_tokens_per_minute=5),
            ),
        ),
    )


@pytest.mark.parametrize(
    "line",
    [
        "secret",
        "secret red blue",
        "secret red operator x",
        "k1 red",
        "tenant red weight=0",
        "tenant red weight=secret",
        "tenant red blocks=5:4",
        "tenant red requests-per-minute=0",
        "tenant red tokens-per-minute=1.5",
        "tenant red tokens-per-minute=9999999999999",
        "tenant red weight=1 weight=2",
        "tenant red speed=3",
        "tenant red=1 weight=2",
        "tenant blue weight=2",
    ],
)
def test_a_malformed_file_names_the_line_and_no_key(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, f"k1 red\ntenant blue\n{line}\n")
    with pytest.raises(InvalidRequestError, match="line 3") as caught:
        read_access(path)
    assert caught.value.reason == "API_KEYS_MALFORMED"
    assert "k1" not in caught.value.message
    if not line.startswith("tenant"):
        assert "secret" not in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="absent") as caught:
        read_access(tmp_path / "absent")
    assert caught.value.reason == "API_KEYS_UNREADABLE"


@pytest.mark.parametrize("text", ["", "# nobody\n", "tenant red weight=2\n"])
def test_a_file_without_keys_lets_nobody_in_by_mistake(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_access(written(tmp_path, text))
    assert caught.value.reason == "API_KEYS_EMPTY"


def test_terms_of_the_file_stand_before_those_of_the_settings() -> None:
    base = TenantTerms(
        weights={"red": 1.5, "blue": 2.0},
        quotas=(TenantQuota(tenant="red", floor_blocks=1), TenantQuota(tenant="blue")),
    )
    file = TenantTerms(
        weights={"red": 3.0},
        quotas=(TenantQuota(tenant="red", floor_blocks=7),),
        rates=(TenantRate(tenant="red", num_tokens_per_minute=5),),
    )
    assert file.over(base) == TenantTerms(
        weights={"red": 3.0, "blue": 2.0},
        quotas=(TenantQuota(tenant="red", floor_blocks=7), TenantQuota(tenant="blue")),
        rates=(TenantRate(tenant="red", num_tokens_per_minute=5),),
    )


def test_a_file_is_read_again_when_it_has_changed_and_not_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path, "k1 red\n")
    file = AccessFile(path)
    told: list[Access] = []
    file.on_change(told.append)
    asyncio.run(file.look())
    assert told == []
    (tmp_path / "next").write_text("k2 blue\ntenant blue weight=2\n")
    os.replace(tmp_path / "next", path)
    asyncio.run(file.look())
    asyncio.run(file.look())
    assert told == [file.access]
    assert file.access.caller_of_key == {"k2": Caller("blue")}
    assert file.access.terms.weights == {"blue": 2.0}


def test_a_broken_file_changes_nothing_and_is_complained_of_once(tmp_path: Path) -> None:
    path = written(tmp_path, "k1 red\n")
    file = AccessFile(path)
    file.on_change(lambda _: pytest.fail("nothing has changed"))
    good = file.access
    with structlog.testing.capture_logs() as lines:
        for text in ("secret-key red nonsense\n", None):
            path.unlink() if text is None else path.write_text(text)
            asyncio.run(file.look())
            asyncio.run(file.look())
    assert file.access is good
    assert [line["reason"] for line in lines] == ["API_KEYS_MALFORMED", "API_KEYS_UNREADABLE"]
    assert "secret-key" not in str(lines)
    told: list[Access] = []
    file._on_change = [told.append]
    path.write_text("k3 green\n")
    asyncio.run(file.look())
    assert told == [Access({"k3": Caller("green")})]


def test_without_a_file_there_is_nothing_to_look_at() -> None:
    file = AccessFile(None)
    asyncio.run(file.look())
    assert file.access == Access()


def test_an_authenticator_of_a_file_follows_it(tmp_path: Path) -> None:
    path = written(tmp_path, "k1 red\n")
    file = AccessFile(path)
    authenticator = file.authenticator()
    assert authenticator.tenant("Bearer k1") == "red"
    path.write_text("k2 green operator\n")
    asyncio.run(file.look())
    assert authenticator.caller("Bearer k2") == Caller("green", is_operator=True)
    with pytest.raises(UnauthenticatedError, match="not known"):
        authenticator.caller("Bearer k1")
