"""Calls Pageframe's gateway with no protos at all: it describes itself (gRPC server reflection).

    python reflect.py HOST:PORT [API_KEY]

Prints the methods of the gateway, then what it serves.
"""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICE = "pageframe.v1.GatewayService"


def main(address: str, key: str = "") -> None:
    """Ask what there is, and call one of it."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    with grpc.insecure_channel(address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName(SERVICE)
        for method in service.methods:
            print(f"{SERVICE}/{method.name}({method.input_type.name})")
        method = service.methods_by_name["ListModels"]
        call: grpc.UnaryUnaryMultiCallable[Message, Message] = channel.unary_unary(
            f"/{SERVICE}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = call(GetMessageClass(method.input_type)(), metadata=metadata, timeout=10)
        print(MessageToJson(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
