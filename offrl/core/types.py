"""The few types everything speaks. Only functions cross borders: `act` knows nothing of who calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from offrl.core import space as spaces
from offrl.core.space import Space

State = dict[str, Any]  # a tree of tensors: parameters, targets, optimiser moments, normaliser
Metrics = dict[str, Tensor]  # 0-d tensors (or (S,) under stacked seeds), on the device until they are logged
Act = Callable[[Tensor], Tensor]  # (..., obs) -> (..., action), both in the environment's units


class Transitions(NamedTuple):
    """One row a transition, under any leading axes: (N,), (B,), (S, B), (T, E)."""

    obs: Any  # (..., obs)
    action: Any  # (..., action) float, or (...,) int64 where actions are discrete
    reward: Any  # (...,) or (..., objectives)
    next_obs: Any  # (..., obs)
    mask: Any  # (...,) 1: bootstrap through next_obs, 0: the task truly ended (a time limit is not an end)
    next_action: Any = None
    mc_return: Any = None
    is_demo: Any = None
    truncated: Any = None  # (...,) 1: a time limit ended the episode here; of rollouts (T, E), whose rows of an episode follow each other


@dataclass(frozen=True)
class Spec:
    """What a policy needs to know of its task.

    `ref_min` and `ref_max` are the returns that score 0 and 100 (D4RL's normalisation); None where nobody has named any.
    """

    obs: Space
    action: Space
    env_id: str | None = None
    dataset_id: str | None = None
    ref_min: float | None = None
    ref_max: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"obs": spaces.to_json(self.obs), "action": spaces.to_json(self.action)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Spec:
        return cls(**value | {"obs": spaces.from_json(value["obs"]), "action": spaces.from_json(value["action"])})


class Agent(Protocol):
    """Stateless: it holds its config and the shapes of its networks, nothing that learns."""

    needs: tuple[str, ...]  # optional columns of Transitions that it wants
    period: int  # gradient steps that one update makes

    def init(self, seed: int) -> State: ...
    def noise(self, batch_size: int) -> list[dict[str, Any]]: ...
    def update(self, state: State, batches: list[Any], noise: list[dict[str, Tensor]]) -> tuple[State, Metrics]: ...
    def act(self, state: State, obs: Tensor, noise: Tensor | None = None) -> Tensor: ...


class Source(Protocol):
    """Where the next batches come from. Buffers, simulators and counters are its state; metrics are of what it last made."""

    def __call__(self, step: int, act: Act) -> list[Any]: ...
    def metrics(self) -> Metrics: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
