"""`pageframe key` makes keys that an access file knows."""

import json

import pytest

from pageframe.cli.main import main
from pageframe.rpc.access import read_access
from pageframe.rpc.auth import Authenticator, Caller


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["key", *arguments])
    return caught.value.code, *capsys.readouterr()


def test_the_line_lets_the_key_in_and_does_not_tell_it(capsys, tmp_path):
    code, out, err = run(capsys, "alice", "--operator")
    made, line = out.strip(), err.splitlines()[1]
    assert code == 0
    assert made not in err
    (tmp_path / "access").write_text(line + "\n")
    authenticator = Authenticator(read_access(tmp_path / "access").caller_of_key)
    assert authenticator.caller(f"Bearer {made}") == Caller("alice", is_operator=True)


def test_no_two_keys_are_the_same(capsys):
    made = {json.loads(run(capsys, "alice", "--json")[1])["key"] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("tenant", ["a b", "a=b", "#a", "a:b", ""])
def test_a_name_that_no_line_can_hold_is_refused(capsys, tenant):
    code, out, err = run(capsys, tenant)
    assert (code, out) == (2, "")
    assert "tenant's name" in err
