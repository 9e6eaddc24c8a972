"""What is left behind: memory, threads, processes, files; and models with many adapters, many layers, or many copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from trainer_runs import SETTINGS
from trainer_runs import adapted as adapted_bert
from trainer_runs import bert as plain_bert
from trainer_runs import trained as trained_bert

from oialr_peft import OIALRConfig, OIALRController, plot_history
from oialr_peft.linalg import decompositions
from oialr_peft.report.run import run_report
from oialr_peft.tuner.lookup import adapter_layers

MEBIBYTE = 2**20
WIDTH = 24

MODES = {
    "dense": {"freeze_when": "stable", "delay": 1, "stability_threshold": 1.0},
    "physical": {"freeze_when": "delay", "delay": 2},
    "mask": {"freeze_when": "delay", "delay": 2, "shrink": "mask"},
    "residual": {"mode": "adapter", "rank": 12},
    "bounded": {"freeze_when": "delay", "delay": 2, "max_output_loss": 0.05, "max_rank_drop": 0.5},
}


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def config(kind: str, **fields: object) -> OIALRConfig:
    settings = {"target_modules": ["0", "2"], "update_every": 1, "cutoff": 0.4, "min_rank": 2}
    return OIALRConfig(**{"mode": "replace", **settings, **MODES[kind], **fields})


def controlled(model: nn.Module, total_steps: int, **options: object) -> tuple[torch.optim.Optimizer, OIALRController]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return optimizer, OIALRController(model, optimizer, total_steps=total_steps, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, controller: OIALRController, steps: int) -> None:
    x = torch.randn(8, WIDTH, dtype=next(model.parameters()).dtype)
    for _ in range(steps):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


def reduced(few: int, many: int) -> list[object]:
    """Two modes a few times by default; all of them many times among the slow tests."""
    return [("physical", few), ("residual", few)] + [pytest.param(mode, many, marks=pytest.mark.slow) for mode in MODES]


# ---- memory ----------------------------------------------------------------------------------------------------------


def tracked() -> Counter[str]:
    """The objects that the garbage collector knows, by type."""
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects())


def assert_flat(action: Callable[[], None], times: int) -> None:
    """Repeated, the action leaves no object but a few caches, and less than 40 KiB of memory a time.

    What leaks grows in every round; the allocator and the rest of the process may grow in one.
    """
    for _ in range(5):
        action()
    tracked()
    process = psutil.Process()
    rounds = []
    for _ in range(3):
        objects, memory = tracked(), process.memory_info().rss
        for _ in range(times):
            action()
        grown = tracked() - objects
        assert sum(grown.values()) <= 40 + times // 10, grown
        rounds.append(process.memory_info().rss - memory)
        if rounds[-1] <= max(4 * MEBIBYTE, 40 * 1024 * times):
            return
    raise AssertionError(f"{times} times, memory grew by {rounds} bytes in three rounds")


def added_and_deleted(model: PeftModel, mode: str) -> None:
    model.add_adapter("other", config(mode))
    model.set_adapter("other")
    train(model, *controlled(model, 6, adapter_name="other"), 6)
    model.set_adapter("default")
    model.delete_adapter("other")


def wrapped_and_unloaded(base: nn.Module, mode: str) -> None:
    model = get_peft_model(base, config(mode))
    train(model, *controlled(model, 6), 6)
    model.unload()


@pytest.mark.parametrize(("mode", "cycles"), reduced(5, 40))
def test_adapters_that_come_and_go_leave_nothing(mode, cycles):
    model, base = get_peft_model(tower(), config("physical")), tower()
    assert_flat(lambda: added_and_deleted(model, mode), cycles)
    assert_flat(lambda: wrapped_and_unloaded(base, mode), cycles)
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.ranks) in ([], ["default"]) for layer in adapter_layers(model).values())


@pytest.mark.parametrize(("mode", "checks"), reduced(40, 400))
def test_checks_leave_nothing_but_their_record(mode, checks):
    model = get_peft_model(tower(), config(mode))
    optimizer, controller = controlled(model, 3 * checks + 25)
    train(model, optimizer, controller, 20)  # ranks have settled
    assert len(controller.history) == 20

    def check() -> None:
        controller.history.clear()
        train(model, optimizer, controller, 1)

    assert_flat(check, checks)
    assert controller.steps in [20 + 5 + rounds * checks for rounds in (1, 2, 3)]


# ---- threads, processes, files ---------------------------------------------------------------------------------------


def test_threads_of_decompositions_end_with_them(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    weights = [(str(index), torch.randn(150, 140)) for index in range(6)]
    before = threading.enumerate()
    try:
        counts = []
        for _ in range(8):
            assert len([found for chunk in decompositions.decompose(weights) for found in chunk]) == 6
            counts.append(psutil.Process().num_threads())
    finally:
        torch.set_num_threads(1)  # they were told that there are four
    assert threading.enumerate() == before
    assert counts[-1] - counts[0] < 4  # four workers a round; PyTorch may start one of its own in between


def test_a_run_with_files_and_pages_leaves_no_thread_process_or_file_open(tmp_path):
    process = psutil.Process()
    others = process.children()  # of earlier tests

    def run(directory: Path) -> tuple[Counter[object], int]:
        """What is open after a run, how often, and the number of file descriptors."""
        trained = trained_bert(
            directory, model=adapted_bert(**SETTINGS), max_steps=8, save_strategy="steps", save_steps=4
        )
        trained.model.save_pretrained(directory / "adapter")
        PeftModel.from_pretrained(plain_bert(), directory / "adapter")
        run_report(directory)
        plot_history(trained.oialr_controller.history, directory / "history.png")
        gc.collect()
        mapped = [entry.path for entry in process.memory_maps() if entry.path.startswith(str(tmp_path))]
        files = [file.path for file in process.open_files()]
        assert set(process.children()) <= set(others)
        assert mapped == []
        return Counter([*threading.enumerate(), *files]), process.num_fds()

    (first, descriptors), (second, descriptors_after) = run(tmp_path / "first"), run(tmp_path / "second")
    # less is no leak: what earlier tests in this process have left may end meanwhile
    assert second <= first
    assert descriptors_after <= descriptors
    assert not [path for path in second if str(path).startswith(str(tmp_path))]


# ---- many adapters, many layers --------------------------------------------------------------------------------------


def test_fifty_adapters_on_one_model_live_side_by_side(tmp_path):
    names = [f"adapter {index}" for index in range(50)]
    modes = [list(MODES)[index % len(MODES)] for index in range(50)]
    model = get_peft_model(tower(), config(modes[0], init_weights=False), adapter_name=names[0])
    for name, mode in zip(names[1:], modes[1:], strict=True):
        model.add_adapter(name, config(mode, init_weights=False))
    x = torch.randn(4, WIDTH)

    def output(name: str) -> Tensor:
        model.set_adapter(name)
        with torch.no_grad():
            return model(x)

    outputs = {name: output(name) for name in names}
    assert len({tuple(value.flatten().tolist()) for value in outputs.values()}) == 50
    model.set_adapter(names[26])
    train(model, *controlled(model, 5, adapter_name=names[26]), 5)
    assert not torch.equal(output(names[26]), outputs[names[26]])
    others = [name for name in names if name != names[26]]
    assert all(torch.equal(output(name), outputs[name]) for name in others)
    expected = output(names[26])
    model.save_pretrained(tmp_path, selected_adapters=[names[26]])
    for name in others:
        model.delete_adapter(name)
    assert torch.equal(output(names[26]), expected)
    for layer in adapter_layers(model, names[26]).values():
        stored = (layer.oialr_weight, layer.oialr_u, layer.oialr_sigma, layer.oialr_vh)
        assert {name for container in stored for name in container} == {names[26]}
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == [names[26]]


def calls(function: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C; without those of a progress bar, which looks at the clock."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call") and "tqdm" not in frame.f_code.co_filename

    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted


class Block(nn.Module):
    """Two target layers, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2)


