"""Beam searches, between domain types and protobuf."""

from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.errors import InvalidRequestError
from pageframe.v1 import sequence_pb2


def beams_to_proto(params: BeamParams) -> sequence_pb2.BeamSearch:
    """Spell out every field."""
    return sequence_pb2.BeamSearch(
        num_beams=params.num_beams,
        length_penalty=params.length_penalty,
        early_stopping=sequence_pb2.EarlyStopping.ValueType(params.early_stopping),
        num_return=params.num_return,
    )


def beams_from_proto(message: sequence_pb2.BeamSearch) -> BeamParams:
    """Read a search; ranges are checked by ``BeamParams.validate``.

    Raises:
        InvalidRequestError: UNKNOWN_EARLY_STOPPING for a value that is not in the contract.
    """
    defaults = BeamParams(num_beams=message.num_beams)
    early_stopping = defaults.early_stopping
    if message.HasField("early_stopping"):
        try:
            early_stopping = EarlyStopping(message.early_stopping)
        except ValueError:
            raise InvalidRequestError(
                "UNKNOWN_EARLY_STOPPING",
                f"early_stopping {message.early_stopping} is none of the values of the contract",
                early_stopping=message.early_stopping,
            ) from None
    return BeamParams(
        num_beams=message.num_beams,
        length_penalty=(
            message.length_penalty
            if message.HasField("length_penalty")
            else defaults.length_penalty
        ),
        early_stopping=early_stopping,
        num_return=message.num_return if message.HasField("num_return") else defaults.num_return,
    )
