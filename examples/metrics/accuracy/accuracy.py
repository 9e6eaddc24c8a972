"""Share of the predictions that are right, as `evaluate.load("accuracy")` computes it, from this folder instead of the Hub."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """Called with `predictions` and `references`, class numbers both."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class numbers, as many of both",
            features=datasets.Features(predictions=datasets.Value("int32"), references=datasets.Value("int32")),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
