"""An ensemble's training step in JAX, of the size of benchmarks/mbrl_speed.py's: what the machine gives a compiler of whole programs.

    python -m venv ENV && ENV/bin/pip install "jax[cpu]" optax
    python benchmarks/mbrl_speed.py --jax ENV

Members are an axis of every weight, and all steps of an epoch are one `lax.scan`, as in unifloral. Run by itself it answers each line it
reads with the rate of an epoch, in steps a second, and first says with which version.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import optax

INPUTS, TARGETS, ROWS, MEMBERS, BATCH, HIDDEN = 23, 18, 57_000, 7, 256, (200, 200, 200, 200)


def init(key: jax.Array) -> dict:
    sizes = (INPUTS, *HIDDEN, 2 * TARGETS)
    keys = jax.random.split(key, len(sizes) - 1)
    weights = [0.5 / a**0.5 * jax.random.truncated_normal(k, -2, 2, (MEMBERS, a, b)) for k, a, b in zip(keys, sizes, sizes[1:])]
    bounds = {"high": jnp.full((MEMBERS, 1, TARGETS), 0.5), "low": jnp.full((MEMBERS, 1, TARGETS), -10.0)}
    return bounds | {"weights": weights, "biases": [jnp.zeros((MEMBERS, 1, b)) for b in sizes[1:]]}


def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    for weight, bias in zip(params["weights"][:-1], params["biases"][:-1]):
        x = jax.nn.silu(x @ weight + bias)
    mean, log_var = jnp.split(x @ params["weights"][-1] + params["biases"][-1], 2, -1)
    log_var = params["high"] - jax.nn.softplus(params["high"] - log_var)
    log_var = params["low"] + jax.nn.softplus(log_var - params["low"])
    bounds = 0.01 * (params["high"] - params["low"]).sum() / MEMBERS
    return ((mean - y) ** 2 * jnp.exp(-log_var) + log_var).mean((-2, -1)).sum() + bounds


def main() -> None:
    adam = optax.adamw(1e-3, weight_decay=2.5e-5)
    x, y = (jax.random.normal(jax.random.key(i), (ROWS, width)) for i, width in enumerate((INPUTS, TARGETS)))
    params, count = init(jax.random.key(2)), ROWS // BATCH

    @jax.jit
    def epoch(params, state, key):
        def step(carry, rows):
            params, state = carry
            updates, state = adam.update(jax.grad(loss)(params, x[rows], y[rows]), state, params)
            return (optax.apply_updates(params, updates), state), None

        rows = jax.random.randint(key, (count, MEMBERS, BATCH), 0, ROWS)
        return jax.lax.scan(step, (params, state), rows)[0]

    box = jax.block_until_ready(epoch(params, adam.init(params), jax.random.key(3)))
    print(jax.__version__, flush=True)
    for number, _ in enumerate(sys.stdin):
        begin = time.perf_counter()
        box = jax.block_until_ready(epoch(*box, jax.random.key(number)))
        print(count / (time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    main()
