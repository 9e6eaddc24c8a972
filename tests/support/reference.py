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
    delay: int
    update_every: int
    freeze_when: str = "stable"
    stability_threshold: float = 0.9
    cutoff: float = 0.1
    layers_per_update: float = 1.0
    max_rank_drop: float = 0.5
    min_rank: int = 1
    init_rank: int | None = None
    residual: bool = False
    max_output_loss: float | None = None
    settle_ratio: float = 1.0
    sigma_lr_scale: float | str = "restart"
    sigma_basis: str | None = None
    prune_by: str = "weight"

    def __post_init__(self):
        if self.sigma_basis is None:
            self.sigma_basis = "singular" if self.residual else "axes"


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
    # of the steps since the last check: inputs (batch, n), outputs (batch, m)
    recent: list = field(default_factory=list)
    travelled: float = 0.0
    restart: float = 1.0  # by how much the learning rate of sigma is higher, below its ceiling
    way: tuple | None = None  # P and Q from the matrix that was trained, as long as its state has not followed
    state: dict = field(default_factory=dict)  # of the optimizer

    def weight(self, residual):
        if self.dense is not None:
            return self.dense
        product = self.u @ self.sigma @ self.vh
        return self.base + product if residual else product


def change_basis(state, p, q):
    """First moments M → Pᵀ M Q, second moments N → (P∘P)ᵀ N (Q∘Q), step unchanged."""
    for key in state:
        if key == "first":
            state[key] = p.T @ state[key] @ q
        elif key in ("second", "second_max"):
            state[key] = (p**2).T @ state[key] @ (q**2)


def nearest_axes(columns):
    """The rotation that turns the longest rows, as many as there are columns, into a lower triangle, by Gram and Schmidt."""
    count = columns.shape[1]
    rotation = []
    for row in columns[sorted(np.argsort(-np.sum(columns**2, axis=1), kind="stable")[:count])]:
        for _ in range(2):  # once more for the rounding errors
            for found in rotation:
                row = row - (row @ found) * found
        rotation.append(row / np.linalg.norm(row))
    return np.array(rotation).T


