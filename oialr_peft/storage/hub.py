"""Pushing to the Hub: low-rank checkpoints with their cards, and the card in `PeftModel.push_to_hub`."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from oialr_peft.files import card, card_text
from oialr_peft.files.checkpoints import WEIGHT_FILES
from oialr_peft.files.writing import UNFINISHED
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.lookup import active_adapter
from oialr_peft.tuner.saved import saved_model, settings_for_card


def prepared_repository(
    directory: str | os.PathLike[str], repo_id: str | None, *, private: bool | None, token: str | bool | None
) -> str:
    """Make the repository of a directory if it does not exist, and fetch its model card if the directory has none.

    Args:
        directory: what will be uploaded.
        repo_id: of the repository; `None` means the name of the directory.
        private: whether a new repository is private; `None` means the default of the account.
        token: of the account; `None` means the one that is logged in.

    Returns:
        The id of the repository, with its owner.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for instance because of the token.
    """
    api = HfApi(token=token)
    full_id = api.create_repo(repo_id or Path(directory).resolve().name, private=private, exist_ok=True).repo_id
    file = Path(directory, card.CARD_NAME)
    if not file.exists():
        with suppress(EntryNotFoundError):  # of a new repository
            shutil.copy(api.hf_hub_download(full_id, card.CARD_NAME), file)
    return full_id


def write_low_rank_card(
    directory: str | os.PathLike[str], base: PreTrainedModel, adapter_name: str | None, *, repo_id: str | None = None
) -> None:
    """Put the section about a standalone low-rank checkpoint into the model card of its directory.

    Args:
        directory: of the checkpoint.
        base: the model with the adapter that was stored.
        adapter_name: of it; `None` means the active one.
        repo_id: the repository that the directory goes to; `None` names the directory instead.
    """
    name = adapter_name or cast(str, active_adapter(base))
    config = cast(OIALRConfig, base.peft_config[name])
    saved = saved_model(base, name)
    title = (repo_id or str(Path(directory).resolve())).rpartition("/")[2]
    loading = card_text.low_rank_loading(saved, location=repo_id or title)
    card.write_section(
        directory,
        card.section("Low-rank weights (OIALR)", card_text.METHOD, loading, saved.layers, config.resolved().shown()),
        key="low-rank weights",
        library="transformers",
        tags=card.LOW_RANK_TAGS,
        base_model=card.hub_id(base.name_or_path),
        title=title,
    )


def upload(directory: str | os.PathLike[str], repo_id: str, *, token: str | bool | None, commit_message: str) -> None:
    """Upload a transformers checkpoint; weight files of an earlier one in the repository are deleted.

    With fewer or more shards than before they would stay, and `from_pretrained` may prefer them.

    Args:
        directory: of the checkpoint.
        repo_id: of an existing repository.
        token: of the account; `None` means the one that is logged in.
        commit_message: of the upload.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=Path(directory),
        commit_message=commit_message,
        ignore_patterns=f"{UNFINISHED}*",
        delete_patterns=list(WEIGHT_FILES),
    )


def keep_cards_in_pushes() -> None:
    """Let ``PeftModel.push_to_hub`` upload the section about an OIALR adapter.

    transformers' `push_to_hub` first fetches the card of the repository, or makes an empty one; then it saves the model,
    and writes the fetched card over the one that was saved. What follows is only the upload, which this replaces for
    `PeftModel`: by one that writes the section again, into the fetched card. Other adapters are pushed as before, and
    calling this again changes nothing.
    """
    original = getattr(PushToHubMixin, "_upload_modified_files", None)
    if original is None:  # another release of transformers: pushes work, with the card that it makes
        return

    def upload_with_card(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        for name, config in self.peft_config.items():
            if isinstance(config, OIALRConfig):
                card.write_adapter_card(
                    working_dir, settings_for_card(config), saved_model(self, name), repo_id=repo_id
                )
        return original(self, working_dir, repo_id, *args, **kwargs)

    PeftModel._upload_modified_files = upload_with_card  # type: ignore[assignment, method-assign]
