"""`chat`: in a pipe, and on a terminal with Ctrl-C, a resize, commands and tools."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.model.tokenizer import load_tokenizer, tokenize
from dsv4_hal.model.transformer import Model

Tool = Callable[..., Any]
EOS = "<｜end▁of▁sentence｜>"
CALL = (
    'I look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="at" string="true">sea'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>" + EOS
)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, small_model: Callable[..., Model]) -> Callable[..., None]:
    """says("text", ...): from now on every checkpoint is a small model that says these texts."""
    tokenizer = load_tokenizer("no such directory", 129280)

    def script(*texts: str) -> None:
        tokens = [token for text in texts for token in tokenize(tokenizer, text)]
        model = small_model(vocab_size=129280)

        def sample(logits: Tensor, *_: Any) -> Tensor:
            return torch.tensor([tokens.pop(0)])

        model.ops.sample = sample  # type: ignore[method-assign]
        monkeypatch.setattr("dsv4_hal.cli.common.load", lambda loaded: model)

    return script


# --- in a pipe ------------------------------------------------------------------------------------------------------


def test_each_line_is_a_message(tool: Tool, says: Callable[..., None], checkpoint: Path) -> None:
    says("hm</think>One." + EOS, "so</think>Two." + EOS)
    done = tool("chat", checkpoint, stdin="first\n\nsecond")
    assert done.code == 0, done.err
    assert done.out == "One.\nTwo.\n"
    assert "hm" in done.err and "so" in done.err
    assert re.search(r"\d+ prompt tokens \(\d+ more reused\)", done.err)


def test_commands(tool: Tool, says: Callable[..., None], checkpoint: Path) -> None:
    says("One." + EOS, "hm</think>Two." + EOS, "</think>Sent." + EOS)
    lines = ["/think none", "/think", "first", "/history", "/clear", "/history", "/think high", "second"]
    done = tool("chat", checkpoint, "--system", "Be brief.", stdin="\n".join([*lines, " /sent", "/exit", "unread"]))
    assert done.code == 0, done.err
    assert done.out == "One.\nTwo.\nSent.\n"  # " /sent" is a message
    assert "think: none; /think none|high|max changes it" in done.err
    assert done.err.count("system content Be brief.") == 2
    assert done.err.count("user content first") == done.err.count("assistant content One.") == 1


def test_tool_calls_are_shown_and_their_results_sent(
    tool: Tool, says: Callable[..., None], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([{"function": {"name": "look", "parameters": {}}}]))
    says(CALL, "Blue." + EOS, CALL, "Fine." + EOS)
    lines = ["what colour?", "blue water", "/history", "again", "", "thanks"]
    done = tool("chat", checkpoint, "--think", "none", "--tools", tmp_path / "tools.json", stdin="\n".join(lines))
    assert done.code == 0, done.err
    call = 'I look.\ncall look({"at": "sea"})\n'
    assert done.out == f"{call}Blue.\n{call}Fine.\n"
    assert "tool content blue water" in done.err
    assert "no result: the tools are not answered" in done.err


def test_control_characters_do_not_steer_a_terminal(
    says: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv4_hal.cli.screen import Screen
    from dsv4_hal.model.encoding import Delta

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    for delta in (
        Delta("reasoning", "a\x1b[2J"),
        Delta("content", "b\x07\n\tc\x9b"),
        Delta("tool_call", "", 0, "f\x1b"),
    ):
        screen.write(delta)
    screen.finish()
    assert capsys.readouterr().out == "(thinking) a␛[2J\nb␇\n\tc�\ncall f␛()\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "error"),
    [
        ((), "/nonsense x", "no such command: /nonsense x; a line that starts with a space is a message"),
        ((), "say <think>", "the user's message: content holds the protocol token <think> at character 4"),
        (("--context", "8"), "a longer message than that", "and the context holds 8"),
        (("--think", "hard"), "", "--think: chat.think: must be 'none', 'high' or 'max', got 'hard'"),
        (("--context", "0"), "", "--context: chat.context: must be greater than or equal to 1, got 0"),
        (("--system", "</think>"), "", "the system's message: content holds the protocol token </think>"),
        (("--tools", "nowhere.json"), "", "nowhere.json"),
    ],
)
def test_bad_input(
    tool: Tool, says: Callable[..., None], checkpoint: Path, arguments: tuple[str, ...], stdin: str, error: str
) -> None:
    says("One." + EOS)
    done = tool("chat", checkpoint, *arguments, stdin=stdin)
    assert done.code == 2
    assert error in " ".join(done.err.split())
    assert done.out == ""


def test_no_input_at_all(tool: Tool, says: Callable[..., None], checkpoint: Path) -> None:
    says()
    done = tool("chat", checkpoint)
    assert (done.code, done.out) == (0, "")


# --- on a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """`dsv4-hal` on a pseudo-terminal of 60 columns."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(60)
        environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "dsv4_hal", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 40) -> str:
        """What is shown until `pattern` is, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} was not shown; seen: {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other side is closed
                    text = self.seen + os.read(self.master, 65536).decode(errors="replace")
                    self.seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)  # colours, modes, moves of the cursor
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown


@pytest.fixture
def terminal(checkpoint: Path) -> Iterator[Terminal]:
    opened = Terminal(
        "chat",
        str(checkpoint),
        "--backend",
        "reference",
        "--think",
        "none",
        "--context",
        "4096",
        "--max-new-tokens",
        "3000",
    )
    yield opened
    with contextlib.suppress(ProcessLookupError):
        os.killpg(opened.process.pid, signal.SIGKILL)
    opened.process.wait()
    os.close(opened.master)


def test_a_conversation_on_a_terminal(terminal: Terminal) -> None:
    """Ctrl-C in an answer keeps it and goes on; so does a resize; earlier lines come back; pastes stay whole."""
    terminal.until(r"4096 tokens of context take [\d.]+ MB.*\n> ")
    terminal.type("a long story\n")
    terminal.until("a long story\r\n.{8}")
    terminal.type("\x03")
    assert "Traceback" not in terminal.until(r"interrupted\r\n.*prompt tokens in .*new tokens.*\r\n.*> ")
    terminal.type("shorter\n")
    terminal.until("shorter\r\n.{4}")
    terminal.resize(33)
    terminal.type("\x03")
    terminal.until(r"interrupted\r\n(.|\r\n)*more(\r\n)? reused(.|\r\n)*> ")
    time.sleep(0.5)  # Python sees a Ctrl-C only once it waits for the line, which is a moment after its prompt
    terminal.type("\x03")
    terminal.until(r"/exit or Ctrl-D leaves\r\n.*> ")
    terminal.type("\x1b[A\x15/history\n")  # up, and erase the line
    shown = terminal.until(r"user content shorter(.|\r\n)*\n> ")
    assert "user content a long story" in shown
    terminal.type("\x1b[200~two\nlines\x1b[201~")
    terminal.type("\n")
    terminal.until("lines\r\n.{4}")
    terminal.type("\x03")
    terminal.until(r"interrupted\r\n(.|\r\n)*> ")
    terminal.type("/history\n")
    terminal.until(r"user content two\r\nlines(.|\r\n)*\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


def test_a_second_ctrl_c_breaks_off_at_once(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("word " * 2500 + "end\n")
    terminal.until("end\r\n")
    time.sleep(0.5)  # the message is being read now, for some seconds
    shown = ""
    for _ in range(20):  # Python takes two within one call of torch for one
        terminal.type("\x03")
        with contextlib.suppress(AssertionError):
            shown = terminal.until(r"before the answer began(.|\r\n)*\n> ", 0.2)
            break
    assert shown and "Traceback" not in shown
    terminal.type("/exit\n")
    assert terminal.process.wait(30) == 0
