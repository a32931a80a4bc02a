"""Optimal costs of the systems whose optimum is known, in the simulator's accounting: for a period, what is in transit costing nothing.

An order with lead time L serves the demand of L periods on, so that one store's position covers L + 1 demands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch


class Optimum(NamedTuple):
    cost: float  # of a period
    levels: tuple[float, ...]  # base-stock levels that attain it, one for each node, upstream first


def newsvendor_normal(mean: float, std: float, lead_time: int, holding: float, underage: float) -> Optimum:
    """One store, backlogged Normal demand: the level is the quantile p / (p + h) of L + 1 periods' demand."""
    spread = std * math.sqrt(lead_time + 1)
    z = NormalDist().inv_cdf(underage / (underage + holding))
    return Optimum((underage + holding) * NormalDist().pdf(z) * spread, ((lead_time + 1) * mean + z * spread,))


def newsvendor_poisson(mean: float, lead_time: int, holding: float, underage: float) -> Optimum:
    """One store, backlogged Poisson demand: the smallest whole level whose probability of sufficing is p / (p + h) or more."""
    chance = poisson_pmf((lead_time + 1) * mean)
    level = int(np.searchsorted(chance.cumsum(), underage / (underage + holding)))
    left = level - np.arange(len(chance))
    return Optimum(float(chance @ np.where(left > 0, holding * left, -underage * left)), (float(level),))


def poisson_pmf(mean: float) -> np.ndarray:
    """Probabilities of 0, 1, ... up to where next to nothing is left."""
    counts = np.arange(int(mean + 12 * math.sqrt(mean) + 25))
    return np.exp(counts * math.log(mean) - mean - np.array([math.lgamma(k + 1) for k in counts]))


def lost_sales(mean: float, lead_time: int, holding: float, underage: float, tolerance: float = 2e-6) -> float:
    """One store, Poisson demand that is lost when not met: the least mean cost, by relative value iteration (Zipkin 2008).

    The state is what is on hand and what arrives in the next L - 1 periods. Stock goes up to the backlog system's level, which an optimal
    position does not exceed, and orders up to a limit that is raised until no optimal order attains it. Time and memory grow with the
    limit to the power L.
    """
    most = int(newsvendor_poisson(mean, lead_time, holding, underage).levels[0])
    limit = int(newsvendor_poisson(mean, 0, holding, underage).levels[0])
    while True:
        cost, largest = _value_iteration(poisson_pmf(mean), lead_time, holding, underage, most, limit, tolerance)
        if largest < limit or limit >= most:
            return cost
        limit += 1


def _value_iteration(
    chance: np.ndarray, lead_time: int, holding: float, underage: float, most: int, limit: int, tolerance: float
) -> tuple[float, int]:
    """The mean cost to within `tolerance`, and the largest order where the position is at most `most`."""
    stock = np.arange(most + 1)
    left = stock[:, None] - np.arange(len(chance))
    cost = np.where(left > 0, holding * left, -underage * left) @ chance
    move = np.zeros((most + 1, limit + 1, most + 1))  # on hand, arriving next -> on hand then
    for arriving in range(limit + 1):
        following = np.minimum(np.maximum(left, 0) + arriving, most)
        for x in stock:
            move[x, arriving] = np.bincount(following[x], chance, most + 1)
    move = move.reshape(-1, most + 1)
    shape, value = (most + 1,) + (limit + 1,) * lead_time, np.zeros((most + 1, (limit + 1) ** (lead_time - 1)))
    cost = cost.reshape(-1, *[1] * (lead_time - 1))
    while True:
        ahead = (move @ value).reshape(shape)  # axes: on hand, arriving in 1, ..., L - 1 periods, order; where L = 1, on hand and order
        new = (cost + ahead.min(-1)).reshape(value.shape)
        change = new - value
        value = new - new.flat[0]
        if np.ptp(change) < tolerance:
            position = np.indices(shape[:-1]).sum(0)
            return float(change.max() + change.min()) / 2, int(ahead.argmin(-1)[position <= most].max())


def clark_scarf(
    lead_times: Sequence[int], holding: Sequence[float], underage: float, mean: float, std: float, step: float = 0.02
) -> Optimum:
    """A serial system, backlogged Normal demand clipped at 0: the recursion of Clark & Scarf (1960), convolved on a grid of that step.

    lead_times and holding go upstream first, as nodes do, the store's last. levels are of echelon positions: what a node has on hand, all
    that is on its way to it, and all that is downstream of it, less backlog.
    """
    lead_times, (store_holding, *_) = lead_times[::-1], holding[::-1]
    rates = -np.diff([*holding[::-1], 0.0])  # echelon holding costs, store first
    one = _clipped_normal(mean, std, step)
    expected = float(one @ np.arange(len(one))) * step
    periods = sum(lead_times) + 1
    high = int((expected * periods + 8 * std * math.sqrt(periods)) / step)
    chances = [_convolved(one, lead_times[0] + 1), *(_convolved(one, k) for k in lead_times[1:])]
    widths = [len(chance) - 1 for chance in chances]
    lows = -np.cumsum(widths[::-1])[::-1]  # where each stage's costs to go begin, so that the last's is at 0

    x = np.arange(lows[0], high + 1) * step
    to_go, levels = (underage + store_holding) * np.maximum(-x, 0), []
    for rate, lead_time, chance, low in zip(rates, lead_times, chances, [*lows[1:], 0]):
        y = np.arange(low, high + 1)
        cost = rate * (y * step - (lead_time + 1) * expected) + np.convolve(to_go, chance, "valid")
        levels.append(int(y[cost.argmin()]))
        to_go = cost[np.minimum(y, levels[-1]) - low]
    transit = sum(h * k * expected for h, k in zip(holding[-2::-1], lead_times))
    return Optimum(float(cost.min() - transit), tuple(level * step for level in levels[::-1]))


def _clipped_normal(mean: float, std: float, step: float) -> np.ndarray:
    """Probabilities of 0, step, 2 step, ... for Normal demand clipped at 0, each point standing for what is nearest to it."""
    edges = torch.arange(int((mean + 8 * std) / step) + 1, dtype=torch.float64) + 0.5
    below = torch.special.ndtr((edges * step - mean) / std).numpy()
    return np.diff(below, prepend=0.0)


def _convolved(chance: np.ndarray, times: int) -> np.ndarray:
    """The distribution of a sum, without its tail of less than 1e-12."""
    total = np.ones(1)
    for _ in range(times):
        total = np.convolve(total, chance)
        total = total[: int(np.searchsorted(total.cumsum(), total.sum() - 1e-12)) + 1]
    return total


def transshipment_bound(covariance: np.ndarray, store_lead_time: int, warehouse_lead_time: int, holding: float, underage: float) -> float:
    """No policy of a warehouse without stock and stores of equal cost and lead time does better for each store (Federgruen & Zipkin 1984).

    covariance (n, n) of the stores' Normal demand. The bound lets stock move freely between stores.
    """
    z, stores = NormalDist().inv_cdf(underage / (underage + holding)), len(covariance)
    variance = (store_lead_time + 1) * np.sqrt(np.diag(covariance)).sum() ** 2 + warehouse_lead_time * covariance.sum()
    return (underage + holding) * NormalDist().pdf(z) * math.sqrt(variance) / stores
