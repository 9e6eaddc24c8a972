"""The Hub: what is pushed loads elsewhere by name, with a model card that is right and stays one."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import hub_clients
import pytest
import torch
from hub import HubClient, HubServer
from hub_clients import OTHER_TOKEN, STRATEGIES, TOKEN
from huggingface_hub import ModelCard

from oialr_peft.engine.state import STATE_NAME

CLIENTS = hub_clients.__file__
START, END = "<!-- oialr_peft: adapter default -->", "<!-- /oialr_peft: adapter default -->"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A server after one process pushed everything; with what that process left, and processes that load."""
    directory = tmp_path_factory.mktemp("hub")
    with HubServer(directory / "objects", {TOKEN: "owner", OTHER_TOKEN: "other"}) as server:
        client = HubClient(server, directory)
        client.run(CLIENTS, "push", str(directory), token=TOKEN)
        yield SimpleNamespace(server=server, client=client, directory=directory)
        assert server.unknown == []


@pytest.fixture(scope="module")
def loaded(pushed):
    """What a new process with an empty cache found."""
    pushed.client.run(CLIENTS, "load", str(pushed.directory), token=TOKEN)
    return json.loads((pushed.directory / "loaded.json").read_text())


def test_what_was_pushed_computes_the_same_elsewhere(loaded):
    kinds = ("adapter", "auto", "trainer", "low-rank", "shards", "one file after shards", "private")
    for kind in kinds:
        assert loaded[kind] < 1e-6, kind


def test_the_code_of_the_card_runs_as_it_is_written(pushed, loaded):
    found, expected = (torch.load(pushed.directory / name) for name in ("owner-adapter.pt", "logits.pt"))
    torch.testing.assert_close(found, expected)


def test_a_pushed_checkpoint_resumes_to_the_same_model(loaded):
    assert loaded["resumed at"] == 12
    assert loaded["resumed"] == 0


def test_pushing_twice_updates_one_section_and_keeps_the_words_around_it(pushed):
    text = pushed.server.text("owner/adapter")
    assert text.count(START) == text.count(END) == 1
    assert text.index("Mine, before.") < text.index(START) < text.index(END) < text.index("Mine, after.")
    assert pushed.server.repositories["owner/adapter"].titles[-1] == "again"
    assert "**all**" in text
    assert "out of date" not in text


def test_the_metadata_of_the_card_is_what_the_hub_searches_by(loaded):
    card = loaded["card"]
    assert card["tags"] == ["mine", "peft", "oialr"]
    assert card["base_model"] == "owner/base"
    assert card["library_name"] == "peft"
    assert card["license"] == "mit"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pushed_run_has_the_summary_and_the_figures_on_one_card(pushed, strategy):
    card = ModelCard(pushed.server.text(f"owner/run-{strategy}"))
    assert {"peft", "oialr"} <= set(card.data.tags)
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "peft"
    assert card.text.count(START) == 1
    assert "### Training hyperparameters" in card.text
    assert "- optimizer steps: 24\n" in card.text
    assert re.search(r"- checks: 8, which took \d+\.\d\d s in all\n", card.text)
    assert re.search(r"\| `eval_loss` \| \d\.\d+ \|", card.text)
    assert f'PeftModel.from_pretrained(base_model, "owner/run-{strategy}")' in card.text


def test_each_strategy_pushes_what_it_promises(pushed):
    def paths(strategy, revision):
        return set(pushed.server.files(f"owner/run-{strategy}", revision))

    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    state = {"optimizer.pt", "trainer_state.json", STATE_NAME, *adapter}
    assert paths("end", "before") == {".gitattributes"}
    for strategy in STRATEGIES:
        assert adapter <= paths(strategy, "main")
    for strategy in STRATEGIES[1:]:
        assert adapter <= paths(strategy, "before")
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-12", "checkpoint-24"}}
    for strategy in STRATEGIES:
        expected = folders.get(strategy, set())
        assert {path.partition("/")[0] for path in paths(strategy, "main") if "/" in path} == expected
        assert {f"{folder}/{name}" for folder in expected for name in state} <= paths(strategy, "main")


def test_a_card_is_there_before_the_run_ends(pushed):
    text = pushed.server.files("owner/stopped")["README.md"].decode()
    assert text.count(START) == 1
    assert "- optimizer steps: 12\n" in text


def test_low_rank_checkpoints_have_cards_of_their_own(pushed):
    card = ModelCard(pushed.server.text("owner/low-rank"))
    assert card.data.tags == ["oialr"]
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "owner/base"
    assert card.text.count("<!-- oialr_peft: low-rank weights -->") == 1
    assert 'BertForSequenceClassification.from_pretrained("owner/low-rank")' in card.text


def test_weights_of_an_earlier_push_are_gone(pushed):
    def weights(revision):
        return sorted(path for path in pushed.server.files("owner/shards", revision) if "safetensors" in path)

    assert "model.safetensors.index.json" in weights("sharded")
    assert len(weights("sharded")) > 3
    assert weights("main") == ["model.safetensors"]


def test_private_repositories_and_wrong_tokens(pushed):
    assert pushed.server.repositories["owner/secret"].private
    assert not pushed.server.repositories["owner/low-rank"].private
    assert pushed.server.repositories["owner/secret"].titles[-1] == "hidden"
    failures = json.loads((pushed.directory / "failures.json").read_text())
    assert "401" in failures["invalid"]
    assert "Invalid credentials" in failures["invalid"]
    assert "403" in failures["other"]
    assert "Make sure your token has the correct permissions" in failures["other"]
    assert "is not a local folder and is not a valid model identifier" in failures["private"]


@pytest.mark.slow
def test_the_code_of_a_low_rank_card_runs_as_it_is_written(pushed):
    pushed.client.run(CLIENTS, "card_code", str(pushed.directory), "owner/shards", token=None)
    found, expected = (torch.load(pushed.directory / name) for name in ("owner-shards.pt", "logits.pt"))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_where_xet_is_installed_small_files_are_pushed_too(tmp_path):
    with HubServer(tmp_path / "objects", {TOKEN: "owner"}, large_files=False) as server:
        client = HubClient(server, tmp_path)
        client.run(CLIENTS, "push_low_rank", str(tmp_path), token=TOKEN, xet=True)
        client.run(CLIENTS, "card_code", str(tmp_path), "owner/low-rank", token=None, xet=True)
        assert server.unknown == []
    found, expected = (torch.load(tmp_path / name) for name in ("owner-low-rank.pt", "logits.pt"))
    torch.testing.assert_close(found, expected)
