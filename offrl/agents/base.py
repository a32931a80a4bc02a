"""What every agent shares: binding networks to a state, descending one loss on one group, and the normaliser.

An agent holds its config and the shapes of its networks. All that learns is in the state, a tree of tensors:

    {"params": {group: {name: tensor}}, "target": {group: ...}, "adam": {group: moments}, "normalizer": {...}}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from offrl.core.space import Box, Discrete
from offrl.core.types import Spec, State, Transitions
from offrl.nn import normalize
from offrl.nn.descend import adam, adam_init, clip_norm, polyak


class Agent:
    """Base of the agents. A subclass defines Config, networks, its losses, update and act, in this order.

    Every step takes `GROUP_lr` from the config, and `max_grad_norm` and `adam_eps` where there are such fields.
    """

    Config: ClassVar[type]
    needs: ClassVar[tuple[str, ...]] = ()
    period: ClassVar[int] = 1
    targets: ClassVar[tuple[str, ...]] = ()  # groups that have a target copy
    discrete: ClassVar[bool] = False  # whether discrete actions are taken
    on_policy: ClassVar[bool] = False  # whether a batch must be a rollout (T, E, ...) of the policy in the state

    def __init__(self, config: Any, spec: Spec):
        if isinstance(spec.action, Discrete) and not self.discrete:
            raise TypeError(f"{type(self).__name__} needs continuous actions; the data has {spec.action.n} discrete ones (bc takes both)")
        self.config, self.spec = config, spec
        self.continuous = isinstance(spec.action, Box)
        with torch.device("meta"):
            self.modules = self.networks()
        for group, net in self.modules.items():
            for name, _ in net.named_buffers():  # it would stay on the meta device, where a product with it is garbage without an error
                raise TypeError(f"{group}: {name} is a buffer; what a network holds must be a parameter, constants are made in forward")

    def networks(self) -> dict[str, nn.Module]:
        """One module per group; a group is what one loss descends."""
        raise NotImplementedError

    def learning_rate(self, group: str, count: Tensor) -> float | Tensor:
        """Of the group's step number `count`, a 0-d tensor that starts at 1."""
        return getattr(self.config, f"{group}_lr")

    def noise(self, batch_size: int) -> list[dict[str, Any]]:
        return [{} for _ in range(self.period)]

    def init(self, seed: int) -> State:
        """A fresh state on the CPU in float32, with the identity for a normaliser. The global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = self.networks()
        params = {group: {k: p.detach() for k, p in net.named_parameters()} for group, net in networks.items()}
        return {
            "params": params,
            "target": {group: {k: p.clone() for k, p in params[group].items()} for group in self.targets},
            "adam": {group: adam_init(tree) for group, tree in params.items()},
            "normalizer": normalize.identity(self.spec),
        }

    def bind(self, state: State, *groups: str, of: str = "params") -> Any:
        """The named networks as functions of what `state` carries; a single name gives the function itself."""
        bound = [partial(_call, self.modules[group], state[of][group]) for group in groups]
        return bound[0] if len(bound) == 1 else bound

    def descend(self, state: State, group: str, loss: Callable[..., tuple[Tensor, Any]], *args: Any) -> tuple[State, Any]:
        """One Adam step on `group` alone along the gradient of `loss(state, *args)`: no other network can be reached.

        What the loss returns beside its value, metrics most of all, is returned beside the new state.
        """
        params, moments = state["params"], state["adam"]

        def objective(tree):
            return loss(state | {"params": params | {group: tree}}, *args)

        grads, found = torch.func.grad(objective, has_aux=True)(params[group])
        rate, limit = self.learning_rate(group, moments[group]["count"] + 1), getattr(self.config, "max_grad_norm", None)
        if limit is not None:
            grads = clip_norm(grads, limit)
        stepped, moved = adam(params[group], grads, moments[group], rate, eps=getattr(self.config, "adam_eps", 1e-8))
        return state | {"params": params | {group: stepped}, "adam": moments | {group: moved}}, found

    def polyak(self, state: State) -> State:
        """Every target moved towards its online network by config.tau."""
        target = {group: polyak(tree, state["params"][group], self.config.tau) for group, tree in state["target"].items()}
        return state | {"target": target}

    def normalize_obs(self, state: State, obs: Tensor) -> Tensor:
        scale = state["normalizer"]
        return (obs - scale["obs_mean"]) / scale["obs_std"]

    def normalize(self, state: State, batch: Transitions) -> Transitions:
        """The batch as the networks see it: observations standardised, continuous actions in [-1, 1]."""
        obs, next_obs, action = self.normalize_obs(state, batch.obs), self.normalize_obs(state, batch.next_obs), batch.action
        if self.continuous:
            scale = state["normalizer"]
            action = (action - scale["action_mid"]) / scale["action_half"]
        return batch._replace(obs=obs, action=action, next_obs=next_obs)

    def env_action(self, state: State, action: Tensor) -> Tensor:
        """An action in [-1, 1] in the environment's units."""
        return action * state["normalizer"]["action_half"] + state["normalizer"]["action_mid"]


def _call(module: nn.Module, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, params, args, kwargs)
