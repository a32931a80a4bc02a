"""Forecasts of the demand that an order has to cover: quantiles of the sum over its lead time and one period more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from offrl.core.rng import generator
from offrl.envs.inventory.scenario import Observation
from offrl.nn.layers import MLP

Forecast = Callable[[Observation, Tensor, Tensor], Tensor]  # obs, level (., S) in (0, 1), lead time (1|B, S) -> quantile (B, S)


def rolling_normal(obs: Observation, level: Tensor, lead_time: Tensor) -> Tensor:
    """The quantile of a Normal with the mean and deviation of the window of past demand, independent from period to period."""
    periods = (lead_time + 1).to(obs.past.dtype)
    return periods * obs.past.mean(-1) + torch.special.ndtri(level) * obs.past.std(-1, correction=0) * periods.sqrt()


class QuantileForecaster(nn.Module):
    """A multilayer perceptron from past demand and calendar to the quantiles .05, .10, ..., .95, for each of a few lead times.

    Demand goes in and comes out in units of the window's mean absolute demand, so that series of any size share the weights.
    """

    def __init__(self, lead_times: Sequence[int], window: int = 16, calendar: int = 1, hidden: Sequence[int] = (128, 128)):
        super().__init__()
        self.window, self.count = window, 19
        self.net = MLP([window + calendar, *hidden, self.count * len(lead_times)])
        self.register_buffer("lead_times", torch.tensor(sorted(lead_times)))
        self.register_buffer("levels", torch.arange(1, self.count + 1) / (self.count + 1))

    def quantiles(self, past: Tensor, calendar: Tensor) -> Tensor:
        """(..., lead times, 19) from past (..., window) and calendar (..., C)."""
        scale = _scale(past)
        out = self.net(torch.cat([past / scale, calendar.expand(*past.shape[:-1], -1)], -1))
        return out.unflatten(-1, (len(self.lead_times), self.count)) * scale[..., None]

    def forward(self, obs: Observation, level: Tensor, lead_time: Tensor) -> Tensor:
        """A Forecast: linear between the quantiles, and the outermost ones beyond them. Lead times are to be among its own."""
        table = self.quantiles(obs.past, obs.calendar[:, None])
        row = torch.searchsorted(self.lead_times, lead_time.contiguous()).expand(table.shape[:2])
        table = table.take_along_dim(row[..., None, None], 2).squeeze(2)
        place = (level.expand(table.shape[:2]) * (self.count + 1) - 1).clamp(0, self.count - 1)
        below = place.detach().floor().clamp_max(self.count - 2).long()
        low, high = (table.take_along_dim((below + i)[..., None], 2).squeeze(2) for i in (0, 1))
        return low + (place - below) * (high - low)

    def loss(self, past: Tensor, calendar: Tensor, total: Tensor) -> Tensor:
        """The mean pinball loss of totals (..., lead times), in units of the window's mean."""
        error = (total[..., None] - self.quantiles(past, calendar)) / _scale(past)[..., None]
        return torch.maximum(self.levels * error, (self.levels - 1) * error).mean()

    def fit(self, demand: Tensor, calendar: Tensor, steps: int = 2000, batch_size: int = 1024, lr: float = 1e-3, seed: int = 0) -> Tensor:
        """Adam on windows of demand (n, T) and calendar (T, C), drawn at random; the losses (steps,). Raises ValueError for a short T."""
        ahead = int(self.lead_times[-1]) + 1
        places = demand.shape[1] - self.window - ahead + 1
        if places < 1:
            raise ValueError(f"{demand.shape[1]} periods hold no window of {self.window} with {ahead} periods after it")
        source, optimiser, losses = generator(seed, "forecaster"), torch.optim.Adam(self.parameters(), lr), []
        sums = torch.nn.functional.pad(demand.double().cumsum(1), (1, 0))
        for _ in range(steps):
            row = torch.randint(len(demand), (batch_size,), generator=source)
            t = torch.randint(places, (batch_size,), generator=source) + self.window
            past = demand[row[:, None], t[:, None] + torch.arange(-self.window, 0)]
            total = (sums[row[:, None], t[:, None] + self.lead_times + 1] - sums[row, t][:, None]).to(demand.dtype)
            loss = self.loss(past, calendar[t], total)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses)


def _scale(past: Tensor) -> Tensor:
    return past.abs().mean(-1, keepdim=True) + 1e-3
