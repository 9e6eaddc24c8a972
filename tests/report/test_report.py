"""Tables, plots and pages: what they show, that they are harmless, and how they look in a browser."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace

import pytest
import torch
from browser import LOW_CONTRAST, PLOTS, chromium, needs_chromium
from peft import get_peft_model
from safetensors.torch import save_file
from tiny_runs import HOSTILE, record, train

from oialr_peft import OIALRConfig, plot_history, rank_table
from oialr_peft.report.comparison import Comparison
from oialr_peft.report.labels import common_prefix, kinds, layer_ticks, short_names
from oialr_peft.report.plots import layers_of, trainable_at
from oialr_peft.report.run import run_report
from oialr_peft.report.spectra import spectra_of_checkpoint, spectra_of_model
from oialr_peft.storage.record import RECORD_NAME, find_record, read_record, write_record
from oialr_peft.tuner.lookup import adapter_layers

FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 3}
pytestmark = pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run that was really trained."""
    directory = tmp_path_factory.mktemp("runs") / "tiny-bert"
    train(directory)
    return directory


@pytest.fixture(scope="module")
def pages(run):
    """Files of pages: of a trained run, of 240 layers, of hostile names, without evaluations, and of two runs."""
    files = {"trained": run_report(run)}
    made = {
        "large": record(80),
        "hostile": record(hostile=True),
        "residual, not evaluated": record(1, stable=False, evaluated=False),
    }
    for name, one in made.items():
        write_record(one, run.parent / name)
        files[name] = run_report(run.parent / name)
    files["two"] = Comparison.of(run, run.parent / "hostile").to_html()
    for name, text in files.items():
        (run.parent / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: run.parent / f"{name}.html" for name in files}


# ---- tables --------------------------------------------------------------------------------------------------------------


def test_the_table_has_sums_and_shares(mlp):
    model = get_peft_model(mlp, OIALRConfig(target_modules=["up", "down"], **{"mode": "replace", **FACTORED}))
    table = rank_table(model)
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "shape", "rank", "of", "share", "phase", "trainable", "stored", "compression"]
    # 9 of 60 and of 50; (10 + 6 + 3)·3 = 57, (5 + 10 + 3)·3 = 54
    assert lines[2].split() == ["up", "10×6", "3", "6", "50%", "factored", "9", "57", "1.05×"]
    assert lines[3].split() == ["down", "5×10", "3", "5", "60%", "factored", "9", "54", "0.93×"]
    assert lines[4].split() == ["all", "2", "ø", "3.0", "ø", "5.5", "55%", "18", "(16.4%)", "111", "0.99×"]


def test_long_names_lose_their_middle(mlp):
    table = rank_table(get_peft_model(mlp, OIALRConfig(target_modules=["up"], **{"mode": "replace", **FACTORED})))
    table[0] = table[0]._replace(name="block." * 30 + "up")
    first = str(table).splitlines()[2].split()[0]
    assert len(first) == 56
    assert first.startswith("block.block")
    assert first.endswith(".up")


# ---- names ---------------------------------------------------------------------------------------------------------------


def test_few_layers_are_named_and_many_are_grouped():
    few = ["m.h.0.q", "m.h.0.k", "m.h.1.q"]
    assert [tick.text for tick in layer_ticks(few)] == ["0.q", "0.k", "1.q"]
    many = [f"m.h.{block}.{kind}" for block in range(40) for kind in "qkvo"]
    ticks = layer_ticks(many, limit=10)
    assert len(ticks) == 10
    assert ticks[1] == (17.5, "h.4")
    both = [f"{stack}.{block}.{kind}" for stack in ("encoder", "decoder") for block in range(9) for kind in "qk"]
    assert {tick.text.split(".")[0] for tick in layer_ticks(both, limit=12)} == {"encoder", "decoder"}


def test_a_prefix_ends_between_parts():
    assert common_prefix(["layer.10.q", "layer.11.q"]) == "layer."
    assert common_prefix(["q", "qk"]) == ""
    assert short_names(["only.one"]) == ["only.one"]


def test_kinds_beyond_the_limit_are_one():
    names = [f"h.{block}.{kind}" for block in range(2) for kind in "abcdef"] + ["head"]
    found = kinds(names, limit=4)
    assert len(found) == 4
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    assert len(found["others"]) == 7


# ---- plots ---------------------------------------------------------------------------------------------------------------


