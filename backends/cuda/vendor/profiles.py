"""The numeric profile that the libraries hold: the published one, with scores of the indexer summed in float32."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4_hal.numerics import deployed

DEEPGEMM = replace(deployed(), mode="deepgemm", score=torch.float32)
