"""Tenants come from keys, salts from tenants."""

import hashlib

import pytest

from pageframe.core.errors import PermissionDeniedError, UnauthenticatedError
from pageframe.rpc.auth import Authenticator, Caller, hashed_key


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


def test_a_key_may_be_known_by_its_digest_alone_and_the_digest_is_no_key():
    hashed = hashed_key("k1")
    assert hashed == "sha256:" + hashlib.sha256(b"k1").hexdigest()
    authenticator = Authenticator({hashed: Caller("red")})
    assert authenticator.tenant("Bearer k1") == "red"
    with pytest.raises(UnauthenticatedError, match="not known"):
        authenticator.caller(f"Bearer {hashed}")


def test_other_keys_hold_from_the_moment_they_are_adopted():
    authenticator = Authenticator({"k1": Caller("red")})
    authenticator.adopt({"k2": Caller("blue")})
    assert authenticator.tenant("Bearer k2") == "blue"
    with pytest.raises(UnauthenticatedError, match="not known"):
        authenticator.caller("Bearer k1")
