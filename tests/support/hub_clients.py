"""What the processes of `test_hub.py` do, each a function: ``python hub_clients.py FUNCTION DIRECTORY``.

They leave what they found in the directory; `test_hub.py` looks at that and at the server.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
TOKEN, OTHER_TOKEN = "hf_owner", "hf_other"
LABELS = 3

_BLOCK = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


def inputs() -> Any:
    import torch

    return torch.randint(4, 60, (3, 8), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=inputs()).logits


def failure(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- pushing -------------------------------------------------------------------------------------------------------------


def push(directory: Path) -> None:
    """Push a base model, runs with every strategy, an adapter, and low-rank checkpoints."""
    import torch
    from huggingface_hub import HfApi
    from trainer_runs import STEPS, Interrupt, bert
    from transformers import BertForSequenceClassification

    from oialr_peft import save_low_rank

    bert(num_labels=LABELS).push_to_hub("base")
    on_hub: dict[str, Any] = {"push_to_hub": True, "hub_always_push": True}
    for strategy in STRATEGIES:
        trainer = trained_from_hub(directory / f"run-{strategy}", hub_strategy=strategy, **on_hub)
        HfApi().create_branch(f"owner/run-{strategy}", branch="before")
        trainer.push_to_hub()
    stop = Interrupt(STEPS // 2)
    trained_from_hub(directory / "stopped", hub_strategy="checkpoint", callbacks=[stop], **on_hub)
    model = trainer.model
    torch.save(logits(model), directory / "logits.pt")

    model.push_to_hub("adapter", tags=["mine"])
    edit_card("owner/adapter")
    model.push_to_hub("adapter", commit_message="again")

    save_low_rank(model, directory / "low-rank", push_to_hub=True)  # the directory names the repository
    for size in (4_000, 8_000, "5GB"):  # more shards than the next time
        save_low_rank(
            model, directory / f"sharded-{size}", push_to_hub=True, repo_id="shards", max_shard_size=size, private=None
        )
        if size == 4_000:
            HfApi().create_branch("owner/shards", branch="sharded")
    save_low_rank(
        model, directory / "secret", push_to_hub=True, repo_id="owner/secret", private=True, commit_message="hidden"
    )
    failures = {
        "invalid": failure(lambda: save_low_rank(model, directory / "no", push_to_hub=True, token="hf_wrong")),
        "other": failure(
            lambda: save_low_rank(model, directory / "no", push_to_hub=True, repo_id="owner/base", token=OTHER_TOKEN)
        ),
        "private": failure(lambda: BertForSequenceClassification.from_pretrained("owner/secret", token=OTHER_TOKEN)),
    }
    (directory / "failures.json").write_text(json.dumps(failures))


def push_low_rank(directory: Path) -> None:
    """Push one low-rank checkpoint."""
    import torch
    from peft import get_peft_model
    from trainer_runs import bert

    from oialr_peft import OIALRConfig, save_low_rank

    config = OIALRConfig(
        mode="replace", task_type="SEQ_CLS", freeze_when="delay", delay=0, rank=0.5, init_weights=False
    )
    model = get_peft_model(bert(), config)
    torch.save(logits(model), directory / "logits.pt")
    save_low_rank(model, directory / "low-rank", push_to_hub=True)


def trained_from_hub(directory: Path, **settings: Any) -> Any:
    """A run on the base model; a repository that it pushes to is called as its directory."""
    from peft import get_peft_model
    from trainer_runs import SETTINGS, STEPS, trained
    from transformers import BertForSequenceClassification

    from oialr_peft import OIALRConfig

    base = BertForSequenceClassification.from_pretrained("owner/base", num_labels=LABELS)
    model = get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **SETTINGS}))
    return trained(
        directory,
        model=model,
        save_strategy="steps",
        save_steps=STEPS // 2,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        **settings,
    )


def edit_card(repository: str) -> None:
    """Write a sentence before and one after our section, as an owner does on the Hub, and let the section be out of date."""
    from huggingface_hub import HfApi, ModelCard

    card = ModelCard.load(repository)
    start = card.text.index("<!-- oialr_peft")
    section = card.text[start:].replace("**all**", "**out of date**")
    card.text = f"{card.text[:start]}Mine, before.\n\n{section}\nMine, after.\n"
    card.data["license"] = "mit"
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repository)


# ---- loading -------------------------------------------------------------------------------------------------------------


def load(directory: Path) -> None:
    """Load everything by name; write down how far each model's logits are from those that were pushed."""
    card_code(directory, "owner/adapter")  # first, while nothing has imported the package

    import torch
    from huggingface_hub import ModelCard, snapshot_download
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification

    import oialr_peft  # noqa: F401  (registers the method)

    low_rank = AutoModelForSequenceClassification.from_pretrained
    base = low_rank("owner/base")
    models = {
        "adapter": PeftModel.from_pretrained(base, "owner/adapter"),
        "auto": AutoPeftModelForSequenceClassification.from_pretrained("owner/adapter"),
        "trainer": AutoPeftModelForSequenceClassification.from_pretrained("owner/run-end"),
        "low-rank": low_rank("owner/low-rank"),
        "one file after shards": low_rank("owner/shards"),
        "shards": low_rank("owner/shards", revision="sharded"),
        "private": low_rank("owner/secret"),
    }
    expected = torch.load(directory / "logits.pt")
    found: dict[str, Any] = {name: float((logits(model) - expected).abs().max()) for name, model in models.items()}
    found["card"] = ModelCard.load("owner/adapter").data.to_dict()

    stopped = Path(snapshot_download("owner/stopped", allow_patterns="last-checkpoint/*"), "last-checkpoint")
    resumed = trained_from_hub(directory / "resumed", resume=str(stopped))
    found["resumed"] = float((logits(resumed.model) - expected).abs().max())
    found["resumed at"] = json.loads((stopped / "trainer_state.json").read_text())["global_step"]
    (directory / "loaded.json").write_text(json.dumps(found))


def card_code(directory: Path, repository: str) -> None:
    """Run the code of a card as it is written there, and save the logits of the `model` that it makes."""
    import torch
    from huggingface_hub import ModelCard

    assert "oialr_peft" not in sys.modules
    names: dict[str, Any] = {}
    exec(_BLOCK.search(ModelCard.load(repository).text)[1], names)
    torch.save(logits(names["model"]), directory / f"{repository.replace('/', '-')}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    function, target, *arguments = sys.argv[1:]
    globals()[function](Path(target), *arguments)
