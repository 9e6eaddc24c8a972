"""What is told of checkpoints, from directories and from the Hub, without reading a tensor."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hub import Blob, HubClient, HubServer, Repository
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import train

from oialr_peft import OIALRConfig, save_low_rank
from oialr_peft.storage.inspection import inspect_checkpoint
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.saved import saved_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning"),
    pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning"),  # of tiny layers
]
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 0.5}


@pytest.fixture
def adapted(bert):
    """One layer is dense, the others are factored."""
    model = get_peft_model(bert.float(), OIALRConfig(**{"mode": "replace", **FACTORED}))
    dense = next(iter(adapter_layers(model).values()))
    dense.set_dense("default", torch.randn(dense.out_features, dense.in_features))
    return model


def by_name(layers):
    return sorted(layers, key=lambda layer: layer.name)


def test_an_adapter_is_what_was_saved(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    found = inspect_checkpoint(str(tmp_path))
    assert found.kind == "adapter"
    assert by_name(found.layers) == by_name(saved_model(adapted).layers)
    assert found.format_version == 1
    assert found.settings["rank"] == 0.5
    tensors = load_file(tmp_path / "adapter_model.safetensors").values()
    assert found.bytes == sum(tensor.nbytes for tensor in tensors)
    assert found.stored == sum(tensor.numel() for tensor in tensors)
    assert found.others == 0


def test_a_low_rank_checkpoint_has_its_factored_layers_also_in_shards(adapted, tmp_path):
    expected = [layer for layer in saved_model(adapted).layers if layer.rank is not None]
    for name, options in {"whole": {}, "shards": {"max_shard_size": "3KB"}}.items():
        save_low_rank(adapted, tmp_path / name, **options)
        found = inspect_checkpoint(str(tmp_path / name))
        assert found.kind == "low-rank checkpoint"
        assert by_name(found.layers) == by_name(expected)
        assert found.base_model == "BertForSequenceClassification"
        assert found.others > 0
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_a_run_is_its_last_checkpoint(tmp_path):
    train(tmp_path)
    found = inspect_checkpoint(str(tmp_path))
    assert found.location.endswith("checkpoint-24")
    assert found.record.steps == 24
    assert found.to_dict()["total_steps"] == 24
    assert len(found.layers) == 13


def test_layers_stand_in_natural_order(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    names = [layer.name for layer in inspect_checkpoint(str(tmp_path)).layers]
    assert names == sorted(names)
    assert [name.split(".")[3] for name in names[:-1]] == ["0"] * 6 + ["1"] * 6


def test_other_things_are_named(tmp_path, mlp):
    with pytest.raises(ValueError, match="is no OIALR checkpoint: it has no adapter_config.json"):
        inspect_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="is no directory, and no name of a repository"):
        inspect_checkpoint(str(tmp_path / "nowhere"))
    get_peft_model(mlp, LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter of type 'LORA', not OIALR"):
        inspect_checkpoint(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged or no JSON"):
        inspect_checkpoint(str(tmp_path))


def test_a_damaged_weight_file_is_named(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        inspect_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_a_repository_is_inspected_by_its_headers(adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "saved")
    with HubServer(tmp_path / "objects", {}) as server:
        repository = server.repositories["owner/adapter"] = Repository(private=False)
        files = {
            path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in (tmp_path / "saved").iterdir()
        }
        repository.commit("main", files, "first")
        for blob in files.values():
            (tmp_path / "objects" / blob.sha256).write_bytes(blob.content)
        client = HubClient(server, tmp_path)
        output = client.run("-m", "oialr_cli", "inspect", "owner/adapter", "--json", token=None)
        assert server.unknown == []
    assert client.home.joinpath("cache-1").is_dir()
    found = json.loads(output[output.index("{") :])
    expected = inspect_checkpoint(str(tmp_path / "saved")).to_dict()
    assert found == expected | {"location": "owner/adapter"}
    assert not list(tmp_path.glob("cache-1/**/adapter_model.safetensors"))
    shutil.rmtree(tmp_path / "cache-1")
