"""`rank_table`: rank, phase and size of every layer of an adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from oialr_peft.report.labels import elided
from oialr_peft.tuner.lookup import adapter_layers

NAME_WIDTH = 56  # characters of a layer's name in a printed table; longer ones lose their middle


class LayerRank(NamedTuple):
    """One row of `rank_table`."""

    name: str
    out_features: int
    in_features: int
    rank: int
    phase: str  # "dense" or "factored"
    trainable: int  # parameters that train
    stored: int  # parameters that an adapter checkpoint holds

    @property
    def full_rank(self) -> int:
        """The largest possible rank, k = min(m, n)."""
        return min(self.out_features, self.in_features)

    @property
    def dense(self) -> int:
        """Parameters of the dense weight, m·n."""
        return self.out_features * self.in_features


class RankTable(list[LayerRank]):
    """The rows of `rank_table`; `print` shows them aligned.

    The last line has mean ranks (ø), and sums of parameters with the share of them that trains.
    """

    def __str__(self) -> str:
        header = ("layer", "shape", "rank", "of", "share", "phase", "trainable", "stored", "compression")
        rows = [
            (
                elided(row.name, NAME_WIDTH),
                f"{row.out_features}×{row.in_features}",
                str(row.rank),
                str(row.full_rank),
                f"{row.rank / row.full_rank:.0%}",
                row.phase,
                f"{row.trainable:,}",
                f"{row.stored:,}",
                f"{row.dense / row.stored:.2f}×",
            )
            for row in self
        ]
        return aligned(header, [*rows, self._sum()], left={0, 5})

    def _sum(self) -> tuple[str, ...]:
        rank, full = sum(row.rank for row in self), sum(row.full_rank for row in self)
        trainable, stored, dense = (
            sum(getattr(row, name) for row in self) for name in ("trainable", "stored", "dense")
        )
        return (
            f"all {len(self)}",
            "",
            f"ø {rank / len(self):.1f}",
            f"ø {full / len(self):.1f}",
            f"{rank / full:.0%}",
            "",
            f"{trainable:,} ({trainable / dense:.1%})",
            f"{stored:,}",
            f"{dense / stored:.2f}×",
        )


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table of plain text; columns are aligned to the right but for those with an index in `left`.

    >>> print(aligned(["a", "b"], [["xyz", "1"], ["x", "10"]]))
    a     b
    ---  --
    xyz   1
    x    10
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def rank_table(model: nn.Module, adapter_name: str = "default") -> RankTable:
    """Rank, phase and parameter counts of every layer of an adapter, in module order.

    Args:
        model: a model with an OIALR adapter.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such adapter.

    Examples:
        >>> from peft import get_peft_model
        >>> from oialr_peft import OIALRConfig
        >>> base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> print(rank_table(get_peft_model(base, OIALRConfig(mode="replace", target_modules=["0", "2"]))))
        layer  shape   rank     of  share  phase    trainable  stored  compression
        -----  -----  -----  -----  -----  -----  -----------  ------  -----------
        0        4×6      4      4   100%  dense           24      24        1.00×
        2        2×4      2      2   100%  dense            8       8        1.00×
        all 2         ø 3.0  ø 3.0   100%         32 (100.0%)      32        1.00×
    """
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise ValueError(
            f"The model has no layer with the adapter `{adapter_name}`. Make it with "
            "get_peft_model(model, OIALRConfig()), or pass its `adapter_name`."
        )
    table = RankTable()
    for name, layer in layers.items():
        m, n, rank = layer.out_features, layer.in_features, layer.rank(adapter_name)
        dense = layer.is_dense(adapter_name)
        trains = layer.trained_parameter(adapter_name).requires_grad
        trainable = (m * n if dense else rank * rank) if trains else 0
        stored = m * n if dense else (m + n + rank) * rank
        table.append(LayerRank(name, m, n, rank, "dense" if dense else "factored", trainable, stored))
    return table
