"""Networks whose answers are known, in the place of an agent's own, and rows to call its losses with, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offrl.core.rng import Noise
from offrl.core.space import Box
from offrl.core.tree import tree_map
from offrl.core.types import Spec, Transitions


class Fixed:
    """A source that gives the same rows at every step."""

    def __init__(self, batch: Transitions, period: int):
        self.batches, self.batch_size = [batch] * period, len(batch.mask)

    def __call__(self, step, act=None):
        return self.batches


class Linear(nn.Module):
    """Twin critics Q_j(s, a) = slope_j . a + level_j."""

    def __init__(self, slope, level=(0.0, 0.0)):
        super().__init__()
        self.slope = nn.Parameter(torch.as_tensor(slope, dtype=torch.float64).expand(2, -1).clone())
        self.level = nn.Parameter(torch.as_tensor(level, dtype=torch.float64))

    def forward(self, obs: Tensor, action: Tensor, member: int | None = None) -> Tensor:
        values = self.slope @ action.T + self.level[:, None]
        return values if member is None else values[member]


class Level(nn.Module):
    """A state value that is the same everywhere."""

    def __init__(self, level: float = 0.0):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level, dtype=torch.float64))

    def forward(self, obs: Tensor) -> Tensor:
        return self.level.expand(len(obs))


class Table(nn.Module):
    """An actor that gives these actions, row by row, whatever it sees."""

    def __init__(self, action: Tensor):
        super().__init__()
        self.action = nn.Parameter(action.clone())

    def forward(self, obs: Tensor) -> Tensor:
        return self.action


def spec(obs: int, action: int) -> Spec:
    return Spec(Box.of(obs), Box.of(action, -1, 1))


def stubbed(kind: type, config, spec: Spec, **networks: Callable[[], nn.Module]):
    """The agent with some of its groups' networks replaced."""

    class Stubbed(kind):
        def networks(self):
            return super().networks() | {group: make() for group, make in networks.items()}

    return Stubbed(config, spec)


def start(agent, seed: int = 0):
    return tree_map(torch.Tensor.double, agent.init(seed))


def draws(agent, batch: int, seed: int = 0):
    """Noise of one update, in float64."""
    return Noise(agent.noise(batch), seed, dtype=torch.float64)(0)


def rollout(steps: int, envs: int, seed: int = 0, **columns) -> Transitions:
    """Random rows as a rollout (steps, envs, ...), in which time limits occur."""
    g = torch.Generator().manual_seed(seed + 1)
    truncated = (torch.rand(steps * envs, generator=g) < 0.2).double()
    made = rows(steps * envs, seed=seed, **{"truncated": truncated} | columns)
    return Transitions(*(None if c is None else c.unflatten(0, (steps, envs)) for c in made))


def rows(batch: int, n: int = 3, d: int = 2, seed: int = 0, **columns) -> Transitions:
    """Random rows; a column that is given stands for the drawn one, a number for a constant column."""
    g = torch.Generator().manual_seed(seed)
    drawn = {
        "obs": torch.randn(batch, n, generator=g, dtype=torch.float64),
        "action": 2 * torch.rand(batch, d, generator=g, dtype=torch.float64) - 1,
        "reward": torch.randn(batch, generator=g, dtype=torch.float64),
        "next_obs": torch.randn(batch, n, generator=g, dtype=torch.float64),
        "mask": (torch.rand(batch, generator=g) < 0.7).double(),
    }
    given = {k: v if isinstance(v, Tensor) else torch.full((batch,), float(v), dtype=torch.float64) for k, v in columns.items()}
    return Transitions(**drawn | given)
