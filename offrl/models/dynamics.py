"""A probabilistic ensemble of one-step models (Chua et al., 2018, arXiv 1805.12114, as MBPO and MOPO train it).

Each member predicts a Gaussian of the change of the observation and of the reward from observation and action.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offrl.core.machine import threads_of_their_own
from offrl.core.rng import Normal, Uniform, generator
from offrl.core.space import Box
from offrl.core.types import Spec
from offrl.data.dataset import DataError, Dataset
from offrl.models.ensemble import Config, Ensemble, Piece, divided, portion, stepper, surprise

CHUNK = 1 << 9  # rows that are predicted at once: what they become between the layers is to stay in the cache


class Step(NamedTuple):
    """One imagined step, in the data's units."""

    next_obs: Tensor  # (B, obs)
    reward: Tensor  # (B,) or (B, objectives)
    mean: Tensor  # (members, B, obs + objectives) of the next observation and the reward, by every member
    std: Tensor
    sample: Tensor  # (B, obs + objectives): next_obs and reward in one


class Fitted(NamedTuple):
    """What a fit came to on the rows held out: mean squared errors as shares of each target's variance in the training rows."""

    error: np.ndarray  # (members, obs + objectives); the targets are changes of the observation, and the reward
    unchanged: np.ndarray  # (obs + objectives,) of predicting no change and the mean reward
    linear: np.ndarray  # (obs + objectives,) of least squares
    epochs: int
    rows: int  # held out


