"""`env`: what a bug report needs, and no secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

import dsv4_hal

Tool = Callable[..., Any]


def test_what_a_report_needs(tool: Tool) -> None:
    done = tool("env", "--config", "cpu-exact", "--set", "generate.top_p=0.5")
    assert done.code == 0
    for text in (dsv4_hal.__version__, "torch", "safetensors", "reference", "usable: always available", "cores"):
        assert text in done.out
    assert "configs/runs/cpu-exact.yaml:3:1" in done.out
    assert "--set generate.top_p=0.5" in done.out


@pytest.mark.usefixtures("third")
def test_backends_tell_their_devices_and_what_is_broken(tool: Tool) -> None:
    found = json.loads(tool("env", "--json").out)
    assert found["backend third"] == {"driver": "3.0"}
    assert found["backends"]["broken"].startswith("not usable: backend broken does not load: OSError")
    assert found["packages"]["torch"]
    assert found["run"]["backend"] == {"value": ["auto"], "from": "default"}


def test_no_secrets(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    home = os.path.expanduser("~")
    monkeypatch.setenv("TORCH_API_KEY", "hunter2")
    monkeypatch.setenv("TORCH_HOME", f"{home}/models")
    monkeypatch.setenv("TORCH_HUB", "https://me:hunter2@example.org/hub")
    monkeypatch.setenv("DSV4_HAL_CHAT__MAX_NEW_TOKENS", "77")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    for arguments in (("env",), ("env", "--json")):
        done = tool(*arguments, "--set", f"model={home}/models/flash")
        assert done.code == 0, done.err
        assert "hunter2" not in done.out and "AWS" not in done.out
        assert home not in done.out
        assert done.out.count("77") == 2  # a setting, not a secret
        assert "~/models/flash" in done.out and "(masked)@example.org" in done.out


def test_a_broken_configuration_is_an_error(tool: Tool) -> None:
    done = tool("env", "--set", "mdoe=exact")
    assert done.code == 2
    assert "did you mean mode?" in done.err
