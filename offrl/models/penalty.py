"""How little an ensemble knows of what it predicts: the penalties u(obs, action) of offline model-based RL, by name.

Each takes what the members' diagonal Gaussians predict, mean and std (members, ..., dims), and gives u (...,) >= 0, in the units of
std unless it says otherwise. Lu et al. 2022, "Revisiting design choices in offline model-based RL" (arXiv 2110.04135) compares the
families; the papers' formulas and what is computed in released code under the same names differ, so each stands under a name of its own.

With mu* the mean of the means, V* = mean_i(std_i^2) + the population variance of the means: the variance of the members' mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from offrl.core.config import nearest
from offrl.losses import gaussian_log_prob

FLOOR = 1e-6  # smaller standard deviations count as this one wherever a density is taken, in the units that are given


def total_variance(mean: Tensor, std: Tensor) -> Tensor:
    """V* (..., dims) of mean and std (members, ..., dims), in squared units."""
    return std.square().mean(0) + (mean - mean.mean(0)).square().mean(0)


def max_covariance_norm(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """max_i ||diag(std_i^2)||_F, in squared units."""
    return vector_norm(std.square(), dim=-1).amax(0)


def max_std_norm(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """max_i ||std_i||."""
    return vector_norm(std, dim=-1).amax(0)


def max_pair_distance(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """max_ij ||mu_i - mu_j||."""
    return torch.stack([vector_norm(mean - one, dim=-1).amax(0) for one in mean]).amax(0)


def max_deviation(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """max_i ||mu_i - mu*||, which is between half of max_pair_distance and all of it."""
    return vector_norm(mean - mean.mean(0), dim=-1).amax(0)


def ensemble_std(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """||sqrt(V*)||: the root of ensemble_variance, so the two rank alike and are not linear in each other."""
    return total_variance(mean, std).sum(-1).sqrt()


def ensemble_variance(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """The sum of V* over dims, in squared units."""
    return total_variance(mean, std).sum(-1)


def rms_std_of_means(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """sqrt of the mean over dims of the population variance of the means; what the members call noise does not count."""
    return mean.var(0, correction=0).mean(-1).sqrt()


def average_std(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """The mean over dims of sqrt(mean_i(std_i^2) + the unbiased variance of the means); one member's means have none."""
    return (std.square().mean(0) + mean.var(0, correction=min(1, len(mean) - 1))).sqrt().mean(-1)


def loo_kl(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """The mean over members of `loo_kls`."""
    return loo_kls(mean, std).mean(0)


def ll_variance(mean: Tensor, std: Tensor, sample: Tensor | None = None) -> Tensor:
    """The population variance over members of log N(sample; mu_i, std_i^2), without a unit and heavy-tailed.

    sample (..., dims). Standard deviations below FLOOR count as FLOOR. Raises ValueError without a sample.
    """
    if sample is None:
        raise ValueError("ll_variance needs the sampled next observation")
    return gaussian_log_prob(sample, mean, std.clamp_min(FLOOR).log()).var(0, correction=0)


def loo_kls(mean: Tensor, std: Tensor) -> Tensor:
    """(members, ...): of each member, KL(N(mu_i, std_i^2) || N(mu*, V*) of all the others), without a unit.

    Standard deviations below FLOOR count as FLOOR. Raises ValueError for a single member.
    """
    if len(mean) < 2:
        raise ValueError("loo_kl compares a member with the others: it needs two members or more, not one")
    std, kls = std.clamp_min(FLOOR), []
    for i in range(len(mean)):
        others = [j for j in range(len(mean)) if j != i]
        variance = total_variance(mean[others], std[others])
        ratio, shift = std[i].square() / variance, (mean[i] - mean[others].mean(0)).square() / variance
        kls.append(0.5 * (ratio - 1 - ratio.log() + shift).sum(-1))
    return torch.stack(kls)


def member_loo_kl(mean: Tensor, std: Tensor, member: Tensor) -> Tensor:
    """(...,): in each row the one of `loo_kls` that belongs to `member` (...,) int64, as M2AC takes the member that was sampled."""
    return loo_kls(mean, std).gather(0, member[None]).squeeze(0)


@dataclass(frozen=True)
class Penalty:
    """What a penalty is: its function of (mean, std, sample), what it is taken over, and what it needs."""

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dims: Literal["obs", "obs and reward"]
    about: str
    source: str
    members: int = 1  # at least
    sample: bool = False


_LU = "Lu et al. 2022"
PENALTIES: dict[str, Penalty] = {
    entry.function.__name__: entry
    for entry in (
        Penalty(max_covariance_norm, "obs and reward", "largest Frobenius norm of a member's covariance", "MOPO, Yu et al. 2020, 4.3"),
        Penalty(max_std_norm, "obs and reward", "largest norm of a member's std", "MOPO's code; OfflineRL-Kit's `aleatoric`"),
        Penalty(max_pair_distance, "obs", "largest distance between two means", "MOReL, Kidambi et al. 2020"),
        Penalty(max_deviation, "obs", "largest distance of a mean from their mean", "OfflineRL-Kit's `pairwise-diff`"),
        Penalty(ensemble_std, "obs and reward", "norm of the mixture's std", _LU),
        Penalty(ensemble_variance, "obs and reward", "summed variance of the mixture", _LU),
        Penalty(rms_std_of_means, "obs", "root mean variance of the means", "OfflineRL-Kit's `ensemble_std`"),
        Penalty(average_std, "obs", "mean std of the mixture, unbiased", "a PyTorch port of MOPO with Lu et al.'s automatic weight"),
        Penalty(loo_kl, "obs and reward", "KL of a member from all others, averaged", "M2AC, Pan et al. 2020", members=2),
        Penalty(ll_variance, "obs", "variance of the sample's log-likelihood", _LU, sample=True),
    )
}
Kind = Literal[tuple(PENALTIES)]  # type: ignore[valid-type]


def penalty(kind: str, mean: Tensor, std: Tensor, sample: Tensor | None, obs_size: int, scale: Tensor | None = None) -> Tensor:
    """u (...,) by its name in PENALTIES, over the dims and in the units that it is meant for.

    mean, std (members, ..., dims) and sample (..., dims) are of the next observation, `obs_size` numbers, then the rewards. `scale`
    (dims,) are the standard deviations, in the data, of what is predicted (changes of observations, and rewards): u is then of
    mean / scale and so on, and does not change with the units of the data. Without it u is raw, and large numbers outweigh small ones;
    a weight means nothing without saying which. Raises ValueError for an unknown kind, and for too few members or no sample.
    """
    if kind not in PENALTIES:
        raise ValueError(f"no penalty {kind!r}{nearest(kind, PENALTIES)}")
    chosen = PENALTIES[kind]
    dims = slice(obs_size if chosen.dims == "obs" else None)
    parts = [x if x is None else x[..., dims] if scale is None else x[..., dims] / scale[dims] for x in (mean, std, sample)]
    return chosen.function(*parts)


def auto_weight(log_weight: Tensor, penalty_mean: Tensor, target: float, lr: float) -> Tensor:
    """The next log(lambda), a dual step by which lambda * E[u] tracks `target` > 0 (Lu et al. 2022): lambda falls while it is above.

    The error is taken relative to the target and not below -1, so a step is `lr` at most, whatever the units of u: while u is 0,
    lambda grows by the factor exp(lr). Raises ValueError for a target that is not positive.
    """
    if not target > 0:
        raise ValueError(f"the target of lambda * u must be positive, not {target:g}")
    return log_weight + lr * (1 - log_weight.exp() * penalty_mean / target).clamp_min(-1)