def panels(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_the_history_alone_has_three_plots(tmp_path):
    figure = plot_history(record().history, tmp_path / "history.png")
    assert panels(figure) == ["Stability of dense layers", "Rank of factored layers", "Trainable parameters"]
    assert (tmp_path / "history.png").stat().st_size > 10_000


def test_the_heatmap_has_a_cell_for_each_layer_and_check():
    history = record().history
    mesh = plot_history(history).axes[0].collections[0]
    cells = mesh.get_array().reshape(len(layers_of(history)), len(history))
    for row, name in enumerate(layers_of(history)):
        measured = [update.stability.get(name) for update in history]
        assert cells[row].tolist() == measured  # masked cells are None


def test_lines_follow_the_ranks():
    history = record(1).history
    lines = plot_history(history).axes[1].lines
    for line, name in zip(lines, layers_of(history), strict=True):
        points = [(update.step, update.ranks[name][1]) for update in history if name in update.ranks]
        assert list(zip(*line.get_data(), strict=True)) == points


def test_a_metric_and_spectra_have_plots_of_their_own(mlp):
    made = record()
    model = get_peft_model(mlp, OIALRConfig(target_modules=["up", "down"], **{"mode": "replace", **FACTORED}))
    figure = plot_history(made.history, metric=made.log, spectra=model)
    assert panels(figure)[3:] == ["eval_loss against trainable parameters", "Spectrum of Σ"]
    points = figure.axes[3].lines[1].get_data()
    assert list(points[0]) == [trainable_at(made.history, step) for step in (50, 100)]
    assert list(points[1]) == [made.curve("eval_loss")[step] for step in (50, 100)]
    figure = plot_history(made.history, metric={50: 0.5, 100: 0.7}, metric_name="F1")
    assert panels(figure)[3:] == ["F1 against trainable parameters"]


def test_a_metric_that_was_not_logged_is_named():
    made = record()
    with pytest.raises(ValueError, match="no 'eval_f1'. Set `metric_name` to one of: eval_accuracy, eval_loss, loss"):
        plot_history(made.history, metric=made.log, metric_name="eval_f1")
    with pytest.raises(ValueError, match="must hold at least one check, but is empty"):
        plot_history([])


def test_spectra_of_model_and_checkpoint_are_singular_values(mlp, tmp_path):
    model = get_peft_model(mlp, OIALRConfig(target_modules=["up", "down"], **{"mode": "replace", **FACTORED}))
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.trained_parameter("default"))  # as after training: not diagonal
    model.save_pretrained(tmp_path)
    found = spectra_of_model(model)
    for name, layer in adapter_layers(model).items():
        sigma = torch.linalg.svd(layer.adapter_weight("default")).S[:3]
        torch.testing.assert_close(torch.tensor(found[name], dtype=sigma.dtype), sigma, rtol=1e-5, atol=1e-6)
    assert spectra_of_checkpoint(tmp_path) == {name: pytest.approx(values) for name, values in found.items()}
    (tmp_path / "adapter_model.safetensors").unlink()
    assert spectra_of_checkpoint(tmp_path) == {}
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="refused"):
        spectra_of_checkpoint(tmp_path)


# ---- pages ---------------------------------------------------------------------------------------------------------------


def test_a_page_has_everything_about_the_run(pages, run):
    text = pages["trained"].read_text()
    read = read_record(run / RECORD_NAME)
    layers = re.search(r'<table id="layers".*?</table>', text, re.DOTALL)[0]
    for layer in read.layers:
        assert layers.count(f'<th scope="row">{layer.name}</th>') == 1
    headings = re.findall(r"<h3>(.*?)</h3>", text)
    assert headings == [
        "Loss",
        "Trainable parameters",
        "Validation loss against trainable parameters",
        "Stability of dense layers",
        "Rank of factored layers",
        "Spectrum of Σ",
    ]
    for name, value in {**read.settings, **read.arguments}.items():
        assert f'<th scope="row">{name}</th>' in text
        assert repr(value).replace("'", "&#39;") in text
    assert "After 24 of 24 optimizer steps, 13 of 13 layers are factored" in text
    rows = re.search(r'<table id="checks">.*?</table>', text, re.DOTALL)[0].count("<tr>")
    assert rows == len(read.history) + 1


def test_names_are_text_and_nothing_is_loaded(pages):
    for name, file in pages.items():
        text = file.read_text()
        assert HOSTILE not in text
        assert text.count("<script>") == 1
        outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!#|data:image/png)([^"\')\s>]+)', text)
        assert outside == [], name
        assert not re.search(r'\son\w+="', text)
    assert "&lt;script&gt;" in pages["hostile"].read_text()


