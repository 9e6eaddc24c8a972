"""torch.compile: one graph without breaks, equal to eager, and compiled again only when a layer changes its phase."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer
from oialr_peft.tuner.layer import FACTOR_NAMES
from oialr_peft.tuner.lookup import adapter_layers

pytestmark = [
    pytest.mark.usefixtures("float64", "fresh_compiler"),
    # of PyTorch's own modules, under a name of their own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FACTORED = {"freeze_when": "delay", "delay": 0}
MODES = {"dense": {}, "factored": FACTORED, "residual": {"mode": "adapter"}}
# those that no other test compiles
SOME_MODES = [pytest.param(mode, marks=() if mode in ("factored", "residual") else pytest.mark.slow) for mode in MODES]
CHANGES = 20


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, no setting left behind, and PyTorch's default limit of recompiles."""
    torch._dynamo.reset()
    with torch.compiler.config.patch(dynamic_sources=""), torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def llama(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",  # the model writes it down in its first forward, if it is not here
    )
    return BertForSequenceClassification(config)


def batch(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (2, 6), generator=generator)
    classifier = "Classification" in type(model.base_model.model).__name__
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if classifier else ids}


class Run:
    """A model that trains, compiled or not, with its optimizer and controller."""

    def __init__(self, base: nn.Module, *, compiled: bool, backend: str = "eager", **settings: object) -> None:
        self.model = get_peft_model(base, OIALRConfig(**{"mode": "replace", **settings}))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.controller = OIALRController(self.model, self.optimizer, total_steps=1000)
        self.graphs = CompileCounterWithBackend(backend)
        self.compute = torch.compile(self.model, backend=self.graphs, fullgraph=True) if compiled else self.model
        self.model.train()

    def step(self, seed: int, micro_batches: int = 2) -> list[float]:
        losses = []
        for index in range(micro_batches):
            loss = self.compute(**batch(self.model, 10 * seed + index)).loss
            loss.backward()
            losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def trained(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def pair(make=llama, *, backend: str = "eager", **settings) -> tuple[Run, Run]:
    """Two equal runs, the first one compiled."""
    compiled = Run(make(), compiled=True, backend=backend, **settings)
    eager = Run(make(), compiled=False, **settings)
    eager.model.load_state_dict(compiled.model.state_dict())
    return compiled, eager


def lose_directions(run: Run, check: int) -> None:
    """Makes the next check cut one direction of some layers, others at each check, every one at some check."""
    for index, layer in enumerate(run.controller.layers.values()):
        if index % 3 == check % 3 or check == 5:
            sigma = layer.oialr_sigma["default"]
            u, s, vh = torch.linalg.svd(layer.factors("default").sigma)
            s[-1 - index % 2 :] = 0
            with torch.no_grad():
                sigma[: len(s), : len(s)] = u @ torch.diag(s) @ vh


# ---- one graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, pytest.param(bert, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", SOME_MODES)
def test_a_model_compiles_without_graph_breaks_and_equals_eager(mode, make):
    task = {"task_type": "SEQ_CLS"} if make is bert else {}
    compiled, eager = pair(make, backend="aot_eager", **MODES[mode], **task, init_weights=False)
    for step in range(3):
        assert_close(compiled.step(step), eager.step(step))
        assert_close(compiled.trained(), eager.trained())
    assert compiled.graphs.frame_count == 1
    compiled.model.eval(), eager.model.eval()
    with torch.no_grad():
        for seed in range(2):
            inputs = batch(compiled.model, seed)
            assert_close(compiled.compute(**inputs).logits, eager.compute(**inputs).logits)
    assert compiled.graphs.frame_count == 2


@pytest.mark.parametrize("mode", SOME_MODES)
def test_autocast_and_checkpointing_compile_without_graph_breaks(mode):
    compiled, eager = pair(backend="aot_eager", **MODES[mode])
    for run in (compiled, eager):
        run.model.float()
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
        run.model.disable_input_require_grads()  # a hook of transformers that breaks the graph
    for step in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [run.compute(**batch(run.model, step)).loss for run in (compiled, eager)]
        assert_close(*losses, rtol=0.01, atol=0)
        for loss in losses:
            loss.backward()
    for ours, theirs in zip(adapter_layers(compiled.model).values(), adapter_layers(eager.model).values()):
        gradient, expected = (layer.trained_parameter("default").grad for layer in (ours, theirs))
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert compiled.graphs.frame_count == 1


# ---- changes of rank and phase ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "residual", [pytest.param(False, id="replace"), pytest.param(True, id="residual", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("shrink", "recompiles"), [("physical", 1), ("mask", 0)])
def test_twenty_changes_of_rank_compile_once_more_at_most(shrink, recompiles, residual):
    settings = {"mode": "adapter"} if residual else FACTORED
    settings = {**settings, "shrink": shrink, "update_every": 1, "cutoff": 1e-9, "init_weights": False}
    compiled, eager = pair(**settings)
    combinations = set()
    for check in range(CHANGES):
        assert_close(compiled.step(check), eager.step(check))
        for run in (compiled, eager):
            lose_directions(run, check)
            update = run.controller.step()
            assert any(after < before for before, after in update.ranks.values())
        ranks = tuple(layer.rank("default") for layer in compiled.controller.layers.values())
        assert ranks == tuple(layer.rank("default") for layer in eager.controller.layers.values())
        combinations.add(ranks)
    assert_close(compiled.step(CHANGES), eager.step(CHANGES))
    for name, layer in compiled.controller.layers.items():
        assert_close(layer.adapter_weight("default"), eager.controller.layers[name].adapter_weight("default"))
    assert len(combinations) == CHANGES
    assert len(set(ranks)) > 3
    assert compiled.graphs.frame_count == 1 + recompiles
    compiled.model.eval()
    with torch.no_grad():
        compiled.compute(**batch(compiled.model))
    assert compiled.graphs.frame_count == 2 + recompiles


def test_the_freeze_compiles_once_and_later_ranks_not_again():
    run = Run(llama(), compiled=True, freeze_when="delay", delay=4, update_every=2, cutoff=0.3, max_rank_drop=0.2)
    graphs, ranks = [], set()
    for step in range(16):
        run.step(step)
        graphs.append(run.graphs.frame_count)
        run.controller.step()
        ranks.add(tuple(layer.rank("default") for layer in run.controller.layers.values()))
    assert graphs == 4 * [1] + 12 * [2]
    assert len(ranks) >= 5


class Patches(nn.Module):
    """Two convolutions and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).flatten(2).mT
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


def test_convolutions_and_attention_compile_once_more_for_all_ranks():
    targets = ["first", "second", "attention"]
    model = get_peft_model(
        Patches(),
        OIALRConfig(target_modules=targets, init_weights=False, **{"mode": "replace", **FACTORED}),
    )
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    for rank in (16, 12, 9, 7, 5):
        for layer in adapter_layers(model).values():
            layer.set_factors("default", layer.factors("default").cut(min(rank, layer.rank("default"))))
        output = compiled(x)
        assert_close(output, model(x))
        output.sum().backward()
    assert graphs.frame_count == 2


@pytest.mark.slow
def test_freezing_by_stability_compiles_once_for_each_check_that_freezes():
    run = Run(
        llama(), compiled=True, delay=2, update_every=1, cutoff=0.3, max_rank_drop=0.2, stability_threshold=0.9995
    )
    for step in range(12):
        run.step(step)
        run.controller.step()
    freezing = [update.step for update in run.controller.history if update.frozen]
    assert 2 <= len(freezing) < 7
    assert all(not layer.is_dense("default") for layer in run.controller.layers.values())
    assert run.graphs.frame_count == 1 + len(freezing)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_share_their_graphs_whatever_their_ranks():
    """Two graphs, because the first block's input needs no gradient in fine-tuning; and two when ranks begin to vary."""
    run = Run(llama(layers=4), compiled=False, freeze_when="delay", delay=0, update_every=1, cutoff=1e-9)
    for block in run.model.base_model.model.model.layers:
        block.compile(backend=run.graphs, fullgraph=True)
    for check in range(6):
        run.step(check)
        lose_directions(run, check)
        run.controller.step()
    run.step(6)
    assert len({layer.rank("default") for layer in run.controller.layers.values()}) > 3
    assert run.graphs.frame_count == 4


def test_only_a_change_of_rank_touches_the_settings_of_the_compiler():
    run = Run(llama(), compiled=False, **FACTORED)
    layer = next(iter(run.controller.layers.values()))
    copy.deepcopy(run.model).load_state_dict(run.model.state_dict())
    layer.set_factors("default", layer.factors("default"))
    layer.set_factors("default", layer.factors("default").cut(3), size=32)
    assert torch.compiler.config.dynamic_sources == ""
    torch.compiler.config.dynamic_sources = "L['x']"
    for rank in (3, 2):
        layer.set_factors("default", layer.factors("default").cut(rank))
        assert torch.compiler.config.dynamic_sources == f"L['x'],{FACTOR_NAMES}"


# ---- the Trainer -----------------------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    """32 sequences whose first token decides the label."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 40, (32, 6), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"input_ids": self.ids[index], "labels": int(self.ids[index][0] > 20)}


def trained(directory, **settings) -> OIALRTrainer:
    config = OIALRConfig(
        mode="replace", task_type="SEQ_CLS", delay=4, update_every=2, stability_threshold=0.93, cutoff=0.15
    )
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=16,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=16,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=5,
        **settings,
    )
    trainer = OIALRTrainer(
        model=get_peft_model(bert(), config), args=arguments, train_dataset=Sentences(), eval_dataset=Sentences()
    )
    trainer.train()
    return trainer


