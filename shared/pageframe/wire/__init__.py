"""Conversions between domain types and protobuf; protobuf stops here."""
