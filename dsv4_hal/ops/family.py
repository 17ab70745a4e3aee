"""What every family of ops knows of the object it is resolved on."""

from __future__ import annotations

import torch

from dsv4_hal.numerics import Numerics


class Family:
    """numerics: the profile the ops compute in. device: where their tensors live."""

    numerics: Numerics
    device: torch.device
