"""The method in PEFT's registries: once, again, from another path, in another process, and not at all."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, mapping
from peft.utils import register_peft_method
from torch.testing import assert_close

import oialr_peft
from oialr_peft import OIALRConfig, OIALRModel
from oialr_peft.tuner import registration

PACKAGE = Path(oialr_peft.__file__).parent


def run_steps(steps: dict[str, str], *arguments: object) -> dict[str, str]:
    """Runs pieces of code one after the other in one fresh process; what each printed, or its traceback."""
    code = f"""
import contextlib, io, json, sys, traceback
results, scope = {{}}, {{"sys": sys}}
for name, step in {steps!r}.items():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(step, scope)
        except BaseException:
            traceback.print_exc(file=printed)
    results[name] = printed.getvalue()
json.dump(results, sys.stdout)
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# ---- the registries --------------------------------------------------------------------------------------------------


def test_the_enum_has_one_member_that_behaves_like_the_others():
    member = PeftType.OIALR
    assert PeftType("OIALR") is PeftType["OIALR"] is member
    assert member.value == "OIALR"
    assert member == "OIALR"
    assert isinstance(member, str)
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member


def test_every_registry_of_peft_knows_the_method():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.OIALR] is OIALRConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.OIALR] is OIALRModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.OIALR] == registration.PREFIX == "oialr_"


def test_registering_again_changes_nothing():
    tables = mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING
    before = [dict(table) for table in tables]
    members = list(PeftType)
    registration.extend_peft_type()
    registration.register(OIALRConfig, OIALRModel)
    assert before == list(tables)
    assert list(PeftType) == members


def test_a_foreign_method_of_the_same_name_is_refused(monkeypatch):
    class Foreign(PeftConfig):
        pass

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.OIALR, Foreign)
    with pytest.raises(ImportError, match=rf"already has a method called OIALR, from {__name__}\. Import only one"):
        registration.register(OIALRConfig, OIALRModel)
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.OIALR] is Foreign


def test_peft_itself_refuses_a_second_method_of_the_name():
    with pytest.raises((KeyError, ValueError), match="(?i)oialr"):
        register_peft_method(name="oialr", config_cls=OIALRConfig, model_cls=OIALRModel, prefix="oialr_")


# ---- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("peft", "0.20.9"),
        ("peft", "0.22.0"),
        ("peft", "0.22.0.dev0"),
        ("peft", "1.0"),
        ("transformers", "5.22.4"),
        ("transformers", "4.99"),
        ("transformers", "6.0.0"),
        ("transformers", "6.0.0.dev0"),
    ],
)
def test_an_unsupported_version_is_refused_with_the_versions_that_work(monkeypatch, package, installed):
    oldest, first_unsupported = registration.SUPPORTED[package]
    supported = {name: bounds[0] for name, bounds in registration.SUPPORTED.items()}
    monkeypatch.setattr(registration, "version", lambda name: {**supported, package: installed}[name])
    with pytest.raises(ImportError) as error:
        registration.check_versions()
    assert f"{package} >= {oldest}, < {first_unsupported}, but {installed} is installed" in str(error.value)
    assert f'pip install "{package}>={oldest},<{first_unsupported}"' in str(error.value)


@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("peft", "0.21"),
        ("peft", "0.21.9"),
        ("peft", "0.21.2+local"),
        ("transformers", "5.23"),
        ("transformers", "5.99"),
    ],
)
def test_supported_versions_pass(monkeypatch, package, installed):
    supported = {name: bounds[0] for name, bounds in registration.SUPPORTED.items()}
    monkeypatch.setattr(registration, "version", lambda name: {**supported, package: installed}[name])
    registration.check_versions()


def test_the_bounds_are_those_of_the_package_metadata():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    declared = {r.name: r.specifier for r in map(Requirement, requires("oialr-peft"))}
    for package, (oldest, first_unsupported) in registration.SUPPORTED.items():
        assert set(map(str, declared[package])) == {f">={oldest}", f"<{first_unsupported}"}


# ---- copies and pickles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"freeze_when": "delay", "delay": 0}, {"mode": "adapter"}], ids=str)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_model_is_copied_and_pickled_with_its_adapter(mlp, make_inputs, outputs_of, fields, copied):
    inputs = make_inputs("mlp")
    model = get_peft_model(
        mlp, OIALRConfig(target_modules=["up", "down"], init_weights=False, **{"mode": "replace", **fields})
    )
    expected = outputs_of(model, inputs)
    twin = copied(model)
    assert_close(outputs_of(twin, inputs), expected, rtol=0, atol=0)
    assert twin.peft_config == model.peft_config
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_close(outputs_of(model, inputs), expected, rtol=0, atol=0)


# ---- a process that imports the package ------------------------------------------------------------------------------

