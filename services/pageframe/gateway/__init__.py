"""The stateless door: text in, tokens over the wire, text out."""
