"""Real data that is there without a download, and tokenizers made from it; what the examples use unless told otherwise.

With a dataset and a model from the Hub, an example needs nothing of this.
"""

import ast
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def language_reference() -> list[str]:
    """Python's language reference as `help()` shows it: 79 texts, 465 kB of English, part of every CPython."""
    return [topics[name] for name in sorted(topics)]


def docstrings(library: str) -> dict[str, str]:
    """First paragraphs of the docstrings in a library's source files, with the name of what each describes.

    The files are read without importing the library. A paragraph that describes several names is kept once.
    """
    folder = Path(find_spec(library).origin).parent
    files = [file for file in sorted(folder.rglob("*.py")) if "tests" not in file.parts]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    described = [
        (node.name, ast.get_docstring(node) or "")
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    names = {" ".join(text.split("\n\n")[0].split()): name for name, text in described}
    return {text: names[text] for text in sorted(names) if len(text) > 30}


def byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
