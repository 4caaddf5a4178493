"""Logs: one JSON object a line, with the service and the trace."""

import io
import json
import logging

import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.telemetry.logs import configure, get_logger, trace_bound

pytestmark = pytest.mark.usefixtures("restored_logging")


def logged(level=None, environment=None, *, log):
    stream = io.StringIO()
    configure("pageframe-gateway", level, stream=stream, environment=environment or {})
    log()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_line_that_cannot_be_written_is_lost_and_raises_nothing():
    configure("gateway", "info", stream=FullDisk(), environment={})
    get_logger().info("generate")
    try:
        raise ValueError
    except ValueError:
        get_logger().exception("failed")


def test_a_line_says_service_level_event_and_values():
    (line,) = logged(log=lambda: get_logger(port=1).info("listening", host="here"))
    assert line.pop("timestamp")
    assert line == {
        "service": "pageframe-gateway",
        "level": "info",
        "event": "listening",
        "port": 1,
        "host": "here",
    }


def test_lines_inside_a_span_name_it_and_lines_outside_do_not():
    def log() -> None:
        with trace_bound(bytes(15) + b"\1", 255):
            get_logger().info("inside")
            logging.getLogger("grpc").warning("inside too")
        get_logger().info("outside")

    inside, inside_too, outside = logged(log=log)
    for line in (inside, inside_too):
        assert line["trace_id"] == "0" * 31 + "1"
        assert line["span_id"] == "00000000000000ff"
    assert "trace_id" not in outside


def test_an_untraced_request_binds_nothing():
    def log() -> None:
        with trace_bound(b"", 0):
            get_logger().info("inside")

    (line,) = logged(log=log)
    assert "trace_id" not in line


def test_standard_logging_takes_the_same_form():
    (line,) = logged(log=lambda: logging.getLogger("grpc").warning("%s is %d", "x", 3))
    assert (line["event"], line["level"], line["service"]) == (
        "x is 3",
        "warning",
        "pageframe-gateway",
    )


def test_an_exception_is_one_line():
    def log() -> None:
        try:
            raise ValueError("bad\nthing")
        except ValueError:
            logging.getLogger("any").exception("it failed")

    (line,) = logged(log=log)
    assert "ValueError: bad\nthing" in line["exception"]


def test_the_level_comes_from_the_argument_before_the_variable():
    def log() -> None:
        get_logger().info("quiet")
        get_logger().warning("loud")

    variable = {"PAGEFRAME_LOG_LEVEL": "warning"}
    assert [line["event"] for line in logged(environment=variable, log=log)] == ["loud"]
    assert len(logged("info", environment=variable, log=log)) == 2


def test_an_unknown_level_is_an_error_that_names_where_it_came_from():
    with pytest.raises(InvalidRequestError, match="PAGEFRAME_LOG_LEVEL must be one of debug"):
        configure("s", environment={"PAGEFRAME_LOG_LEVEL": "verbose"})
    with pytest.raises(InvalidRequestError, match="the log level must be"):
        configure("s", "loud", environment={})
