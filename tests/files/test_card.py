"""The section of a model card: exact rows, code that runs, one section however often it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import BertForSequenceClassification

from oialr_peft import OIALRConfig, OIALRUpdate, save_low_rank
from oialr_peft.files import card, card_text, described
from oialr_peft.files.described import Run, SavedLayer, SavedModel
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.saved import saved_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning"),  # of tiny layers
]

START, END = "<!-- oialr_peft: adapter default -->", "<!-- /oialr_peft: adapter default -->"
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 0.5, "init_weights": False}


def adapted(model, **settings):
    return get_peft_model(model, OIALRConfig(**{"mode": "replace", **FACTORED, **settings}))


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


# ---- tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.*.attention.self.query"),
        ("h.3.mlp.1", "h.*.mlp.*"),
        ("layer1.conv2d", "layer1.conv2d"),
        ("up", "up"),
    ],
)
def test_a_group_is_the_name_without_indices(name, group):
    assert described.layer_group(name) == group


def test_a_row_holds_the_figures_of_its_group():
    layers = [
        SavedLayer("encoder.0.query", 16, 16, 3),
        SavedLayer("encoder.0.up", 24, 16, 4),
        SavedLayer("encoder.1.query", 16, 16, 6),
        SavedLayer("encoder.1.up", 24, 16, None),
        SavedLayer("encoder.2.query", 16, 16, 5),
        SavedLayer("pooler", 10, 200, None),
        SavedLayer("encoder.3.query", 16, 8, 1),
    ]
    assert rows_of(card_text.layers_table(layers)) == [
        # 35·3 + 38·6 + 37·5 = 518; 768 / 518
        ["`encoder.*.query`", "3", "16×16", "3 / 4.7 / 6", "768", "518", "1.48×"],
        # 44·4 + 24·16 = 560
        ["`encoder.*.up`", "2", "24×16", "4 / 4.0 / 4, 1 dense", "768", "560", "1.37×"],
        ["`pooler`", "1", "10×200", "dense", "2,000", "2,000", "1.00×"],
        ["`encoder.*.query`", "1", "16×8", "1 / 1.0 / 1", "128", "25", "5.12×"],
        ["**all**", "7", "", "", "3,664", "3,103", "1.18×"],
    ]


def test_all_columns_but_the_first_are_aligned_to_the_right():
    header, ruler, _ = card_text.layers_table([]).splitlines()
    assert header == "| layers | count | m×n | rank: min / mean / max | parameters, dense | stored | compression |"
    assert ruler == "|---|--:|--:|--:|--:|--:|--:|"


def test_settings_are_shown_as_they_are_written():
    assert rows_of(card_text.settings_table({"freeze_when": "stable", "delay": 0.1})) == [
        ["`freeze_when`", "`'stable'`"],
        ["`delay`", "`0.1`"],
    ]


def test_a_run_says_when_layers_were_factored():
    history = [
        OIALRUpdate(step=10, trainable=900, total=1000, seconds=0.25),
        OIALRUpdate(step=20, trainable=500, total=1000, seconds=0.5, frozen=["a.0.q", "a.1.q", "b"]),
        OIALRUpdate(step=30, trainable=123, total=1000, seconds=0.5),
        OIALRUpdate(step=4000, trainable=120, total=1000, seconds=0.5, frozen=["a.2.q"]),
    ]
    lines, factored, metrics = card_text.run_text(Run(4321, history, {"eval_loss": 0.123456})).split("\n\n")
    assert lines.splitlines() == [
        "- optimizer steps: 4,321",
        "- checks: 4, which took 1.75 s in all",
        "- trainable parameters, of the dense model's 1,000: 90.00 % after the first check (step 10), "
        "12.00 % after the last (step 4,000)",
    ]
    assert rows_of(factored) == [
        ["`a.*.q`", "2", "20", "50.00 %"],
        ["`b`", "1", "20", "50.00 %"],
        ["`a.*.q`", "1", "4,000", "12.00 %"],
    ]
    assert rows_of(metrics) == [["`eval_loss`", "0.1235"]]


def test_a_run_without_checks_or_evaluation_says_so():
    assert card_text.run_text(Run(3, [], {})) == "- optimizer steps: 3\n- checks: none"


def test_the_citation_is_the_one_of_the_readme():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    assert f"```bibtex\n{card_text.CITATION}\n```" in readme


# ---- how to load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [("gpt2", "gpt2"), ("owner/name", "owner/name"), ("/a/path", None), ("a/b/c", None), ("", None), (None, None)],
)
def test_only_names_of_repositories_are_shown_as_such(name, found):
    assert card.hub_id(name) == found


def test_a_directory_is_no_repository_even_if_its_name_could_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert card.hub_id("owner/name") is None


def test_the_code_names_base_model_class_labels_and_folder():
    saved = SavedModel((), "second", "BertForSequenceClassification", 3)
    assert card_text.adapter_loading(saved, location="owner/adapter", base_model="owner/base").splitlines() == [
        "```python",
        "import oialr_peft  # registers the method with PEFT",
        "from peft import PeftModel",
        "from transformers import BertForSequenceClassification",
        "",
        'base_model = BertForSequenceClassification.from_pretrained("owner/base", num_labels=3)',
        'model = PeftModel.from_pretrained(base_model, "owner/adapter", subfolder="second")',
        "```",
    ]


def test_the_code_names_the_revision_of_the_base_model():
    saved = SavedModel((), base_class="BertModel")
    text = card_text.adapter_loading(saved, location="owner/adapter", base_model="owner/base", revision="v2")
    assert 'BertModel.from_pretrained("owner/base", revision="v2")\n' in text


def test_the_reader_is_told_what_to_fill_in():
    bert = SavedModel((), base_class="BertModel")
    text = card_text.adapter_loading(bert, location="x", base_model=None, from_scratch=True)
    assert text.startswith("The adapter holds every weight. Let `config` be")
    assert "base_model = BertModel(config)\n" in text
    for saved, base_model in ((bert, None), (SavedModel(()), "owner/base")):
        text = card_text.adapter_loading(saved, location="x", base_model=base_model)
        assert text.startswith("Let `base_model` be the model that the adapter was trained on.")
        assert "base_model =" not in text
    assert card_text.low_rank_loading(SavedModel(()), location="x").startswith("Let `Model` be the class of the model.")


@pytest.mark.parametrize("settings", [FACTORED, {"mode": "pretraining"}], ids=["replace", "pretraining"])
def test_the_code_loads_the_adapter(settings, tmp_path, monkeypatch, bert, make_model, make_inputs, outputs_of):
    monkeypatch.chdir(tmp_path)
    base = make_model("bert", torch.float32)
    base.save_pretrained("base-directory")
    model = get_peft_model(
        BertForSequenceClassification.from_pretrained("base-directory"),
        OIALRConfig(**{"mode": "replace", **settings}),
    )
    model.eval().save_pretrained("my-adapter")
    text = (tmp_path / "my-adapter" / "README.md").read_text()
    names = {"base_model": base, "config": base.config}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    inputs = make_inputs("bert", torch.float32)
    torch.testing.assert_close(outputs_of(names["model"].eval(), inputs), outputs_of(model, inputs))


# ---- one section ---------------------------------------------------------------------------------------------------------


def test_a_new_section_goes_between_the_introduction_and_the_first_heading():
    text = "# Title\n\nWords.\n\n```md\n## not a heading\n```\n\n## Uses\n\nMore.\n"
    found = card.with_section(text, "made", "adapter default")
    block = f"{START}\nmade\n{END}"
    assert found == text.replace("## Uses", f"{block}\n\n## Uses")


def test_a_card_without_headings_ends_with_the_section():
    assert card.with_section("# Title\n", "made", "adapter default") == f"# Title\n\n{START}\nmade\n{END}\n"
    assert card.with_section("", "made", "adapter default") == f"{START}\nmade\n{END}\n"


def test_writing_again_replaces_the_section_and_nothing_else():
    first = card.with_section("# Title\n\n## Uses\n", r"one \1 \g<0>", "adapter default")
    moved = f"Before.\n{first}\nAfter.\n"
    again = card.with_section(moved, r"two \1", "adapter default")
    assert again == moved.replace(r"one \1 \g<0>", r"two \1")
    assert card.with_section(again, r"two \1", "adapter default") == again


def test_sections_of_several_adapters_stand_in_the_order_they_were_made():
    text = "# Title\n\n## Uses\n"
    for key in ("adapter one", "adapter two", "adapter one"):
        text = card.with_section(text, f"## {key}", key)
    assert text.index("## adapter one") < text.index("## adapter two") < text.index("## Uses")
    assert text.count("## adapter") == 2


def test_copies_of_a_section_become_one():
    block = f"{START}\nold\n{END}"
    found = card.with_section(f"a\n{block}\nb\n{block}\nc\n", "new", "adapter default")
    assert found == f"a\n{START}\nnew\n{END}\nb\n\nc\n"


def test_a_lost_end_marker_does_not_cost_the_words_below_it():
    text = f"{START}\nold\n\nMine.\n\n## Uses\n"
    for _ in range(2):
        text = card.with_section(text, "new", "adapter default")
    assert "Mine." in text
    assert text.count("new") == 1


def test_windows_line_ends_are_kept():
    found = card.with_section("# Title\r\n\r\n## Uses\r\n", "one\ntwo", "adapter default")
    assert found.count("\n") == found.count("\r\n")


# ---- when it is written --------------------------------------------------------------------------------------------------


def test_saving_an_adapter_again_updates_its_section(tmp_path, bert):
    model = adapted(bert)
    model.save_pretrained(tmp_path)
    file = tmp_path / "README.md"
    first = file.read_text()
    file.write_text(first.replace("**all**", "**old**") + "\nMine.\n")
    model.save_pretrained(tmp_path)
    again = file.read_text()
    assert again.count(START) == again.count(END) == 1
    assert "**old**" not in again
    assert again.rstrip().endswith("Mine.")
    assert again.rstrip().removesuffix("Mine.").rstrip() == first.rstrip()


def test_the_section_describes_the_saved_layers(tmp_path, bert):
    model = adapted(bert)
    dense = next(iter(adapter_layers(model).values()))
    dense.set_dense("default", torch.randn(dense.out_features, dense.in_features, dtype=torch.float64))
    model.save_pretrained(tmp_path)
    saved = saved_model(model)
    text = ModelCard.load(tmp_path / "README.md").text
    assert card_text.layers_table(saved.layers) in text
    assert [layer.name for layer in saved.layers if layer.rank is None] == [dense.name]
    assert (saved.base_class, saved.num_labels) == ("BertForSequenceClassification", 3)
    assert card_text.settings_table(model.peft_config["default"].resolved().shown()) in text
    assert "| `rank` | `0.5` |" in text


def test_the_method_of_a_residual_adapter_is_another_one(tmp_path, bert):
    get_peft_model(bert, OIALRConfig(mode="adapter")).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert card_text.CORRECTION_METHOD in text
    assert card_text.METHOD not in text


def test_other_adapters_have_sections_on_the_card_that_the_hub_shows(tmp_path, bert):
    model = adapted(bert)
    model.add_adapter("second", OIALRConfig(**{"mode": "replace", **FACTORED, "rank": 2}))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert not (tmp_path / "second" / "README.md").exists()
    assert text.count(START) == text.count("<!-- oialr_peft: adapter second -->") == 1
    assert "## OIALR adapter `second`" in text
    assert f'from_pretrained(base_model, "{tmp_path.name}", subfolder="second")' in text
    assert text.index("## OIALR adapter\n") < text.index("## OIALR adapter `second`") < text.index("## Model Details")


def test_only_an_adapter_that_was_just_saved_has_a_card(tmp_path, bert):
    model = adapted(bert)
    config = model.peft_config["default"]
    config.save_pretrained(str(tmp_path / "before"))
    model.save_pretrained(tmp_path / "saved")
    config.save_pretrained(str(tmp_path / "after"))
    assert [path.parent.name for path in tmp_path.glob("*/README.md")] == ["saved"]


def test_other_processes_than_the_main_one_write_no_card(tmp_path, bert):
    adapted(bert).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_transformers_saves_has_a_card_too(tmp_path, make_model):
    model = make_model("bert", torch.float32)
    model.add_adapter(OIALRConfig(**{"mode": "replace", **FACTORED}), adapter_name="mine")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("<!-- oialr_peft: adapter mine -->") == 1


def test_a_local_base_model_is_not_given_to_the_hub(tmp_path, make_model):
    make_model("bert", torch.float32).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert data.base_model is None
    assert data.tags == ["transformers", "peft", "oialr"]
    assert "Let `base_model` be" in (tmp_path / "adapter" / "README.md").read_text()


def test_metadata_of_the_user_is_kept(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("---\nlicense: mit\ntags:\n- mine\nbase_model: theirs/base\nlanguage: en\n---\n\n# Title\n")
    options = {"key": "adapter default", "library": "peft", "tags": card.ADAPTER_TAGS, "title": "unused"}
    for _ in range(2):
        card.write_section(tmp_path, "made", base_model="ours/base", **options)
    assert file.read_text() == (
        "---\nlicense: mit\ntags:\n- mine\n- peft\n- oialr\nbase_model: theirs/base\nlanguage: en\nlibrary_name: peft\n---\n"
        f"\n# Title\n\n{START}\nmade\n{END}\n"
    )


def test_a_low_rank_checkpoint_has_a_card_without_the_tag_of_peft(tmp_path, bert):
    model = adapted(bert)
    for _ in range(2):
        save_low_rank(model, tmp_path / "low")
    found = ModelCard.load(tmp_path / "low" / "README.md")
    assert found.data.to_dict() == {"library_name": "transformers", "tags": ["oialr"]}
    assert found.text.startswith("\n# low\n")
    assert found.text.count("<!-- oialr_peft: low-rank weights -->") == 1
    assert card_text.layers_table(saved_model(model).layers) in found.text


def test_collecting_weights_without_saving_writes_nothing(tmp_path, monkeypatch, bert):
    monkeypatch.chdir(tmp_path)
    get_peft_model_state_dict(adapted(bert))
    assert not list(tmp_path.iterdir())


def test_the_section_of_a_loaded_adapter_is_that_of_the_saved_one(tmp_path, bert, make_model):
    adapted(bert).save_pretrained(tmp_path / "one" / "adapter")
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path / "one" / "adapter")
    loaded.save_pretrained(tmp_path / "two" / "adapter")
    one, two = ((tmp_path / name / "adapter" / "README.md").read_text() for name in ("one", "two"))
    assert one == two
