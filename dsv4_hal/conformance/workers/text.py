"""Words that several outputs share."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def one_line(text: str) -> str:
    """For lists, where a message of several lines would end its item."""
    return " ".join(text.split())


def in_markdown(text: str) -> str:
    """On one line, and no HTML."""
    return one_line(text).replace("<", "&lt;")
