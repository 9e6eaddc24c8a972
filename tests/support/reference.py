"""The algorithm, literal and slow, in NumPy: the oracle of the fast code.

It shares no line with the package: dense products in every forward, gradients by hand, one loop per rule, everything in
float64. What it computes is written down in `docs/method.md`; the formulas stand in the same order here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Settings:
    total_steps: int
    update_every: int
    delay: int = 0
    freeze_when: str = "stable"
    stability_threshold: float = 0.9
    cutoff: float = 0.1
    layers_per_update: float = 1.0
    max_rank_drop: float = 0.5
    min_rank: int = 1
    rank: int | None = None
    mode: str = "replace"
    max_output_loss: float | None = None
    sigma_lr_scale: float | str = "norm"


class SGD:
    scales_entries = False

    def __init__(self, lr, momentum, weight_decay):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    def step(self, x, gradient, state, scale=1.0):
        gradient = gradient + self.weight_decay / scale * x
        state["first"] = self.momentum * state["first"] + gradient if "first" in state else gradient
        return x - self.lr * scale * state["first"]


class AdamW:
    scales_entries = True

    def __init__(self, lr, weight_decay, amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8):
        self.lr, self.weight_decay, self.amsgrad = lr, weight_decay, amsgrad
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def step(self, x, gradient, state, scale=1.0):
        if not state:
            state.update(step=0, first=np.zeros_like(x), second=np.zeros_like(x), second_max=np.zeros_like(x))
        state["step"] += 1
        x = x * (1 - self.lr * self.weight_decay)
        state["first"] = self.beta1 * state["first"] + (1 - self.beta1) * gradient
        state["second"] = self.beta2 * state["second"] + (1 - self.beta2) * gradient**2
        state["second_max"] = np.maximum(state["second_max"], state["second"])
        second = state["second_max"] if self.amsgrad else state["second"]
        first_unbiased = state["first"] / (1 - self.beta1 ** state["step"])
        second_unbiased = second / (1 - self.beta2 ** state["step"])
        return x - self.lr * scale * first_unbiased / (np.sqrt(second_unbiased) + self.eps)


@dataclass
class Layer:
    base: np.ndarray  # (m, n), the weight before training
    bias: np.ndarray  # (m,), not trained
    dense: np.ndarray | None = None  # (m, n) in the dense phase
    u: np.ndarray | None = None
    sigma: np.ndarray | None = None
    vh: np.ndarray | None = None
    basis: np.ndarray | None = None  # at the previous check
    inputs: np.ndarray | None = None  # (batch, n), of the last step
    state: dict = field(default_factory=dict)  # of the optimizer

    def weight(self, mode):
        if self.dense is not None:
            return self.dense
        product = self.u @ self.sigma @ self.vh
        return self.base + product if mode == "adapter" else product


def change_basis(state, p, q):
    """First moments M → Pᵀ M Q, second moments N → (P∘P)ᵀ N (Q∘Q), step unchanged."""
    for key in state:
        if key == "first":
            state[key] = p.T @ state[key] @ q
        elif key in ("second", "second_max"):
            state[key] = (p**2).T @ state[key] @ (q**2)


class Reference:
    """An MLP ``tanh(x W₁ᵀ + b₁) … W_Lᵀ + b_L`` with mean squared error, trained by the method."""

    def __init__(self, weights, biases, optimizer, settings, schedule=lambda step: 1.0):
        self.settings = settings
        self.optimizer = optimizer
        self.schedule, self.peak = schedule, optimizer.lr
        self.optimizer.lr = self.peak * schedule(0)
        self.layers = [Layer(w.copy(), b.copy()) for w, b in zip(weights, biases)]
        self.steps = 0
        self.sigma_updates = 0
        self.history = []
        for layer in self.layers:
            if settings.mode == "adapter" or (settings.freeze_when == "delay" and settings.delay == 0):
                self.factor(layer, layer.base)
                if settings.mode == "adapter":
                    layer.sigma = np.zeros_like(layer.sigma)
            else:
                layer.dense = layer.base.copy()

    def weights(self):
        return [layer.weight(self.settings.mode) for layer in self.layers]

    def train_step(self, x, y):
        weights = self.weights()
        activations = [x]
        for i, (w, layer) in enumerate(zip(weights, self.layers)):
            z = activations[-1] @ w.T + layer.bias
            activations.append(np.tanh(z) if i < len(weights) - 1 else z)
        delta = 2 * (activations[-1] - y) / y.size
        gradients = [None] * len(weights)
        for i in reversed(range(len(weights))):
            gradients[i] = delta.T @ activations[i]
            delta = (delta @ weights[i]) * (1 - activations[i] ** 2)
        for layer, inputs, gradient in zip(self.layers, activations, gradients):
            layer.inputs = inputs
            if layer.dense is not None:
                layer.dense = self.optimizer.step(layer.dense, gradient, layer.state)
            else:
                core_gradient = layer.u.T @ gradient @ layer.vh.T
                layer.sigma = self.optimizer.step(layer.sigma, core_gradient, layer.state, self.scale(layer))
        self.steps += 1
        self.optimizer.lr = self.peak * self.schedule(self.steps)
        if self.steps % self.settings.update_every == 0:
            self.check()

    def scale(self, layer):
        """Of the learning rate of Σ: √(mn) / r, to the nearest power of √2, where entries are scaled one by one."""
        if not isinstance(self.settings.sigma_lr_scale, str):
            return self.settings.sigma_lr_scale
        if not self.optimizer.scales_entries:
            return 1.0
        exact = math.sqrt(layer.base.size) / len(layer.sigma)
        return math.sqrt(2) ** round(math.log(exact, math.sqrt(2)))

    def factor(self, layer, weight):
        """Into singular directions."""
        u, d, vh = np.linalg.svd(weight, full_matrices=False)
        rank = self.settings.rank or len(d)
        layer.u, layer.sigma, layer.vh = u[:, :rank], np.diag(d[:rank]), vh[:rank]
        layer.dense = layer.basis = None
        change_basis(layer.state, layer.u, layer.vh.T)

    def check(self):
        s = self.settings
        stability, frozen, ranks = {}, [], {}
        for i, layer in enumerate(self.layers):
            if layer.dense is None:
                continue
            u, _, vh = np.linalg.svd(layer.dense, full_matrices=False)
            basis = u @ vh
            if layer.basis is not None:
                stability[i] = float(np.sum(basis * layer.basis) / min(basis.shape))
            layer.basis = basis
            stable = s.freeze_when == "delay" or stability.get(i, -2.0) >= s.stability_threshold
            if self.steps >= s.delay and stable:
                self.factor(layer, layer.dense)
                frozen.append(i)
        if any(layer.dense is None for layer in self.layers):
            self.sigma_updates += 1
            count = len(self.layers)
            due = min(count, math.ceil(round(s.layers_per_update * self.sigma_updates * count, 9)))
            for i in range(count - due, count):
                if self.layers[i].dense is None:
                    ranks[i] = self.rotate_and_cut(self.layers[i])
        self.history.append((self.steps, stability, frozen, ranks))

    def rotate_and_cut(self, layer):
        s = self.settings
        p, d, qh = np.linalg.svd(layer.sigma)
        before = len(d)
        above = int(np.sum(d >= s.cutoff * d[0]))
        if s.max_output_loss is not None:
            output = layer.inputs @ (layer.u @ layer.sigma @ layer.vh + (layer.base if s.mode == "adapter" else 0)).T
            allowed = s.max_output_loss * np.sum(output**2)
            for needed in range(before + 1):
                dropped = layer.inputs @ ((layer.u @ p)[:, needed:] @ np.diag(d[needed:]) @ (qh @ layer.vh)[needed:]).T
                if np.sum(dropped**2) <= allowed:
                    break
            above = max(above, needed)
        kept = min(before, max(above, before - math.floor(s.max_rank_drop * before), s.min_rank))
        layer.u, layer.sigma, layer.vh = layer.u @ p[:, :kept], np.diag(d[:kept]), qh[:kept] @ layer.vh
        change_basis(layer.state, p[:, :kept], qh[:kept].T)
        return before, kept
