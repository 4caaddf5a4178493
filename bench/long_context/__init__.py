"""Chats of 32k tokens on a pool that holds two of them."""