def test_pages_are_well_formed_and_ids_are_unique(pages):
    for file in pages.values():
        text = file.read_text()
        ids = Counter(re.findall(r'\sid="([^"]*)"', text))
        assert [key for key, count in ids.items() if count > 1] == []
        for reference in re.findall(r'(?:url\(#|href="#|labelledby=")([^")]+)', text):
            assert reference in ids
        body = re.search(r"<main.*</main>", text, re.DOTALL)[0]
        ET.fromstring(body)  # elements are closed where they should be


def test_a_page_says_what_is_missing(tmp_path, run):
    write_record(record(1, stable=False, evaluated=False), tmp_path)
    text = run_report(tmp_path)
    assert "no Stability to plot" in text
    assert "Set `eval_strategy`" in text
    assert "the spectrum of Σ is left out" in text
    assert "Stability of dense layers" not in text


def test_a_metric_that_was_measured_once_is_no_plot(tmp_path):
    made = record(1)
    once = [entry for entry in made.log if "eval_accuracy" not in entry or entry["step"] == 100]
    for log, plots in ((made.log, 1), (once, 0)):
        write_record(replace(made, log=log), tmp_path)
        assert run_report(tmp_path).count("<h3>Validation accuracy</h3>") == plots


def test_the_spectrum_of_other_ranks_is_not_shown(tmp_path):
    made = record(1)
    write_record(made, tmp_path)
    key = f"base_model.model.{made.layers[0].name}.oialr_sigma"
    save_file({key: torch.eye(5)}, tmp_path / "adapter_model.safetensors")
    assert "Spectrum of Σ" not in run_report(tmp_path)
    save_file({key: torch.eye(made.layers[0].rank)}, tmp_path / "adapter_model.safetensors")
    assert "Spectrum of Σ" in run_report(tmp_path)


def test_a_comparison_has_figures_settings_and_ranks(run, tmp_path):
    write_record(record(), tmp_path / "other")
    found = Comparison.of(run, tmp_path / "other").to_dict()
    one, other = read_record(find_record(run)), record()
    assert found["runs"] == ["tiny-bert", "other"]
    assert found["figures"]["eval_loss"] == [one.final_metrics["eval_loss"], other.final_metrics["eval_loss"]]
    assert found["figures"]["eval_accuracy"][0] is None
    assert found["figures"]["rank_mean"] == [one.rank_mean, other.rank_mean]
    assert found["differing_settings"]["learning_rate"] == [5e-3, 1e-3]
    assert found["ranks"][other.layers[0].name] == [None, other.layers[0].rank]
    same = Comparison.of(run, run)
    assert same.differing_settings == {}


@needs_chromium
def test_a_browser_shows_pages_without_errors_overflow_or_empty_plots(pages):
    with chromium() as browser:
        for name, file in pages.items():
            for width in (400, 1400):
                for scheme in ("light", "dark"):
                    browser.open(file, width=width, scheme=scheme)
                    where = f"{name}, {width} px, {scheme}"
                    assert browser.run("return document.documentElement.scrollWidth") <= width, where
                    plots = browser.run(PLOTS)
                    assert plots, where
                    for plot in plots:
                        assert plot["width"] > 250, (where, plot)
                        assert plot["height"] > 150, (where, plot)
                        assert plot["marks"] > 0, (where, plot)
                        assert not plot["outside"], (where, plot)
                    assert browser.run(LOW_CONTRAST) == [], where
                    assert browser.messages() == [], where
                    dark = browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
                    assert dark == (scheme == "dark")
                    assert "owned" not in browser.driver.title
        browser.open(pages["trained"], width=1400, scheme="light")
        ranks = (
            "return [...document.querySelectorAll('#layers tbody tr')].map((row) => Number(row.cells[3].textContent))"
        )
        click = "document.querySelectorAll('#layers thead button')[3].click()"
        original = browser.run(ranks)
        for expected in (sorted(original), sorted(original, reverse=True), original):
            browser.run(click)
            assert browser.run(ranks) == expected


@needs_chromium
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    """Overflow, an empty plot, grey on grey, and a script that the page's policy forbids."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<title>x</title></head><body><p style="color: #999">grey</p><div style="width: 900px">wide</div>'
        '<svg class="plot" aria-label="empty" viewBox="0 0 10 10"></svg><script>document.title = 1</script></body></html>'
    )
    with chromium() as browser:
        browser.open(page, width=400, scheme="light")
        assert browser.run("return document.documentElement.scrollWidth") > 400
        assert [plot["marks"] for plot in browser.run(PLOTS)] == [0]
        assert any(found.startswith("P grey") for found in browser.run(LOW_CONTRAST))
        assert any("Content Security Policy" in message for message in browser.messages())
