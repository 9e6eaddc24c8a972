"""Loads what `test_round_trips.py` saved, in a process of its own, and writes the outputs beside it.

``python reload.py DIRECTORY with`` loads adapters and standalone checkpoints; ``... without`` loads dense models and LoRA
adapters, and must not need this package.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

FORMS = {"with": ("adapter", "low-rank", "residual"), "without": ("dense", "lora")}


def load(case: Path, form: str, cls: Any, dtype: torch.dtype) -> Any:
    directory = case / form
    if form in ("dense", "low-rank"):
        return cls.from_pretrained(directory, dtype=dtype)
    base = cls.from_pretrained(case / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, directory, autocast_adapter_dtype=False)


def main(root: Path, which: str) -> None:
    if which == "with":
        import oialr_peft  # noqa: F401
    for case in sorted(path for path in root.iterdir() if (path / "case.json").is_file()):
        described = json.loads((case / "case.json").read_text())
        cls, dtype = getattr(transformers, described["class"]), getattr(torch, described["dtype"])
        inputs = torch.load(case / "inputs.pt")
        for form in FORMS[which]:
            if not (case / form).is_dir():
                continue
            start = time.perf_counter()
            model = load(case, form, cls, dtype).eval()
            seconds = time.perf_counter() - start
            with torch.no_grad():
                output = model(**inputs)[0]
            torch.save({"output": output, "seconds": seconds}, case / f"{form}.pt")
            print(case.name, form, f"loaded in {seconds:.2f} s", flush=True)
    assert ("oialr_peft" in sys.modules) == (which == "with")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2])
