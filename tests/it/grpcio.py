"""Job: ask a sidecar's admin port as any client of gRPC would that has never seen proto/admin.proto.
Input: an address, the CA, a certificate, its key; a link to pause and resume. Output: one JSON object: services, status and statuses, what the
changes were answered with, or the refusal.
Always true: what is known of the service comes from its reflection."""

import json
import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

FIELD = descriptor_pb2.FieldDescriptorProto
REFLECTION = "grpc.reflection.v1alpha"
ADMIN = "etcd_ferry.admin.v1"


def reflection_file():
    """As much of the reflection's own messages as is needed here."""
    file = descriptor_pb2.FileDescriptorProto(name="reflection.proto", package=REFLECTION, syntax="proto3")

    def message(name, *fields, one_of=None):
        made = file.message_type.add(name=name)
        if one_of:
            made.oneof_decl.add(name=one_of)
        for field, number, kind, repeated in fields:
            label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                made.field.add(name=field, number=number, type=FIELD.TYPE_MESSAGE, type_name=f".{REFLECTION}.{kind}", label=label)
            else:
                made.field.add(name=field, number=number, type=kind, label=label)
            if one_of:
                made.field[-1].oneof_index = 0

    text, raw = FIELD.TYPE_STRING, FIELD.TYPE_BYTES
    # Without the choice an empty text would not be sent.
    message("Request", ("file_containing_symbol", 4, text, False), ("list_services", 7, text, False), one_of="message_request")
    message("Files", ("file_descriptor_proto", 1, raw, True))
    message("Service", ("name", 1, text, False))
    message("Services", ("service", 1, "Service", True))
    message("Response", ("files", 4, "Files", False), ("services", 6, "Services", False))
    return file


class Client:
    def __init__(self, channel):
        self.channel, self.pool = channel, descriptor_pool.DescriptorPool()
        self.pool.Add(reflection_file())

    def message(self, name):
        found = self.pool.FindMessageTypeByName(name)
        if hasattr(message_factory, "GetMessageClass"):
            return message_factory.GetMessageClass(found)
        return message_factory.MessageFactory(self.pool).GetPrototype(found)

    def reflect(self, **question):
        request, response = self.message(f"{REFLECTION}.Request"), self.message(f"{REFLECTION}.Response")
        call = self.channel.stream_stream(
            f"/{REFLECTION}.ServerReflection/ServerReflectionInfo",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return next(call(iter([request(**question)]), timeout=20))

    def method(self, kind, name, request, reply):
        request, reply = self.message(f"{ADMIN}.{request}"), self.message(f"{ADMIN}.{reply}")
        call = kind(f"/{ADMIN}.Admin/{name}", request_serializer=request.SerializeToString, response_deserializer=reply.FromString)
        return lambda **fields: call(request(**fields), timeout=20)


def told(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def main(address, ca, cert, key, link=None):
    def read(path):
        with open(path, "rb") as file:
            return file.read()

    credentials = grpc.ssl_channel_credentials(read(ca), read(key), read(cert))
    # The certificate names the region and localhost, and no address.
    options = [("grpc.ssl_target_name_override", "localhost")]
    with grpc.secure_channel(address, credentials, options) as channel:
        client = Client(channel)
        services = [service.name for service in client.reflect(list_services="").services.service]
        for file in client.reflect(file_containing_symbol=f"{ADMIN}.Admin").files.file_descriptor_proto:
            client.pool.Add(descriptor_pb2.FileDescriptorProto.FromString(file))
        status = client.method(channel.unary_unary, "Status", "StatusRequest", "StatusReply")()
        watch = client.method(channel.unary_stream, "WatchStatus", "WatchStatusRequest", "StatusReply")(interval_ms=100)
        statuses = [told(next(watch)) for _ in range(2)]
        watch.cancel()
        answer = {"services": services, "status": told(status), "statuses": statuses}
        if link is not None:
            for name, call in (("paused", "Pause"), ("resumed", "Resume")):
                change = client.method(channel.unary_unary, call, f"{call}Request", f"{call}Reply")
                answer[name] = told(change(link=link))
        return answer


try:
    answer = main(*sys.argv[1:])
except grpc.RpcError as error:
    answer = {"refused": error.code().name, "details": error.details()}
print(json.dumps(answer))
