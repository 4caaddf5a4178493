"""Words in settings and the numbers they mean."""

import pytest

from pageframe.config.values import (
    HostPort,
    format_policy_names,
    format_size,
    format_tenant_weights,
    parse_duration_seconds,
    parse_host_port,
    parse_policy_names,
    parse_size_bytes,
    parse_targets,
    parse_tenant_quotas,
    parse_tenant_weights,
)
from pageframe.core.replica import TenantQuota


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 * 1024**3),
        ("512 MiB", 512 * 1024**2),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("1kib", 1024),
        ("0", 0),
    ],
)
def test_sizes_are_binary_or_decimal_as_their_unit_says(text: str, num_bytes: int) -> None:
    assert parse_size_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 apples", "1e9", "nan", "0x10", "1 2GiB"])
def test_a_malformed_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="2GiB"):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30.0), ("30s", 30.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0)],
)
def test_durations_are_seconds_unless_a_unit_is_given(text: str, seconds: float) -> None:
    assert parse_duration_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "inf", "nan", "1 fortnight"])
def test_a_malformed_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="30s"):
        parse_duration_seconds(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", HostPort("127.0.0.1", 50051)),
        ("localhost:0", HostPort("localhost", 0)),
        ("[::1]:8000", HostPort("::1", 8000)),
    ],
)
def test_addresses_round_trip(text: str, address: HostPort) -> None:
    assert parse_host_port(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "50051", ":50051", "host:", "host:-1", "host:٣", "::1:80"])
def test_a_malformed_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:50051"):
        parse_host_port(text)


def test_a_port_past_the_largest_is_named() -> None:
    with pytest.raises(ValueError, match="65536"):
        parse_host_port("127.0.0.1:65536")


def test_sizes_read_well() -> None:
    assert format_size(3 * 1024**3 // 2) == "1.5 GiB"
    assert format_size(300 * 1024**2) == "300 MiB"
    assert format_size(2048) == "2 KiB"


def test_quotas_are_floors_and_ceilings_by_tenant() -> None:
    assert parse_tenant_quotas("alice=100:500, bob = 0:200,carol=7:") == (
        TenantQuota(tenant="alice", floor_blocks=100, ceiling_blocks=500),
        TenantQuota(tenant="bob", floor_blocks=0, ceiling_blocks=200),
        TenantQuota(tenant="carol", floor_blocks=7, ceiling_blocks=None),
    )
    assert parse_tenant_quotas("a=3:3")[0].ceiling_blocks == 3
    assert parse_tenant_quotas("off") == parse_tenant_quotas(" ") == ()


@pytest.mark.parametrize("text", ["alice", "a=1", "a=1:2:3", "a=-1:2", "=1:2", "a=:5", "a=1:2,"])
def test_a_malformed_quota_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="alice=100:500"):
        parse_tenant_quotas(text)


def test_quotas_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' twice"):
        parse_tenant_quotas("a=1:2,a=1:3")
    with pytest.raises(ValueError, match="floor of 3 above the ceiling of 2 for 'a'"):
        parse_tenant_quotas("a=3:2")


def test_policies_by_group_round_trip() -> None:
    names = (("victim", "youngest"), ("recovery", "my-own"))
    assert parse_policy_names(" victim = youngest, recovery=my-own ") == names
    assert parse_policy_names(format_policy_names(names)) == names
    assert parse_policy_names("off") == parse_policy_names("") == ()
    assert format_policy_names(()) == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [("victim", "GROUP=NAME"), ("=a", "GROUP=NAME"), ("a=", "GROUP=NAME"), ("a=b,a=c", "twice")],
)
def test_malformed_policies_are_refused_with_an_example(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy_names(text)


def test_weights_are_numbers_by_tenant() -> None:
    weights = parse_tenant_weights("alice=3, bob = 0.5,carol=1000")
    assert weights == (("alice", 3.0), ("bob", 0.5), ("carol", 1000.0))
    assert parse_tenant_weights("off") == parse_tenant_weights(" ") == ()
    assert format_tenant_weights(weights) == "alice=3,bob=0.5,carol=1000"
    assert format_tenant_weights(()) == "off"


@pytest.mark.parametrize("text", ["alice", "alice=", "=3", "alice=x", "a=1;b=2", "a=nan", "a=1e9"])
def test_a_malformed_weight_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"alice=3,bob=0.5"):
        parse_tenant_weights(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a=0", r"weight of 0 for 'a'; it must lie in \[0.001, 1000\]"),
        ("a=1,b=-2", "weight of -2 for 'b'"),
        ("a=1001", "weight of 1001 for 'a'"),
        ("a=1,a=2", "names tenant 'a' twice"),
    ],
)
def test_a_weight_that_makes_no_sense_is_refused_with_the_numbers(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_tenant_weights(text)


def test_several_targets_are_addresses_sockets_and_names():
    text = "127.0.0.1:1, unix:/run/scheduler.sock,dns:///schedulers.example:50052"
    assert parse_targets(text) == (
        "127.0.0.1:1",
        "unix:/run/scheduler.sock",
        "dns:///schedulers.example:50052",
    )


@pytest.mark.parametrize("text", ["", "a:1,", "a", "dns:///a", "dns://a:1", "unix:x"])
def test_other_targets_are_refused(text):
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        parse_targets(text)
