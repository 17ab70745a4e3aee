"""`generate`: outputs, errors, exit codes; texts and conversations."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tool = Callable[..., Any]
TOOL = [sys.executable, "-m", "dsv4_hal"]


def call(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TOOL, *map(str, arguments)], capture_output=True, text=True, input=stdin, timeout=120, check=False
    )


def test_generate_is_repeatable_and_says_that_weights_are_random(tool: Tool, checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "--prompt", "The sea is", "--max-new-tokens", 6)
    first, second = call(*arguments), tool(*arguments)  # a new process, and one that has been used
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.out
    assert first.stdout.strip()
    assert "weights are random" in first.stderr
    assert "4 prompt tokens" in first.stderr
    assert "6 new tokens" in first.stderr
    assert "tokens/s" in first.stderr


def test_generate_draws_by_seed(tool: Tool, checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "--prompt", "-", "--max-new-tokens", 5, "--temperature", 1.0, "--top-p", 0.9)
    a = call(*arguments, "--seed", 1, stdin="海 is 深い")
    b, c = (tool(*arguments, "--seed", seed, stdin="海 is 深い") for seed in (1, 2))
    assert a.returncode == 0, a.stderr
    assert a.stdout == b.out != c.out


def test_exact_mode_and_an_empty_prompt(tool: Tool, checkpoint: Path) -> None:
    done = tool("generate", checkpoint, "--prompt", "", "--max-new-tokens", 2, "--mode", "exact")
    assert done.code == 0, done.err
    assert "reference, exact: 1 prompt tokens" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--backend", "nope"), 3, "no backend is called 'nope'; registered: ascend, cuda, cuda-vendor, null"),
        (("--backend", "null"), 2, "computes shapes, not values"),
        (("--mode", "fast"), 2, "--mode: mode: must be exact, deployed, a3, a5 or deepgemm, got 'fast'"),
        (("--top-p", "0"), 2, "--top-p: generate.top_p: must be greater than 0, got 0.0"),
        (("--temperature", "inf"), 2, "--temperature: generate.temperature: must be a finite number, got inf"),
        (("--temperature", "-1"), 2, "--temperature: generate.temperature: must be greater than or equal to 0"),
        (("--max-new-tokens", "0"), 2, "--max-new-tokens: generate.max_new_tokens: must be greater than or equal to 1"),
        (("--max-new-tokens", "70000"), 2, "exceed the model's 65536 positions"),
        (("--device", "nonsense"), 3, "device 'nonsense' cannot be used"),
        (("--device", "cuda"), 3, "device 'cuda' cannot be used"),
        (("--set", "generate.tpo_p=1"), 2, "unknown key generate.tpo_p; did you mean generate.top_p?"),
        (("--messages", "m.json"), 2, "give one of --prompt and --messages"),
        (("--think", "max"), 2, "--think goes with --messages"),
        (("--json",), 2, "--json goes with --messages"),
    ],
)
def test_bad_options(tool: Tool, checkpoint: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = tool("generate", checkpoint, "--prompt", "x", *arguments)
    assert done.code == code, done.err
    assert text in " ".join(done.err.split())


def test_settings_come_from_a_file_too(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {checkpoint}\nmode: exact\ngenerate: {{max_new_tokens: 2}}\n")
    done = tool("generate", "--prompt", "x", "--config", file, "--show-config")
    assert done.code == 0, done.err
    assert "reference, exact: 2 prompt tokens" in done.err and ", 2 new tokens" in done.err
    assert f"{file}:3:12" in done.err


def test_without_a_model_or_with_a_preset(tool: Tool) -> None:
    assert "no model: name a checkpoint directory" in tool("generate", "--prompt", "x").err
    preset = tool("generate", "v4-flash", "--prompt", "x")
    assert preset.code == 2
    assert "v4-flash is a preset: it has shapes but no weights" in preset.err


def test_a_checkpoint_of_its_own_tokenizer(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "tokenizer.json").write_text("{")
    done = tool("generate", copy, "--prompt", "x")
    assert done.code == 2
    assert "tokenizer.json is not a tokenizer" in done.err


def test_not_a_checkpoint(tool: Tool, tmp_path: Path) -> None:
    for directory, text in ((tmp_path / "nowhere", "nowhere"), (tmp_path, "config.json")):
        done = tool("generate", directory, "--prompt", "x")
        assert done.code == 2
        assert text in done.err
        assert "Traceback" not in done.err


def test_interrupt_keeps_what_was_said(checkpoint: Path) -> None:
    arguments = [
        *TOOL,
        "generate",
        str(checkpoint),
        "--backend",
        "reference",
        "--prompt",
        "x",
        "--max-new-tokens",
        "20000",
    ]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), True)
        first = process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert first
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors


# --- conversations --------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def save(path: Path, value: object) -> Path:
    (path / "messages.json").write_text(json.dumps(value))
    return path / "messages.json"


def test_messages_are_answered(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("generate", checkpoint, "--messages", save(tmp_path, MESSAGES), "--max-new-tokens", 3)
    thought, direct = tool(*arguments), tool(*arguments, "--think", "none")
    assert (thought.code, direct.code) == (0, 0), thought.err
    assert thought.out.strip() == ""  # a random model never stops thinking, and thoughts are not the answer
    assert direct.out.strip()
    assert "cut off after 3 tokens" in direct.err
    assert "reference, deployed: 8 prompt tokens" in direct.err
    answer = json.loads(tool(*arguments, "--json").out)
    message = answer["message"]
    assert answer["end"] == "length"
    assert (message["role"], message["content"], message["tool_calls"]) == ("assistant", "", [])
    assert message["reasoning_content"]
    piped = tool("generate", checkpoint, "--messages", "-", "--max-new-tokens", 3, "--json", stdin=json.dumps(MESSAGES))
    assert json.loads(piped.out) == answer


def test_messages_with_tools(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    arguments = ("--max-new-tokens", 1, "--think", "none")
    plain = tool("generate", checkpoint, "--messages", save(tmp_path, {"messages": MESSAGES}), *arguments)
    given = tool(
        "generate", checkpoint, "--messages", save(tmp_path, {"messages": MESSAGES, "tools": tools}), *arguments
    )
    assert plain.code == given.code == 0, given.err
    count = [int(re.search(r"(\d+) prompt tokens", done.err)[1]) for done in (plain, given)]  # type: ignore[index]
    assert count[1] > count[0] + 100  # the protocol's text about tools


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", "messages.json: cannot be read as JSON"),
        ('[{"role": "user", "role": "tool"}]', "messages.json: cannot be read as JSON: key role stands twice"),
        ('[{"role": "user", "content": ' + "1" * 5000 + "}]", "messages.json: cannot be read as JSON: Exceeds"),
        ('[{"role": "user", "content": "\\ud800"}]', "messages[0]: content is not valid Unicode at character 0"),
        ('[{"role": "system", "content": "only"}]', "awaits no answer"),
        ("3", "messages.json: must be a list of messages, or an object"),
        ("[]", "messages.json: no messages"),
        ("[3]", "messages.json: messages must be a list of objects"),
        ('{"messages": [], "tool": []}', "messages.json: unknown key tool"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 3}', "tools must be a list of objects"),
        ('[{"role": "usr", "content": "x"}]', "usr"),
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]', "awaits no answer"),
        (
            '[{"role": "user", "content": "a <think>"}]',
            "messages[0]: content holds the protocol token <think> at chara",
        ),
    ],
)
def test_bad_messages(tool: Tool, checkpoint: Path, tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "messages.json"
    file.write_text(text)
    done = tool("generate", checkpoint, "--messages", file)
    assert done.code == 2
    assert error in " ".join(done.err.split())


def test_protocol_tokens_can_be_escaped(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    file = save(tmp_path, [{"role": "user", "content": "a <think>"}])
    done = tool("generate", checkpoint, "--messages", file, "--protocol-tokens", "escape", "--max-new-tokens", 1)
    assert done.code == 0, done.err


def test_missing_messages(tool: Tool, checkpoint: Path) -> None:
    done = tool("generate", checkpoint, "--messages", "nowhere.json")
    assert done.code == 2
    assert "nowhere.json: no such file" in done.err


def test_the_system_message_may_come_from_the_run(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("generate", checkpoint, "--set", "chat.system=Be brief.", "--max-new-tokens", 1, "--messages")
    done = tool(*arguments, save(tmp_path, MESSAGES[1:]))
    assert "8 prompt tokens" in done.err, done.err
    both = tool(*arguments, save(tmp_path, MESSAGES))
    assert both.code == 2 and "leave one out" in both.err