class Dynamics:
    """p(next_obs, reward | obs, action) of a dataset.

    Deviations from MOPO's released code and OfflineRL-Kit's: 1. what is predicted is standardised, as the inputs are, so that the bounds
    of the log-variances mean the same in any units; 2. these bounds are each member's own, so that a member's best weights can be kept
    whole; 3. rows are held out by whole trajectories, since neighbours of a training row tell little; 4. decay is AdamW's and the same in
    all layers; 5. training ends, weights are kept and elites chosen by the likelihood of rows held out, not by their squared error, which
    falls no longer while the variances still learn.
    """

    def __init__(self, config: Config | None = None):
        self.config = config or Config()

    def fit(
        self,
        data: Dataset,
        seed: int = 0,
        *,
        device: str | torch.device = "cpu",
        mode: str = "eager",
        precision: str = "fp32",
        threads: int | None = None,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Fitted:
        """Train on the usable rows of `data` but those held out.

        mode, precision: as of an agent's update (eager or compile; fp32 or bf16). threads: on a CPU members train in so many at
        once; by default as many as torch has. progress(epoch, of at most, held-out error) is called after each epoch, the error
        being the mean squared one in standard units. Where there is one episode alone its end is held out, with a warning.
        Raises DataError for discrete actions, numbers that are not finite, and fewer than 10 usable rows.
        """
        inputs, targets, episode = _rows(data)
        train, held = _split(episode, self.config.holdout, seed)
        self.spec, self.objectives = data.spec, targets.shape[1] - data.spec.obs.size
        self.scale = {name: tensor.to(device) for name, tensor in _scale(inputs[train], targets[train]).items()}
        x, y = self._standard(inputs.to(device), "input"), self._standard(targets.to(device), "target")
        self.net = self._network(seed).to(device)
        shares = divided(self.config.members, (threads or torch.get_num_threads()) if x.device.type == "cpu" else 1)
        rows = train[: self.config.batch_size].expand(self.config.members, -1).to(device)
        steps = {}
        for members in {piece.members for share in shares for piece in share}:
            like = rows[slice(*members)]
            steps[members] = stepper(portion(self.net, *members), self.config, mode, precision, x[like], y[like])
        epochs = self._train(x, y, train, held, seed, shares, steps, progress or (lambda *_: None))
        error, self.score = self._held_out(x[held], y[held], len(shares))
        still = self._standard(torch.zeros_like(targets[:1], device=device), "target")
        still[:, data.spec.obs.size :] = 0
        unchanged = (y[held] - still).square().mean(0)
        return Fitted(*(e.cpu().numpy() for e in (error, unchanged, _linear(x, y, train, held))), epochs, len(held))

    def _network(self, seed: int) -> Ensemble:
        outputs = self.spec.obs.size + self.objectives
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Ensemble((self.spec.obs.size + self.spec.action.size, *self.config.hidden, outputs), self.config.members)

    def _standard(self, values: Tensor, which: str) -> Tensor:
        return (values - self.scale[f"{which}_mean"]) / self.scale[f"{which}_std"]

    def _train(self, x, y, train, held, seed, shares, steps, progress) -> int:
        """Epochs until no member gains any longer on the rows held out; leaves each member's best weights in the net."""
        c, members = self.config, self.config.members
        draw = generator(seed, "bootstrap")
        own = train[torch.randint(len(train), (members, len(train)), generator=draw)]  # each member's rows
        batch = min(c.batch_size, len(train))
        best = torch.full((members,), math.inf, device=x.device)
        kept = [p.detach().clone() for p in self.net.parameters()]
        mark, waited = best.clone(), 0

        count = len(train) // batch  # steps in an epoch

        def learn(share: list[Piece]) -> None:
            for piece in share:
                if piece.begin > 0:
                    done[piece.members].wait()
                try:
                    for first in range(round(piece.begin * count) * batch, round(piece.end * count) * batch, batch):
                        chosen = rows[slice(*piece.members), first : first + batch]
                        steps[piece.members](x[chosen], y[chosen])
                finally:
                    done[piece.members].set()

        for epoch in range(1, c.max_epochs + 1):
            order = torch.rand(own.shape, generator=draw).argsort(1)
            rows = own.gather(1, order).to(x.device)
            done = {members: threading.Event() for members in steps}
            with threads_of_their_own(len(shares)) as pool:
                list(pool.map(learn, shares))
            error, score = self._held_out(x[held], y[held], len(shares))
            if not torch.isfinite(score).all():
                raise DataError(f"the dynamics model diverged in epoch {epoch}; a lower model.lr may help")
            for keep, now in zip(kept, self.net.parameters()):
                keep[score < best] = now.detach()[score < best]
            best = torch.minimum(best, score)
            gained = score < mark - 0.02  # twice 0.01 nats
            waited = 0 if gained.any() else waited + 1
            mark = torch.where(gained, score, mark)
            progress(epoch, c.max_epochs, float(error.mean()))
            if waited >= c.patience:
                break
        with torch.no_grad():
            for keep, now in zip(kept, self.net.parameters()):
                now.copy_(keep)
        return epoch

    def _held_out(self, x: Tensor, y: Tensor, threads: int) -> tuple[Tensor, Tensor]:
        """(members, targets) mean squared errors of the means, in standard units, and (members,) surprise."""

        @torch.no_grad()
        def measured(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_var = self.net(x)
            return (mean - y).square().sum(1), surprise(mean, log_var, y) * len(x)

        with threads_of_their_own(threads) as pool:
            errors, scores = zip(*pool.map(measured, x.split(CHUNK), y.split(CHUNK)))
        return sum(errors) / len(x), sum(scores) / len(x)

    @property
    def elites(self) -> Tensor:
        """(elites,) the members to whom the rows held out are likeliest, best first."""
        return self.score.argsort()[: self.config.elites]

    @property
    def target_std(self) -> Tensor:
        """(obs + objectives,) the standard deviations, in the data, of what is predicted: of observations' changes and of rewards."""
        return self.scale["target_std"]

    @torch.no_grad()
    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, obs), action (B, action) -> mean and std (members, B, obs + objectives) of the next observation and the reward."""
        x = self._standard(torch.cat([obs, action], -1), "input")
        mean, log_var = (torch.cat(parts, 1) for parts in zip(*map(self.net, x.split(CHUNK))))
        mean = mean * self.scale["target_std"] + self.scale["target_mean"]
        return mean + F.pad(obs, (0, self.objectives)), torch.exp(log_var / 2) * self.scale["target_std"]

    def noise(self, batch_size: int) -> dict[str, Any]:
        """What a step of so many rows consumes."""
        return {"member": Uniform((batch_size,)), "normal": Normal((batch_size, len(self.target_std)))}

    def step(self, obs: Tensor, action: Tensor, noise: dict[str, Tensor]) -> Step:
        """One step from each of (B, obs) under (B, action), in the data's units.

        noise: "member" (B,) in [0, 1) chooses each row's elite, "normal" (B, obs + objectives) is for its Gaussian.
        """
        mean, std = self.predict(obs, action)
        elites = self.elites
        member = elites[(noise["member"] * len(elites)).long()]
        row = torch.arange(len(obs), device=obs.device)
        sample = mean[member, row] + std[member, row] * noise["normal"]
        reward = sample[:, self.spec.obs.size :]
        return Step(sample[:, : self.spec.obs.size], reward.squeeze(-1) if self.objectives == 1 else reward, mean, std, sample)

    def subset(self, members: int) -> Dynamics:
        """The first so many members as an ensemble of their own, with elites among them; nothing is trained again."""
        if not 1 <= members <= self.config.members:
            raise ValueError(f"the ensemble has {self.config.members} members, not {members}")
        part = Dynamics(replace(self.config, members=members))
        part.spec, part.objectives, part.scale, part.score = self.spec, self.objectives, self.scale, self.score[:members]
        part.net = part._network(0).to(self.score.device)
        part.net.load_state_dict({name: tensor[:members] for name, tensor in self.net.state_dict().items()})
        return part

    def state_dict(self) -> dict[str, Tensor]:
        """All that a fit has come to, as tensors."""
        return {**self.net.state_dict(), **{f"scale.{k}": v for k, v in self.scale.items()}, "score": self.score}

    def load_state_dict(self, state: dict[str, Tensor], spec: Spec) -> None:
        """What `state_dict` gave, of data with this spec. Raises ValueError where the shapes are others."""
        self.spec, self.score = spec, state["score"]
        self.scale = {k.removeprefix("scale."): v for k, v in state.items() if k.startswith("scale.")}
        self.objectives = len(self.scale["target_mean"]) - spec.obs.size
        self.net = self._network(0).to(self.score.device)
        try:
            self.net.load_state_dict({k: v for k, v in state.items() if k != "score" and not k.startswith("scale.")})
        except RuntimeError as error:
            raise ValueError(f"not the weights of this ensemble: {error}") from error


def _rows(data: Dataset) -> tuple[Tensor, Tensor, np.ndarray]:
    """Inputs and targets of every usable row, and its episode."""
    if not isinstance(data.spec.action, Box):
        raise DataError("a dynamics model needs continuous actions; the data has discrete ones")
    rows = np.delete(np.arange(len(data)), data.unusable())
    if len(rows) < 10:
        raise DataError(f"a dynamics model needs 10 rows with a successor at least; the data has {len(rows)}")
    t = data.transitions()
    reward = t.reward.reshape(len(t.reward), -1)
    for name, column in (("observations", t.obs), ("actions", t.action), ("next_observations", t.next_obs), ("rewards", reward)):
        if (bad := ~torch.isfinite(column).all(1)).any():
            raise DataError(f"{name}: {int(bad.sum())} rows hold NaN or infinity, the first is row {rows[int(bad.int().argmax())]}")
    episode = np.searchsorted(data.starts, rows, "right") - 1
    return torch.cat([t.obs, t.action], 1), torch.cat([t.next_obs - t.obs, reward], 1), episode


def _split(episode: np.ndarray, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, in whole episodes."""
    wanted = max(1, round(share * len(episode)))
    names, counts = np.unique(episode, return_counts=True)
    if len(names) == 1:
        warnings.warn("there is one episode alone: its end is held out from the dynamics model", stacklevel=3)
        return torch.arange(len(episode) - wanted), torch.arange(len(episode) - wanted, len(episode))
    order = torch.randperm(len(names), generator=generator(seed, "holdout")).numpy()
    enough = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
    held = np.isin(episode, names[order[: min(enough, len(names) - 1)]])
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def _scale(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of each column; a column that never changes keeps its scale."""
    found = {}
    for name, column in (("input", inputs), ("target", targets)):
        std, mean = torch.std_mean(column.double(), 0, correction=0)
        found |= {f"{name}_mean": mean.float(), f"{name}_std": torch.where(std < 1e-12, 1.0, std).float()}
    return found


def _linear(x: Tensor, y: Tensor, train: Tensor, held: Tensor) -> Tensor:
    """(targets,) held-out mean squared errors of least squares, with a ridge that only constant columns feel."""
    x = F.pad(x, (0, 1), value=1.0).double()
    gram = x[train].T @ x[train] + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    solved = torch.linalg.solve(gram, x[train].T @ y[train].double())
    return (x[held] @ solved - y[held]).square().mean(0)
