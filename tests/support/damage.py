"""Ways to damage a checkpoint, by accident or on purpose. Each gets a source of randomness and the content of a file."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

NUMBERS = [0, 1, 2, 3, 5, 8, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e300]
TEXTS = [
    "",
    ".",
    "..",
    "../../../etc/passwd",
    "/etc/passwd",
    "C:\\windows\\system32",
    "~/.ssh/id_rsa",
    "$(touch owned)",
    "__class__.__init__.__globals__",
    "https://example.org/model.safetensors",
    "a" * 5000,
    "\u202e",
    "base_model.model..oialr_u",
    ".oialr_sigma",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"": {}}, [1, 2], {"a": 1}, float("nan"), float("inf")]


def _strange(random: Random) -> Any:
    return random.choice([*NUMBERS, *TEXTS, *OTHERS])


# ---- any file --------------------------------------------------------------------------------------------------------


def _flipped(content: bytes, position: int, random: Random) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content))]


def extend(random: Random, content: bytes) -> bytes:
    return content + random.randbytes(random.choice([1, 8, 100]))


def flip(random: Random, content: bytes) -> bytes:
    return _flipped(content, random.randrange(len(content)), random)


def overwrite(random: Random, content: bytes) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + random.randbytes(random.choice([1, 4, 16])) + content[start + 4 :]


def zero_block(random: Random, content: bytes) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + bytes(len(content[start : start + 64])) + content[start + 64 :]


# ---- safetensors -----------------------------------------------------------------------------------------------------


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip_header(random: Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return _flipped(content, random.randrange(8 + length), random)


def flip_data(random: Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return _flipped(content, random.randrange(8 + length, len(content)), random)


def lie_about_header(random: Random, content: bytes) -> bytes:
    length = random.choice([0, 1, 7, len(content), 10**8, 10**8 + 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + content[8:]


def nest_header(random: Random, content: bytes) -> bytes:
    depth = random.choice([100, 1000, 100_000])
    return joined(b'{"__metadata__":' + b"[" * depth + b"]" * depth + b"}", b"")


def edit_header(random: Random, content: bytes) -> bytes:
    header, data = parts_of(content)
    key = random.choice([name for name in header if name != "__metadata__"])
    entry = header[key]
    edit = random.choice(["shape", "dtype", "offset", "name", "drop", "entry", "metadata", "duplicate", "swap"])
    if edit == "shape":
        entry["shape"] = random.choice(
            [entry["shape"][::-1], [*entry["shape"], 1], [], [math.prod(entry["shape"])], [0, 2**62], _strange(random)]
        )
    elif edit == "dtype":
        entry["dtype"] = random.choice(["F16", "F64", "I32", "U32", "I64", "BF16", "BOOL", "F8_E4M3", "x", 3, None])
    elif edit == "offset":
        entry["data_offsets"][random.randrange(2)] = random.choice([*NUMBERS, len(data), len(data) + 1])
    elif edit == "name":
        header[random.choice([*TEXTS, f"{key}x", key.upper()])] = header.pop(key)
    elif edit == "drop":
        del header[key]
    elif edit == "entry":
        header[key] = _strange(random)
    elif edit == "metadata":
        header["__metadata__"] = random.choice([_strange(random), {"format": "np"}, {"format": _strange(random)}, {}])
    elif edit == "duplicate":
        header[f"{key}.copy"] = entry
    else:
        other = random.choice([name for name in header if name != "__metadata__"])
        header[key], header[other] = header[other], header[key]
    return joined(header, data)


def edit_tensors(random: Random, content: bytes) -> bytes:
    """A well-formed file of other tensors."""
    tensors = load(content)
    key = random.choice(list(tensors))
    tensor = tensors[key]
    edit = random.choice(["cut", "dtype", "swap", "drop", "not finite", "empty", "huge", "name", "layer", "more"])
    if edit == "cut":
        tensor = tensor[tuple(slice(random.randint(1, max(size, 1))) for size in tensor.shape)]
    elif edit == "dtype":
        tensor = tensor.to(random.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
    elif edit == "swap":
        other = random.choice(list(tensors))
        tensor, tensors[other] = tensors[other].clone(), tensor.clone()
    elif edit == "not finite":
        tensor = torch.full_like(tensor.float(), random.choice([math.nan, math.inf, -math.inf]))
    elif edit == "empty":
        tensor = tensor.new_zeros(random.choice([(), (0,), (0, 0), (0, 3), (3, 0)]))
    elif edit == "huge":
        tensor = tensor.new_zeros(random.choice([(1, 1000), (1000, 1), (200, 200), (2, 2, 2)]))
    elif edit in ("name", "drop"):
        tensors.pop(key)
        key = random.choice([*TEXTS, f"{key}x", key.replace("oialr_", "lora_"), f"base_model.model.{key}"])
    elif edit == "layer":
        layer = key.rpartition(".")[0]
        tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{layer}.")}
        return save(tensors, {"format": "pt"})
    else:
        tensors[f"{key}.{random.choice(TEXTS)}"] = tensor.clone()
    if edit != "drop":
        tensors[key] = tensor.contiguous()
    return save(tensors, {"format": "pt"})


TENSOR_DAMAGES: list[Callable[[Random, bytes], bytes]] = [
    cut,
    extend,
    overwrite,
    zero_block,
    flip_header,
    flip_header,
    flip_data,
    lie_about_header,
    nest_header,
    edit_header,
    edit_header,
    edit_tensors,
    edit_tensors,
]


# ---- JSON ------------------------------------------------------------------------------------------------------------


def nest(random: Random, content: bytes) -> bytes:
    depth = random.choice([100, 2000, 100_000])
    return b'{"a":' * depth + b"1" + b"}" * depth if random.random() < 0.5 else b"[" * depth


def whole(random: Random, content: bytes) -> bytes:
    return json.dumps(_strange(random)).encode()


def long_number(random: Random, content: bytes) -> bytes:
    return re.sub(rb"\d+", b"9" * random.choice([400, 5000]), content, count=random.randint(1, 3))


def edit_json(random: Random, content: bytes) -> bytes:
    """Another value, another name, or one more, anywhere in the tree."""
    tree = json.loads(content)
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        inner = [key for key in keys if isinstance(place[key], (dict, list)) and place[key]]
        if not inner or random.random() < 0.3:
            break
        place = place[random.choice(inner)]
    key = random.choice(keys)
    if isinstance(place, dict) and random.random() < 0.3:
        place[random.choice([*TEXTS, f"{key}x"])] = place.pop(key) if random.random() < 0.5 else _strange(random)
    elif random.random() < 0.2:
        del place[key]
    else:
        near = [place[key] + 1, -place[key]] if isinstance(place[key], int) else []
        place[key] = random.choice([*near, _strange(random)])
    return json.dumps(tree).encode()


JSON_DAMAGES: list[Callable[[Random, bytes], bytes]] = [
    cut,
    extend,
    flip,
    overwrite,
    nest,
    whole,
    long_number,
    *[edit_json] * 5,
]
