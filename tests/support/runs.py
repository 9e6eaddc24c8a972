"""What the tests of several processes run in each of them: small trainings, and what must be equal afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer
from oialr_peft.parallel.sharding import whole
from oialr_peft.tuner.lookup import adapter_layers


class Tower(nn.Module):
    """A tall, a square and a wide layer, and a head; one more layer that only every other step uses, if asked for."""

    def __init__(self, width: int = 12, recompute: bool = False, sometimes: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(width, 16)
        self.middle = nn.Linear(16, 16, bias=False)
        self.down = nn.Linear(16, 10)
        self.extra = nn.Linear(10, 10) if sometimes else None
        self.head = nn.Linear(10, 3)
        self.recompute = recompute
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(x))
        x = checkpoint(self._inner, x, use_reentrant=False) if self.recompute else self._inner(x)
        self.calls += 1
        if self.extra is not None and self.calls % 2:
            x = torch.tanh(self.extra(x))
        return self.head(x)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.down(torch.tanh(self.middle(x))))


def process_index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(repr((tensor.shape, tensor.dtype)).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def state_of(model, optimizer, controller) -> dict:
    """Everything that must be equal in all processes, as digests and numbers."""
    moments = [
        torch.as_tensor(value)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
    ]
    state = controller.state_dict()
    update = controller.history[-1] if controller.history else None
    return {
        "parameters": digest(model.parameters()),
        "moments": digest(moments),
        "bases": digest([state["bases"][name] for name in sorted(state["bases"])]),
        "update": None if update is None else (update.step, update.stability, update.frozen, update.ranks),
        "trainable": None if update is None else update.trainable,
    }


def batch_of(generator, size=16, width=12, dtype=torch.float64):
    x = torch.randn(size, width, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def shard(model, *, units=("up", "middle"), **options):
    """`fully_shard` for some layers and for the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in units:
        fully_shard(getattr(model.base_model.model, name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(settings, options=None) -> dict:
    """A run of the tower on this process's share of every batch; `options` say how."""
    options = {"steps": 24, "dtype": torch.float64, "optimizer": "adamw", "tower": {}, "ddp": {}, **(options or {})}
    torch.manual_seed(0)
    model = get_peft_model(
        Tower(**options["tower"]).to(options["dtype"]),
        OIALRConfig(**{"exclude_modules": ["head"], "mode": "pretraining", **settings}),
        autocast_adapter_dtype=False,
    )
    index, count = process_index(), process_count()
    sharded = "fsdp" in options and dist.is_initialized()
    wrapped = model
    if sharded:
        wrapped = shard(model, **options["fsdp"])
    elif count > 1:
        wrapped = DistributedDataParallel(model, **options["ddp"])
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "sgd": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9),
    }
    optimizer = make[options["optimizer"]](model.parameters())
    controller = OIALRController(wrapped, optimizer, total_steps=options["steps"])
    generator = torch.Generator().manual_seed(5)
    accumulate = options.get("accumulate", 1)
    states, losses, reducers = [], [], []
    for _ in range(options["steps"]):
        for micro in range(accumulate):
            x, y = batch_of(generator, options.get("batch", 16), dtype=options["dtype"])
            last = micro == accumulate - 1
            if sharded:
                wrapped.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or count == 1 or sharded else wrapped.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
                    loss = nn.functional.cross_entropy(wrapped(x[index::count]).float(), y[index::count])
                (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=options.get("set_to_none", True))
        losses.append(loss.item())
        if controller.step() is not None:
            states.append(state_of(model, optimizer, controller))
            reducers.append(id(wrapped.reducer) if isinstance(wrapped, DistributedDataParallel) else 0)
    return {
        "states": states,
        "losses": losses,
        "reducers": reducers,
        "weights": {name: whole(layer.adapter_weight("default")) for name, layer in adapter_layers(model).items()},
        "history": [(u.step, u.stability, u.frozen, u.ranks) for u in controller.history],
    }


STABLE = {"delay": 4, "update_every": 2, "stability_threshold": 0.9, "cutoff": 0.3}


def assert_equal_processes(results):
    first = results[0]["states"]
    assert first
    for other in results[1:]:
        for ours, theirs in zip(first, other["states"], strict=True):
            assert ours == theirs


def cuts(history) -> int:
    return sum(before > after for _, _, _, ranks in history for before, after in ranks.values())


def vit(hidden: int, layers: int, heads: int, inner: int):
    """A classifier of 8×8 images."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def demo_model():
    return vit(96, 4, 4, 384)


class Points(torch.utils.data.Dataset):
    """96 images of digits with their labels, as the demo's model takes them."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": index % 10}


class StopAfter(TrainerCallback):
    """Ends the training after a number of optimizer steps, as a queueing system would."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def run_trainer(directory, *, stop=None, resume=None, kill=None, **settings) -> dict:
    """12 steps of a small ViT with a global batch of 16; `kill` names the method of the Trainer to die in."""
    schedule = {"update_every": 2, "delay": 4, "stability_threshold": 0.9, "cutoff": 0.3, "max_rank_drop": 0.3}
    model = get_peft_model(vit(16, 2, 2, 24), OIALRConfig(mode="pretraining", **schedule))
    defaults = {
        "max_steps": 12,
        "learning_rate": 5e-3,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if process_count() > 1 else None,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 16 // process_count(),
    }
    trainer = OIALRTrainer(
        model=model,
        args=TrainingArguments(str(directory), **{**defaults, **settings}),
        train_dataset=Points(),
        callbacks=[StopAfter(stop)] if stop else None,
    )
    if kill is not None:
        die_in(trainer, *kill)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "state": state_of(model, trainer.optimizer, trainer.oialr_controller),
        "history": [(u.step, u.stability, u.frozen, u.ranks) for u in trainer.oialr_controller.history],
        "weights": [layer.adapter_weight("default").clone() for layer in adapter_layers(model).values()],
        "sharded": sum(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "logged": [entry for entry in trainer.state.log_history if "oialr/rank_mean" in entry],
    }


def die_in(trainer, method: str, save: int, process: int) -> None:
    """Kill this process just before `method` of the Trainer runs in save number `save`, if it is that process."""
    calls = itertools.count(1)
    original = getattr(trainer, method)

    def dying(*args, **kwargs):
        if next(calls) == save and process_index() == process:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(trainer, method, dying)
