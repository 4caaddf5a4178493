"""What is wrong with files of TLS is found when they are read, and named."""

import pytest

from certificates import Authority, Pair, encrypt_key
from pageframe.core.errors import InvalidRequestError
from pageframe.rpc import tls_files
from pageframe.rpc.tls import ClientTls, make_client_tls, make_server_tls, parse_client_tls
from pageframe.rpc.tls_files import read_ca, read_identity


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def _reason(pair: Pair, *, is_server: bool = True) -> tuple[str, str]:
    with pytest.raises(InvalidRequestError) as caught:
        read_identity(pair.cert, pair.key, is_server=is_server)
    return caught.value.reason, caught.value.message


@pytest.mark.parametrize("is_server", [True, False])
def test_a_good_pair_is_read_as_it_is(authority, is_server):
    pair = authority.issue("good")
    identity = read_identity(pair.cert, pair.key, is_server=is_server)
    assert (identity.cert_pem, identity.key_pem) == (
        pair.cert.read_bytes(),
        pair.key.read_bytes(),
    )
    assert identity.not_after.endswith("GMT")
    assert read_ca(authority.pem) == authority.pem.read_bytes()


def test_a_chain_may_follow_the_certificate(authority):
    pair = authority.issue("chain")
    pair.cert.write_bytes(pair.cert.read_bytes() + authority.pem.read_bytes())
    assert read_identity(pair.cert, pair.key, is_server=True).cert_pem.count(b"BEGIN CERT") == 2


def test_a_file_that_is_not_there_is_named(authority, tmp_path):
    pair = authority.issue("there")
    for missing in (Pair(tmp_path / "no.pem", pair.key), Pair(pair.cert, tmp_path / "no.key")):
        reason, message = _reason(missing)
        assert reason == "TLS_FILE_UNREADABLE"
        assert str(tmp_path / "no.") in message
    with pytest.raises(InvalidRequestError, match=r"no\.pem.*No such file"):
        read_ca(tmp_path / "no.pem")


def test_the_key_of_another_certificate_is_refused(authority):
    pair = Pair(authority.issue("mine").cert, authority.issue("other").key)
    reason, message = _reason(pair)
    assert reason == "TLS_KEY_MISMATCH"
    assert str(pair.key) in message
    assert str(pair.cert) in message


def test_files_that_hold_something_else_are_refused(authority):
    pair = authority.issue("swapped")
    assert _reason(Pair(pair.key, pair.key))[0] == "TLS_CERTIFICATE_MALFORMED"
    assert _reason(Pair(pair.cert, pair.cert))[0] == "TLS_KEY_MALFORMED"
    with pytest.raises(InvalidRequestError) as caught:
        read_ca(pair.key)
    assert caught.value.reason == "TLS_CERTIFICATE_MALFORMED"


def test_nobody_is_asked_for_a_passphrase(authority):
    pair = authority.issue("locked")
    encrypt_key(pair.key)
    assert _reason(pair)[0] == "TLS_KEY_ENCRYPTED"


def test_an_expired_certificate_is_refused_with_its_date(authority):
    pair = authority.issue("old", days=0)
    reason, message = _reason(pair)
    assert reason == "TLS_CERTIFICATE_EXPIRED"
    assert "GMT" in message


def test_a_certificate_of_tomorrow_is_refused(authority, monkeypatch):
    pair = authority.issue("early")
    monkeypatch.setattr(tls_files.time, "time", lambda: 0.0)
    assert _reason(pair)[0] == "TLS_CERTIFICATE_NOT_YET_VALID"


def test_a_ca_that_has_expired_is_refused(authority, monkeypatch):
    monkeypatch.setattr(tls_files.time, "time", lambda: 2.0**33)
    with pytest.raises(InvalidRequestError) as caught:
        read_ca(authority.pem)
    assert caught.value.reason == "TLS_CERTIFICATE_EXPIRED"


@pytest.mark.parametrize(("usage", "is_server"), [("clientAuth", True), ("serverAuth", False)])
def test_a_certificate_made_for_the_other_side_is_refused(authority, usage, is_server):
    pair = authority.issue(usage, extension=f"extendedKeyUsage={usage}")
    assert _reason(pair, is_server=is_server)[0] == "TLS_CERTIFICATE_UNUSABLE"
    assert read_identity(pair.cert, pair.key, is_server=not is_server).not_after


def test_one_file_of_a_pair_is_refused(authority):
    pair = authority.issue("half")
    for cert, key in ((pair.cert, None), (None, pair.key)):
        for make in (
            lambda c=cert, k=key: make_server_tls(c, k, None),
            lambda c=cert, k=key: make_client_tls(ca=None, cert=c, key=k, name=""),
        ):
            with pytest.raises(InvalidRequestError, match=str(cert or key)) as caught:
                make()
            assert caught.value.reason == "TLS_PAIR_INCOMPLETE"
    with pytest.raises(InvalidRequestError) as caught:
        make_server_tls(None, None, authority.pem)
    assert caught.value.reason == "TLS_PAIR_INCOMPLETE"
    assert make_server_tls(None, None, None) is None


def test_the_option_of_commands_is_read(tmp_path):
    assert parse_client_tls("public") == ClientTls()
    whole = parse_client_tls("a.pem,cert=b.pem,key=b.key,name=inside.example")
    names = [str(path) for path in (whole.ca, whole.cert, whole.key)]
    assert (names, whole.name) == (["a.pem", "b.pem", "b.key"], "inside.example")


@pytest.mark.parametrize(
    "text", ["", ",", "cert=a", "a.pem,b.pem", "a.pem,cert=", "a.pem,name=x,name=y", "a.pem,ca=b"]
)
def test_a_malformed_option_is_refused(text):
    with pytest.raises(InvalidRequestError) as caught:
        parse_client_tls(text)
    assert caught.value.reason == "TLS_MALFORMED"