class Reference:
    """An MLP ``tanh(x W₁ᵀ + b₁) … W_Lᵀ + b_L`` with mean squared error, trained by the method."""

    def __init__(self, weights, biases, optimizer, settings, schedule=lambda step: 1.0):
        self.settings = settings
        self.optimizer = optimizer
        self.schedule, self.peak, self.highest = schedule, optimizer.lr, 0.0
        self.optimizer.lr = self.peak * schedule(0)
        self.layers = [Layer(w.copy(), b.copy()) for w, b in zip(weights, biases)]
        self.steps = 0
        self.sigma_updates = 0
        self.history = []
        for layer in self.layers:
            if settings.residual or (settings.freeze_when == "delay" and settings.delay == 0):
                self.factor(layer, layer.base)
                self.settle(layer)
                if settings.residual:
                    layer.sigma = np.zeros_like(layer.sigma)
            else:
                layer.dense = layer.base.copy()

    def weights(self):
        return [layer.weight(self.settings.residual) for layer in self.layers]

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
            layer.recent.append((inputs, inputs @ layer.weight(self.settings.residual).T))
            if layer.dense is not None:
                layer.dense = self.optimizer.step(layer.dense, gradient, layer.state)
            else:
                core_gradient = layer.u.T @ gradient @ layer.vh.T
                layer.sigma = self.optimizer.step(layer.sigma, core_gradient, layer.state, self.scale(layer))
        self.steps += 1
        self.optimizer.lr = self.peak * self.schedule(self.steps)
        self.highest = max(self.highest, self.optimizer.lr)
        if self.steps % self.settings.update_every == 0:
            self.check()

    def scale(self, layer):
        """Of the learning rate of Σ: √(mn) / r, to the nearest power of √2, where entries are scaled one by one; for
        late layers more, by the square of its fall until the freeze, but never above √2 times the highest."""
        if not isinstance(self.settings.sigma_lr_scale, str):
            return self.settings.sigma_lr_scale
        if not self.optimizer.scales_entries:
            return 1.0
        exact = math.sqrt(layer.base.size) / len(layer.sigma)
        scale = math.sqrt(2) ** round(math.log(exact, math.sqrt(2)))
        if self.settings.sigma_lr_scale == "restart":
            scale *= min(layer.restart, math.sqrt(2) * max(1.0, self.highest / self.optimizer.lr))
        return scale

    def factor(self, layer, weight):
        """Into singular directions; `settle` decides in which basis they are kept."""
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        rank = self.settings.init_rank or len(s)
        layer.u, layer.sigma, layer.vh = u[:, :rank], np.diag(s[:rank]), vh[:rank]
        if layer.dense is not None:
            fallen = self.highest / self.optimizer.lr
            exact = fallen**2 / math.sqrt(2)
            layer.restart = min((math.sqrt(2) ** i for i in range(7)), key=lambda power: abs(math.log(exact / power)))
        layer.dense = layer.basis = None
        layer.way = layer.u, layer.vh.T

    def settle(self, layer):
        """Turn what changed to its axes, and let the optimizer's state follow all of the way at once."""
        if layer.way is None:
            return
        p, q = layer.way
        if self.settings.sigma_basis == "axes":
            a, b = nearest_axes(layer.u), nearest_axes(layer.vh.T)
            layer.u, layer.sigma, layer.vh = layer.u @ a, a.T @ layer.sigma @ b, b.T @ layer.vh
            p, q = p @ a, q @ b
        change_basis(layer.state, p, q)
        layer.way = None

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
            if s.freeze_when == "settled":
                stable = i in stability and self.outlook(layer, stability[i]) <= s.settle_ratio
            else:
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
        for layer in self.layers:
            self.settle(layer)
            layer.recent.clear()
        self.history.append((self.steps, stability, frozen, ranks))

    def outlook(self, layer, stability):
        """Movement to come over movement so far; the learning rate is constant here, and taken to fall to zero."""
        s, distance = self.settings, math.sqrt(2 * (1 - stability))
        layer.travelled += distance
        intervals_left = (s.total_steps - self.steps) / s.update_every
        return distance * intervals_left / 2 / layer.travelled

    def rotate_and_cut(self, layer):
        s = self.settings
        p, d, qh = np.linalg.svd(layer.sigma)
        before = len(d)
        if s.prune_by == "outputs":
            directions, above = self.leading_outputs(layer)
        else:
            above = int(np.sum(d >= s.cutoff * d[0]))
            if s.max_output_loss is not None:
                inputs, _ = layer.recent[-1]
                output = inputs @ (layer.u @ layer.sigma @ layer.vh + (layer.base if s.residual else 0)).T
                allowed = s.max_output_loss * np.sum(output**2)
                for needed in range(before + 1):
                    dropped = inputs @ ((layer.u @ p)[:, needed:] @ np.diag(d[needed:]) @ (qh @ layer.vh)[needed:]).T
                    if np.sum(dropped**2) <= allowed:
                        break
                above = max(above, needed)
        kept = min(before, max(above, before - math.floor(s.max_rank_drop * before), s.min_rank))
        if kept < before or layer.way is not None or s.sigma_basis == "singular":
            way_p, way_q = layer.way or (np.eye(before), np.eye(before))
            if s.prune_by == "outputs" and kept < before:
                g, d, qh = np.linalg.svd(directions[:, :kept].T @ layer.sigma, full_matrices=False)
                p = directions[:, :kept] @ g
            layer.way = way_p @ p[:, :kept], way_q @ qh[:kept].T
            layer.u, layer.sigma, layer.vh = layer.u @ p[:, :kept], np.diag(d[:kept]), qh[:kept] @ layer.vh
        return before, kept

    def leading_outputs(self, layer):
        """Principal directions of the layer's outputs, each of length 1, in the coordinates of U; and how many are needed.

        Over the last 16 steps; of a weight that was dense and wide until now as its outputs were, else as they are now. The
        number is that of the directions of the first half of each batch, for the outputs of the second.
        """
        s = self.settings
        rows, columns = layer.base.shape
        as_they_were = layer.way is not None and rows < columns
        halves, positions = [np.zeros_like(layer.sigma), np.zeros_like(layer.sigma)], 0
        for inputs, outputs in layer.recent[-16:]:
            for i, (x, y) in enumerate(zip(inputs, outputs)):
                own = layer.u.T @ y if as_they_were else layer.sigma @ (layer.vh @ x)
                second = i >= len(inputs) / 2
                halves[second] += np.outer(own, own) / np.sum(y**2)
                positions += second
        directions = np.linalg.eigh(self.with_white(layer, halves[0]))[1][:, ::-1]
        energies = [z @ self.with_white(layer, halves[1]) @ z for z in directions.T]
        above = 1 + max(i for i, energy in enumerate(energies) if energy >= s.cutoff**2 * max(energies))
        if s.max_output_loss is not None:
            needed = 0
            while sum(energies[needed:]) > s.max_output_loss * positions:
                needed += 1
            above = max(above, needed)
        return np.linalg.eigh(self.with_white(layer, sum(halves)))[1][:, ::-1], above

    @staticmethod
    def with_white(layer, covariance):
        """And a thousandth of its trace in the shape that inputs of equal size in all directions give."""
        white = layer.sigma @ layer.sigma.T
        return covariance + 1e-3 * np.trace(covariance) / np.trace(white) * white if np.any(white) else covariance
