"""What is promised in SECURITY.md: nothing is unpickled, no code comes from files, no path leaves, no network at import."""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import oialr_peft
from oialr_peft import OIALRConfig, save_low_rank
from oialr_peft.files.checkpoints import tensors_in
from oialr_peft.storage.conversion import convert
from oialr_peft.storage.inspection import inspect_checkpoint

PACKAGE = Path(oialr_peft.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "oialr_cli").glob("*.py")])
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 3}

pytestmark = pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning")  # of tiny layers

# modules that read pickles, run programs or open connections
REFUSED_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "yaml"),
    *("subprocess", "socket", "urllib", "http", "requests", "httpx", "ctypes", "multiprocessing"),
}
# names of functions that run text as code, unpickle, or run programs, wherever they come from
REFUSED_CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile", "input"),
    *("system", "popen", "spawnv", "execv", "execve", "unpickle", "torch_load"),
}


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """Every file of the package, with each node of its syntax tree."""
    return [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Place, dotted name, and each call in the package."""
    for path, node in nodes():
        if isinstance(node, ast.Call):
            yield f"{path.name}:{node.lineno}", ast.unparse(node.func), node


def imports() -> Iterator[tuple[str, str]]:
    for path, node in nodes():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((f"{path.name}:{node.lineno}", name) for name in names)


def test_the_package_imports_nothing_that_unpickles_runs_or_connects():
    found = list(imports())
    assert len(found) > 200
    assert [each for each in found if each[1].partition(".")[0] in REFUSED_MODULES] == []


def test_the_package_calls_nothing_that_runs_text_or_unpickles():
    found = list(calls())
    assert len(found) > 1000
    # `re.compile` and the method `eval` of a model are others
    strange = [(place, name) for place, name, _ in found if name.rpartition(".")[2] in REFUSED_CALLS]
    assert [each for each in strange if not (each[1] == "re.compile" or each[1].endswith(".eval"))] == []
    assert [place for place, name, _ in found if name in ("torch.load", "np.load", "numpy.load", "yaml.load")] == []


def test_modules_are_imported_by_names_that_stand_in_the_package():
    names = [(place, ast.unparse(node.args[0])) for place, name, node in calls() if name.endswith("import_module")]
    assert [name for _, name in names] == ["_LAZY[name]"]


def test_models_are_read_without_their_own_code():
    for place, name, node in calls():
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name.endswith("AutoConfig.from_pretrained"):
            assert given.get("trust_remote_code") == "False", place
        assert given.get("trust_remote_code", "False") == "False", place
        assert given.get("weights_only", "True") == "True", place


# an audit hook sees what really happens, in every library
WATCHED = """
import json, sys
SEEN = []
def watch(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby", "urllib.", "http.client", "ftplib.")):
        SEEN.append([event, repr(arguments)])
    if EVERYTHING and event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec"):
        SEEN.append([event, repr(arguments)])
EVERYTHING = False
sys.addaudithook(watch)
import oialr_peft
import oialr_peft.trainer.trainer, oialr_peft.report, oialr_peft.report.run, oialr_peft.report.comparison
import oialr_peft.storage.inspection, oialr_peft.storage.conversion, oialr_peft.report.estimate, oialr_peft.storage.hub, oialr_cli.app
at_import = list(SEEN)
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from oialr_peft.storage.inspection import inspect_checkpoint
base, adapter, standalone = sys.argv[1:]
AutoModelForSequenceClassification.from_pretrained(base)  # imports what transformers needs
PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), adapter)
del SEEN[:]
EVERYTHING = True
PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), adapter)
AutoModelForSequenceClassification.from_pretrained(standalone)
inspect_checkpoint(adapter), inspect_checkpoint(standalone)
EVERYTHING = False
print(json.dumps([at_import, SEEN]))
"""


def test_an_import_opens_no_connection_and_loading_runs_nothing(tmp_path, make_model):
    base = make_model("bert", torch.float32)
    base.save_pretrained(tmp_path / "base")
    save_low_rank(
        get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **FACTORED})),
        tmp_path / "standalone",
    )
    network = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(network, OIALRConfig(target_modules=["0"], **{"mode": "replace", **FACTORED})).save_pretrained(
        tmp_path / "adapter"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    directories = [tmp_path / name for name in ("base", "adapter", "standalone")]
    output = subprocess.run(
        [sys.executable, "-Wignore", "-c", WATCHED, *directories],
        env=environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    at_import, loading = json.loads(output.splitlines()[-1])
    assert at_import == []
    assert loading == []


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_model):
    directory = tmp_path_factory.mktemp("saved") / "model"
    adapted = get_peft_model(
        make_model("bert", torch.float32),
        OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **FACTORED}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tiny layers are no smaller as factors
        save_low_rank(adapted, directory, max_shard_size="3KB")
    return directory


@pytest.fixture
def standalone(saved, tmp_path):
    """A standalone checkpoint in shards, in a directory that holds nothing else."""
    return shutil.copytree(saved, tmp_path / "model")


def point_to(standalone: Path, name: str) -> None:
    """Lets the index say that everything is in another file, where everything is."""
    index = standalone / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("trick", ["parent", "absolute", "inside and out", "home"])
def test_an_index_cannot_name_files_elsewhere(trick, standalone, tmp_path):
    tensors = {key: value for path in standalone.glob("*.safetensors") for key, value in load_file(path).items()}
    elsewhere = tmp_path / "elsewhere.safetensors"
    save_file(tensors, elsewhere, {"format": "pt"})
    name = {
        "parent": "../elsewhere.safetensors",
        "absolute": str(elsewhere),
        "inside and out": "a/../../elsewhere.safetensors",
        "home": "~/elsewhere.safetensors",
    }[trick]
    point_to(standalone, name)
    with pytest.raises(ValueError, match=r"must map tensors to files beside it, but has"):
        inspect_checkpoint(str(standalone))
    with pytest.raises((ValueError, OSError), match=r"is outside|elsewhere\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(standalone)


def test_a_relative_directory_with_dots_is_the_users_own(standalone, monkeypatch):
    (standalone.parent / "work").mkdir()
    monkeypatch.chdir(standalone.parent / "work")
    assert AutoModelForSequenceClassification.from_pretrained("../model").config.num_labels == 3
    assert inspect_checkpoint("../model").kind == "low-rank checkpoint"


def test_links_are_followed_as_the_cache_of_the_hub_needs(standalone, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in standalone.glob("*.safetensors"):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("..", "blobs", file.name))
    assert AutoModelForSequenceClassification.from_pretrained(standalone).config.num_labels == 3


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "logging", 3, "BertConfig"])
def test_a_configuration_names_a_model_class_or_nothing(name, standalone, tmp_path):
    config = json.loads((standalone / "config.json").read_text())
    (standalone / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(ValueError, match="names no class of transformers"):
        convert(str(standalone), "dense", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


# ---- bounds ----------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**62, 2**64 - 1])
def test_a_header_that_lies_about_its_length_costs_nothing(length, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    before = peak_memory()
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        tensors_in(file)
    assert peak_memory() - before < 10_000_000


def sparse(file: Path, shape: list[int]) -> None:
    """A file whose header tells the truth about a tensor of zeros that takes no room on the disk."""
    size = 4 * shape[0] * shape[1]
    header = json.dumps(
        {"base_model.model.0.oialr_weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    )
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header.encode())
        opened.truncate(8 + len(header) + size)


def test_a_tensor_of_a_terabyte_is_refused_by_its_header(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    settings = {"target_modules": ["0"], "delay": 0.5}
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), OIALRConfig(**{"mode": "replace", **settings})).save_pretrained(
        tmp_path
    )
    sparse(tmp_path / "adapter_model.safetensors", [2**18, 2**20])
    before = peak_memory()
    assert inspect_checkpoint(str(tmp_path)).bytes == 2**40
    with pytest.raises(ValueError, match=r"has shape \(262144, 1048576\), but \(4, 4\) would fit"):
        PeftModel.from_pretrained(base, tmp_path)
    assert peak_memory() - before < 50_000_000
