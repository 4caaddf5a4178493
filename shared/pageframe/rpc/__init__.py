"""Servers, channels, status and health: what every gRPC process does alike."""