IMPORTING = {
    "import": """
import random
import numpy, peft, torch

def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

states = random_states()
before = set(sys.modules)
import oialr_peft
for slow in ("transformers.trainer", "torch.distributed.optim", "oialr_peft.trainer", "oialr_peft.report"):
    assert slow not in sys.modules, slow
# PEFT itself imports what it finds of torchao and bitsandbytes; nothing may come on top
added = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert added == {"aenum", "oialr_peft"}, added
""",
    "random states": "assert random_states() == states",
    "model works": """
from peft import PeftConfig, PeftType, get_peft_model, mapping

def model_works():
    base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    x = torch.randn(2, 4)
    expected = base(x)
    model = get_peft_model(base, oialr_peft.OIALRConfig(target_modules=["0"], freeze_when="delay", delay=0))
    assert type(model.base_model) is oialr_peft.OIALRModel
    torch.testing.assert_close(model(x), expected)

model_works()
""",
    "reload": """
import importlib, oialr_peft.tuner.registration
importlib.reload(oialr_peft.tuner.registration)
importlib.reload(oialr_peft)
model_works()
for module in ("tuner.config", "linalg.factors", "linalg.ops", "tuner.layer", "tuner.model"):
    importlib.reload(importlib.import_module("oialr_peft." + module))
importlib.reload(oialr_peft)
model_works()
assert [member.value for member in PeftType].count("OIALR") == 1
""",
    "second path": """
import pickle
first = oialr_peft
for name in [name for name in sys.modules if name.partition(".")[0] == "oialr_peft"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
import oialr_peft
assert oialr_peft is not first and oialr_peft.__file__.startswith(sys.argv[1])
model_works()
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.OIALR] is oialr_peft.OIALRConfig
config = oialr_peft.OIALRConfig(cutoff=0.2)
assert type(pickle.loads(pickle.dumps(config))) is oialr_peft.OIALRConfig
config.save_pretrained(sys.argv[1] + "/adapter")
assert type(PeftConfig.from_pretrained(sys.argv[1] + "/adapter")) is oialr_peft.OIALRConfig
""",
}


@pytest.fixture(scope="module")
def importing_process(tmp_path_factory):
    second_path = tmp_path_factory.mktemp("second_path")
    shutil.copytree(PACKAGE, second_path / "oialr_peft", ignore=shutil.ignore_patterns("__pycache__"))
    return run_steps(IMPORTING, second_path)


def test_importing_the_package_imports_little_beyond_peft(importing_process):
    assert importing_process["import"] == ""


def test_importing_the_package_draws_no_random_numbers(importing_process):
    assert importing_process["random states"] == ""


def test_reloading_the_package_leaves_it_working(importing_process):
    assert importing_process["model works"] == importing_process["reload"] == ""


def test_a_second_import_from_another_path_replaces_the_first(importing_process):
    assert importing_process["second path"] == ""


# ---- a process that does not -----------------------------------------------------------------------------------------

LOADERS = [
    "peft.PeftModel.from_pretrained(transformers.BertForSequenceClassification.from_pretrained(base), adapter)",
    "peft.PeftConfig.from_pretrained(adapter)",
    "peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter)",
    "transformers.BertForSequenceClassification.from_pretrained(base).load_adapter(adapter)",
    "transformers.AutoModelForSequenceClassification.from_pretrained(adapter)",
]
NOT_IMPORTING = {
    "load": f"""
import peft, transformers
base, adapter, pickled = sys.argv[1:]
for call in {LOADERS!r}:
    try:
        eval(call)
    except KeyError as error:
        print(repr(error))
assert "oialr_peft" not in sys.modules
""",
    "unpickle": """
import pickle
with open(pickled, "rb") as file:
    config, model = pickle.load(file)
print(type(config).__name__, config.cutoff, config.peft_type.value, type(model.base_model).__name__)
""",
    "load after import": f"""
import oialr_peft
for call in {LOADERS!r}:
    eval(call)
""",
}


@pytest.fixture(scope="module")
def saved_adapter(make_model, tmp_path_factory):
    """Directories of a base model and of an adapter for it, and a file with a pickled configuration and model."""
    directory = tmp_path_factory.mktemp("saved")
    make_model("bert").save_pretrained(directory / "base")
    base = type(make_model("bert")).from_pretrained(directory / "base")
    model = get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", mode="adapter"))
    model.save_pretrained(directory / "adapter")
    (directory / "pickled").write_bytes(
        pickle.dumps((OIALRConfig(mode="replace", target_modules=["up"], cutoff=0.2), model))
    )
    return directory / "base", directory / "adapter", directory / "pickled"


@pytest.fixture(scope="module")
def not_importing_process(saved_adapter):
    return run_steps(NOT_IMPORTING, *saved_adapter)


def test_without_the_import_every_way_of_loading_raises_the_documented_error(not_importing_process):
    assert not_importing_process["load"].split("\n")[:-1] == ["KeyError('OIALR')"] * len(LOADERS)


def test_after_the_import_every_way_of_loading_works(not_importing_process):
    assert not_importing_process["load after import"] == ""


def test_a_pickle_imports_the_package_by_itself(not_importing_process):
    assert not_importing_process["unpickle"].split() == ["OIALRConfig", "0.2", "OIALR", "OIALRModel"]


# ---- this process ----------------------------------------------------------------------------------------------------


def test_lazy_names_are_listed_and_unknown_ones_refused():
    assert set(oialr_peft._LAZY) <= set(oialr_peft.__all__)
    assert dir(oialr_peft) == sorted(oialr_peft.__all__)
    for name in oialr_peft.__all__:
        assert getattr(oialr_peft, name) is not None
    with pytest.raises(AttributeError, match="module 'oialr_peft' has no attribute 'nothing'"):
        _ = oialr_peft.nothing


def test_a_saved_adapter_is_loaded_by_the_process_that_saved_it(saved_adapter, bert, make_inputs, outputs_of):
    base, adapter, _ = saved_adapter
    model = PeftModel.from_pretrained(type(bert).from_pretrained(base).eval(), adapter)
    assert_close(outputs_of(model, make_inputs("bert")), outputs_of(bert, make_inputs("bert")))
