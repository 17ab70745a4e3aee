"""Chat encoding: messages to the prompt's text, and the text of a completion to a message."""

from dsv4_hal.model.encoding.encode import encode_messages
from dsv4_hal.model.encoding.parse import CompletionError, CompletionParser, Delta, parse_completion
from dsv4_hal.model.encoding.protocol import (
    Protocol,
    escape_protocol_tokens,
    find_protocol_token,
    load_protocol,
    protocol_versions,
)

__all__ = [
    "CompletionError",
    "CompletionParser",
    "Delta",
    "Protocol",
    "encode_messages",
    "escape_protocol_tokens",
    "find_protocol_token",
    "load_protocol",
    "parse_completion",
    "protocol_versions",
]
