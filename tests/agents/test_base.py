"""What all agents share and no one agent's test shows."""

from __future__ import annotations

import pytest
import torch
from stubs import spec, stubbed
from torch import nn

from offrl.agents.bc import BC


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3, 2))


def test_a_network_with_a_buffer_is_refused():
    """Its values are not in the state, and the modules' own are on the meta device."""
    with pytest.raises(TypeError, match="actor: frequencies is a buffer"):
        stubbed(BC, BC.Config(), spec(3, 2), actor=Buffered)
