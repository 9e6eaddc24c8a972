"""Files are written whole or not at all: what a failed save finds in a directory is there afterwards, byte for byte."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_runs import record
from torch import nn
from trainer_runs import adapted, trained
from transformers import AutoModelForSequenceClassification

from oialr_peft import OIALRConfig, save_dense, save_lora, save_low_rank
from oialr_peft.files.writing import replacing, replacing_in
from oialr_peft.storage.record import write_record
from oialr_peft.trainer.resume import last_complete_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning")  # of tiny layers
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 3}
RESIDUAL = {"mode": "adapter", "rank": 2}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files cannot grow beyond `room` bytes: writes fail in the kernel, as on a full disk."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own setting: an error, not the end
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def shown() -> Iterator[Path]:
    """A directory that every user reaches, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="oialr-"))
    yield directory
    shutil.rmtree(directory)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nothing can be made in the directory; permissions are nothing to root, who is nobody meanwhile."""
    directory.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        directory.chmod(0o755)


SAVES: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "low-rank": (FACTORED, save_low_rank),
    "low-rank shards": (FACTORED, lambda model, directory: save_low_rank(model, directory, max_shard_size="3KB")),
    "dense": (FACTORED, save_dense),
    "lora": (RESIDUAL, save_lora),
}


def model_of(make_model: Callable[..., nn.Module], settings: dict[str, Any]) -> PeftModel:
    return get_peft_model(
        make_model("bert", torch.float32),
        OIALRConfig(task_type="SEQ_CLS", init_weights=False, **{"mode": "replace", **settings}),
    )


@pytest.mark.parametrize("form", SAVES)
@pytest.mark.parametrize("room", [100, 2000, 4500])
def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(form, room, tmp_path, make_model):
    settings, save = SAVES[form]
    model, directory = model_of(make_model, settings), tmp_path / "saved"
    save(model, directory)
    (directory / "notes.txt").write_text("mine")
    before = contents(directory)
    with full_disk(room), pytest.raises(OSError, match=rf"{directory}` could not be written: .*(large|os error 27)"):
        save(model_of(make_model, settings), directory)
    assert contents(directory) == before


@pytest.mark.parametrize("form", SAVES)
def test_a_read_only_directory_is_named_and_unchanged(form, shown, make_model):
    settings, save = SAVES[form]
    model = model_of(make_model, settings)
    save(model, shown)
    before = contents(shown)
    with locked(shown), pytest.raises(OSError, match=rf"{shown}` could not be written: .*Permission denied"):
        save(model, shown)
    assert contents(shown) == before


def test_a_new_checkpoint_takes_the_place_of_one_with_other_files(tmp_path, make_model):
    model = model_of(make_model, FACTORED)
    save_low_rank(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_low_rank(model, tmp_path, max_shard_size="3KB")
    assert not (tmp_path / "model.safetensors").exists()
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    save_low_rank(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_link_is_replaced_not_written_through(tmp_path, make_model):
    outside = tmp_path / "blob"
    outside.write_bytes(b"of another checkpoint")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model.safetensors").symlink_to(outside)
    save_low_rank(model_of(make_model, FACTORED), tmp_path / "saved")
    assert outside.read_bytes() == b"of another checkpoint"


def test_a_record_and_a_card_stay_when_the_disk_is_full(tmp_path):
    write_record(record(), tmp_path)
    before = contents(tmp_path)
    with full_disk(500), pytest.raises(OSError, match=r"oialr_history.json` could not be written: .*too large"):
        write_record(record(4), tmp_path)
    assert contents(tmp_path) == before


def test_files_of_any_error_are_removed(tmp_path):
    def write_half(place: Any) -> None:
        with place as unfinished:
            (unfinished / "file" if unfinished.is_dir() else unfinished).write_text("half")
            raise KeyboardInterrupt

    for place in (replacing(tmp_path / "file"), replacing_in(tmp_path)):
        with pytest.raises(KeyboardInterrupt):
            write_half(place)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_network_keep_their_own_words(tmp_path):
    def push() -> None:
        with replacing_in(tmp_path):
            raise ConnectionError("the Hub is away")

    with pytest.raises(ConnectionError, match="^the Hub is away$"):
        push()


@pytest.mark.filterwarnings("ignore:.*not written to its end:UserWarning")
@pytest.mark.parametrize("failing", ["state", pytest.param("adapter", marks=pytest.mark.slow)])
def test_a_run_whose_disk_is_full_resumes_from_its_last_checkpoint(failing, tmp_path, monkeypatch):
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trained(tmp_path, model=adapted(), save_strategy="steps", save_steps=6, max_steps=6)
    before = contents(tmp_path / "checkpoint-6")
    writer = {
        "adapter": "peft.peft_model.safe_save_file",
        "state": "oialr_peft.engine.state.save_file",
    }
    monkeypatch.setattr(writer[failing], no_space)
    with pytest.raises(OSError, match="No space left on device"):
        trained(tmp_path, model=adapted(), save_strategy="steps", save_steps=6, max_steps=12, resume=True)
    monkeypatch.undo()
    assert contents(tmp_path / "checkpoint-6") == before
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    resumed = trained(tmp_path, model=adapted(), save_strategy="steps", save_steps=6, max_steps=12, resume=True)
    assert resumed.oialr_controller.steps == 12


@pytest.mark.filterwarnings("ignore:.*not written to its end:UserWarning")
def test_a_checkpoint_of_an_earlier_run_that_is_written_over_in_part_is_not_complete(tmp_path, monkeypatch):
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    trained(tmp_path, model=adapted(), **options)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    monkeypatch.setattr("oialr_peft.engine.state.save_file", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        trained(tmp_path, model=adapted(), **options)
    assert (tmp_path / "checkpoint-6" / "oialr_state.safetensors").is_file()
    assert last_complete_checkpoint(tmp_path) is None


def test_safetensors_fails_in_words_of_its_own(tmp_path):
    """Why errors of safetensors are named: it leaves out which file it could not write."""
    with full_disk(10), pytest.raises(Exception, match="os error 27") as raised:
        save_file({"weight": torch.zeros(1000)}, tmp_path / "file.safetensors")
    assert "file.safetensors" not in str(raised.value)