def test_a_compiled_trainer_does_what_an_eager_one_does(tmp_path):
    eager = trained(tmp_path / "eager")
    compiled = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    updates = [
        [(update.step, update.frozen, update.ranks) for update in trainer.oialr_controller.history]
        for trainer in (eager, compiled)
    ]
    assert updates[0] == updates[1]
    assert any(frozen for _, frozen, _ in updates[0])
    assert any(after < before for _, _, ranks in updates[0] for before, after in ranks.values())
    for (name, ours), (other, theirs) in zip(
        sorted(compiled.model.state_dict().items()), sorted(eager.model.state_dict().items())
    ):
        assert name == other
        assert_close(ours, theirs)
    saved = [sorted(p.name for p in (tmp_path / which / "checkpoint-16").iterdir()) for which in ("eager", "compiled")]
    assert saved[0] == saved[1]


# ---- inductor --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("mode", [pytest.param("factored", marks=pytest.mark.sentinel), "residual"])
def test_inductor_equals_eager_after_every_change_of_rank(mode):
    settings = {**MODES[mode], "update_every": 1, "cutoff": 1e-9, "init_weights": False}
    compiled, eager = pair(backend="inductor", **settings)
    for check in range(6):
        # transformers normalizes and takes the loss in float32
        assert_close(compiled.step(check), eager.step(check), rtol=1e-5, atol=0)
        for run in (compiled, eager):
            lose_directions(run, check)
            run.controller.step()
    assert_close(compiled.step(6), eager.step(6), rtol=1e-5, atol=0)
    assert compiled.graphs.frame_count == 2