def calls_to_set_up(layers: int, settings: dict[str, object]) -> list[int]:
    """Of `get_peft_model`, of `OIALRController`, and of two checks."""
    made: list[object] = []
    base = nn.Sequential(*(Block() for _ in range(layers // 2)))
    counted = [
        calls(lambda: made.append(get_peft_model(base, OIALRConfig(update_every=1, **{"mode": "replace", **settings}))))
    ]
    (model,) = made
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    counted.append(calls(lambda: made.append(OIALRController(model, optimizer, total_steps=100, disable_tqdm=True))))
    counted += [calls(made[1].step) for _ in range(2)]
    assert len(adapter_layers(model)) == layers
    return counted


SETUPS = {
    "factored": {"freeze_when": "delay", "delay": 0},
    "dense": {"delay": 2, "modules_to_save": ["0.norm"], "target_modules": ["up", "down"]},
}


@pytest.mark.parametrize(("smallest", "kind"), [(40, "dense"), pytest.param(500, "factored", marks=pytest.mark.slow)])
def test_work_to_set_up_grows_with_the_number_of_layers_and_not_with_its_square(smallest, kind):
    calls_to_set_up(4, SETUPS[kind])  # imports, caches
    one, two, four = (calls_to_set_up(factor * smallest, SETUPS[kind]) for factor in (1, 2, 4))
    for first, second, third in zip(one, two, four, strict=True):
        assert third - second <= 2.03 * (second - first)


# ---- copies ----------------------------------------------------------------------------------------------------------


def partly_frozen(**fields: object) -> PeftModel:
    """One layer stands still, so that its basis is stable; the other moves."""
    settings = {"freeze_when": "stable", "delay": 1, "stability_threshold": 0.99999}
    model = get_peft_model(
        tower(),
        OIALRConfig(target_modules=["0", "2"], update_every=1, **{"mode": "replace", **settings, **fields}),
    )
    still, moving = (layer.trained_parameter("default") for layer in adapter_layers(model).values())
    optimizer = torch.optim.SGD([{"params": [still], "lr": 0.0}, {"params": [moving], "lr": 0.5}])
    train(model, optimizer, OIALRController(model, optimizer, total_steps=10), 2)
    assert [layer.is_dense("default") for layer in adapter_layers(model).values()] == [False, True]
    return model


def after_training(kind: str, **fields: object) -> PeftModel:
    model = get_peft_model(tower(), config(kind, **fields))
    train(model, *controlled(model, 8), 8)
    layers = adapter_layers(model).values()
    assert kind == "dense" or all(layer.rank("default") < layer.full_rank["default"] for layer in layers)
    return model


def merged(kind: str, **fields: object) -> PeftModel:
    model = after_training(kind, **fields)
    model.merge_adapter()
    return model


PHASES = {
    "dense": lambda: after_training("dense"),
    "partly frozen": partly_frozen,
    "pruned": lambda: after_training("physical"),
    "masked": lambda: after_training("mask"),
    "residual": lambda: after_training("residual"),
    "bounded": lambda: after_training("bounded"),
    "pretraining": lambda: after_training("physical", mode="pretraining"),
    "merged": lambda: merged("physical"),
    "merged residual": lambda: merged("residual"),
    "merged pretraining": lambda: merged("physical", mode="pretraining"),
}


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_meta(model: nn.Module) -> nn.Module:
    values = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(model).to("meta")
    assert all(parameter.is_meta for parameter in twin.parameters())
    twin.to_empty(device="cpu").load_state_dict(values)
    return twin


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": through_torch,
    "meta": through_meta,
    "double": lambda model: copy.deepcopy(model).double(),
    "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
}


@pytest.mark.parametrize("phase", PHASES)
def test_copies_pickles_and_casts_of_a_trained_model_compute_the_same_and_train_on(phase):
    model = PHASES[phase]().eval()
    x = torch.randn(4, WIDTH)
    expected = model(x).detach()
    phases = [repr(layer.extra_repr()) for layer in adapter_layers(model).values()]
    for name, copied in COPIES.items():
        twin = copied(model)
        dtype = next(twin.parameters()).dtype
        output = twin(x.to(dtype)).detach().to(expected.dtype)
        tolerance = {torch.float32: 0.0, torch.float64: 1e-5, torch.bfloat16: 5e-2}[dtype]
        assert_close(output, expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
        assert [repr(layer.extra_repr()) for layer in adapter_layers(twin).values()] == phases
        if "merged" in phase:
            twin.unmerge_adapter()
            twin.merge_adapter()
            assert_close(twin(x.to(dtype)).detach().to(expected.dtype), expected, atol=tolerance, rtol=tolerance)
            twin.unmerge_adapter()
        train(twin.train(), *controlled(twin, 3), 2)
        assert all(torch.isfinite(parameter).all() for parameter in twin.parameters())
    assert torch.equal(model(x), expected)
