"""What the doubles of this project's servers need to read a stream of orders."""


def each(messages):
    """The orders in some messages, one by one; such as hold several are taken apart."""
    for message in messages:
        if message.HasField("orders"):
            yield from each(message.orders.orders)
        else:
            yield message
