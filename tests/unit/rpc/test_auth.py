"""Tenants come from keys, salts from tenants."""

import pytest

from pageframe.core.errors import InvalidRequestError, PermissionDeniedError, UnauthenticatedError
from pageframe.rpc.auth import Authenticator, Caller, read_api_keys


def test_without_keys_everybody_is_the_default_tenant():
    assert Authenticator({}).tenant(None) == "default"
    assert Authenticator({}).tenant("Bearer whatever") == "default"


def test_a_key_names_its_tenant():
    authenticator = Authenticator({"k1": Caller("red"), "k2": Caller("blue")})
    assert authenticator.tenant("Bearer k2") == "blue"
    assert authenticator.tenant("bearer  k1 ") == "red"


def test_without_keys_everybody_is_an_operator_and_with_keys_only_those_named():
    assert Authenticator({}).caller(None) == Caller("default", is_operator=True)
    keys = {"k1": Caller("red"), "k2": Caller("red", is_operator=True)}
    authenticator = Authenticator(keys)
    assert authenticator.caller("Bearer k1") == Caller("red")
    authenticator.caller("Bearer k2").check_operator("Resize")
    with pytest.raises(PermissionDeniedError, match="Resize") as caught:
        authenticator.caller("Bearer k1").check_operator("Resize")
    assert (caught.value.reason, caught.value.limits) == ("OPERATOR_NEEDED", {"tenant": "red"})


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        (None, "CREDENTIALS_MISSING"),
        ("", "CREDENTIALS_MISSING"),
        ("Basic k1", "CREDENTIALS_MISSING"),
        ("Bearer", "CREDENTIALS_MISSING"),
        ("Bearer k3", "CREDENTIALS_UNKNOWN"),
    ],
)
def test_nobody_else_gets_in(authorization, reason):
    with pytest.raises(UnauthenticatedError) as caught:
        Authenticator({"k1": Caller("red")}).tenant(authorization)
    assert caught.value.reason == reason
    assert "k3" not in caught.value.message


def test_salts_differ_by_tenant_and_by_secret():
    plain, secret = Authenticator({}), Authenticator({}, b"secret")
    salts = {
        plain.cache_salt("red"),
        plain.cache_salt("blue"),
        secret.cache_salt("red"),
        secret.cache_salt("blue"),
    }
    assert len(salts) == 4
    assert {len(salt) for salt in salts} == {32}
    assert Authenticator({"k": Caller("red")}).cache_salt("red") == plain.cache_salt("red")


def test_key_files_are_read(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# tenants\n\nk1 red\n  k2\tblue\nk3 red operator\n")
    assert read_api_keys(path) == {
        "k1": Caller("red"),
        "k2": Caller("blue"),
        "k3": Caller("red", is_operator=True),
    }


@pytest.mark.parametrize("line", ["secret", "secret red blue", "secret red operator x", "k1 red"])
def test_malformed_key_files_name_the_line_and_not_the_key(tmp_path, line):
    path = tmp_path / "keys"
    path.write_text(f"k1 red\n{line}\n")
    with pytest.raises(InvalidRequestError, match="line 2") as caught:
        read_api_keys(path)
    assert "secret" not in caught.value.message


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(InvalidRequestError, match="absent") as caught:
        read_api_keys(tmp_path / "absent")
    assert caught.value.reason == "API_KEYS_UNREADABLE"
