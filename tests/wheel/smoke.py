"""Uses the installed package as a new user without any extra does; `make package` runs it away from the repository."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

import oialr_peft
from oialr_peft import OIALRConfig, OIALRController, OIALRUpdate, plot_history, rank_table


def model() -> torch.nn.Module:
    """Equal weights in every call."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def main() -> None:
    assert Path(oialr_peft.__file__).is_relative_to(sys.prefix), oialr_peft.__file__
    adapted = get_peft_model(
        model(), OIALRConfig(mode="replace", target_modules=["0"], freeze_when="delay", delay=4, update_every=2)
    )
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    controller = OIALRController(adapted, optimizer, total_steps=8)
    for _ in range(8):
        adapted(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert [update.frozen for update in controller.history] == [[], ["0"], [], []]
    print(rank_table(adapted))

    x = torch.randn(4, 8)
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(model(), directory)
        torch.testing.assert_close(loaded(x), adapted(x))
    torch.testing.assert_close(adapted.merge_and_unload()(x), loaded(x))

    from oialr_peft import OIALRTrainer

    assert OIALRTrainer.__mro__[1].__name__ == "OIALRTrainerMixin"
    refusal = "none"
    try:
        plot_history([OIALRUpdate(step=1, total=1)])
    except ImportError as error:
        refusal = str(error)
    assert 'pip install "oialr-peft[plots]"' in refusal, "matplotlib is here, so the package was not installed alone"
    print(f"oialr-peft {oialr_peft.__version__} works on its own")


if __name__ == "__main__":
    main()
