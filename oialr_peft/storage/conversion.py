"""From a saved checkpoint to another form: loads the model it belongs to, then calls what `export` has for the form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import transformers
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from oialr_peft.storage.export import DenseExport, save_dense, save_lora, save_low_rank
from oialr_peft.storage.inspection import Inspection, inspect_checkpoint, require_source
from oialr_peft.tuner.config import OIALRConfig

Form = Literal["low-rank", "dense", "lora"]
_HEADS = ("classifier", "score", "classifier.out_proj")  # modules whose rows are the labels
# by PEFT's task types
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def convert(source: str, form: Form, output: str | os.PathLike[str], *, base: str | None = None) -> DenseExport | None:
    """Write a checkpoint in another form.

    Args:
        source: directory or repository of an adapter or a low-rank checkpoint; of a run, its last checkpoint.
        form: to write.
        output: directory to write to.
        base: directory or repository of the base model; `None` means the one that the adapter names.

    Returns:
        For a dense model, how far its outputs are from those of the checkpoint.

    Raises:
        ValueError: the checkpoint cannot be written in this form, or its base model is not known.
        OSError: the base model does not exist.
    """
    found = inspect_checkpoint(source)
    if found.kind == "low-rank checkpoint":
        if form != "dense":
            raise ValueError(
                f"`{source}` is a low-rank checkpoint already, which becomes dense at most. Use `--to dense`."
            )
        settings = _settings_of(found.location)
        model = _loaded(_class_of(settings, source), found.location, settings)
        return save_dense(model.eval(), output)
    model = _with_adapter(found, base).eval()
    if form == "dense":
        return save_dense(model, output)
    save_low_rank(model, output) if form == "low-rank" else save_lora(model, output)
    return None


def _with_adapter(found: Inspection, base: str | None) -> PeftModel:
    adapter = OIALRConfig.from_pretrained(found.location)
    name = base or adapter.base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise ValueError(f"The adapter `{found.location}` names no base model. Name it with `--base`.")
    require_source(name)
    settings = _settings_of(name)
    labels = _labels(found)
    new_head = labels not in (None, settings.num_labels)
    if new_head:
        settings.num_labels = labels
    model_class = _class_of(settings, name, adapter)
    # an adapter of pretraining holds every weight
    from_scratch = adapter.resolved().releases_base and not _has_weights(name)
    model = _made(model_class, settings) if from_scratch else _loaded(model_class, name, settings, new_head=new_head)
    return PeftModel.from_pretrained(model, found.location)


def _settings_of(name: str) -> Any:
    """The configuration of a model; code that comes with it is refused, not asked about."""
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _made(model_class: Any, settings: Any) -> Any:
    return model_class(settings) if issubclass(model_class, PreTrainedModel) else model_class.from_config(settings)


def _loaded(model_class: Any, name: str, settings: Any, *, new_head: bool = False) -> Any:
    """The model; with `new_head`, a head of another shape in the file, which the adapter holds, is left out."""
    return model_class.from_pretrained(name, config=settings, trust_remote_code=False, ignore_mismatched_sizes=new_head)


def _class_of(settings: Any, name: str, adapter: OIALRConfig | None = None) -> Any:
    """The class that was adapted, which PEFT records by name or by task; else the one that the configuration names."""
    recorded = None
    if adapter is not None:
        mapping = adapter.auto_mapping if isinstance(adapter.auto_mapping, dict) else {}
        recorded = mapping.get("base_model_class") or _TASKS.get(str(adapter.task_type or ""))
    named = recorded or next(iter(settings.architectures or []), None)
    # the name is from a file: nothing but a model class may come of it
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, (PreTrainedModel, _BaseAutoModelClass))):
        raise ValueError(
            f"`{name}` names no class of transformers ({named}). Load it in Python, and save it from there."
        )
    return found


def _labels(found: Inspection) -> int | None:
    """Number of labels of a head that is saved in the adapter."""
    heads = (found.tensors.get(f"base_model.model.{head}.weight") for head in _HEADS)
    return next((head.shape[0] for head in heads if head is not None and head.shape), None)


def _has_weights(name: str) -> bool:
    files = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if Path(name).is_dir():
        return any(Path(name, file).is_file() for file in files)
    return any(HfApi().file_exists(name, file) for file in files)
