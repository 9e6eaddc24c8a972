r"""OIALR in a training loop of your own: interrupt it, resume it, and end where an uninterrupted run ends.

A small vision transformer learns scikit-learn's 8×8 digits (nothing to download):

    python examples/02_accelerate_loop.py

On several processes, here two on the CPU; without `--cpu`, on two GPUs:

    accelerate launch --config_file examples/accelerate_configs/two_processes.yaml \
        examples/02_accelerate_loop.py --cpu
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, ViTConfig, get_linear_schedule_with_warmup

from oialr_peft import OIALRConfig, OIALRController, rank_table


class Run:
    """Everything that one process makes before its first step: data, model, optimizer, schedule, controller."""

    def __init__(self, *, steps: int, learning_rate: float, seed: int, cpu: bool) -> None:
        set_seed(seed)
        self.accelerator = Accelerator(cpu=cpu)
        self.steps = steps
        digits = load_digits()
        pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8), -1 … 1
        data = train_test_split(
            pixels, torch.tensor(digits.target), test_size=0.25, stratify=digits.target, random_state=0
        )
        x_train, self.x_validation, y_train, self.y_validation = data

        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            num_labels=10,
        )
        model = AutoModelForImageClassification.from_config(config)
        model = get_peft_model(model, OIALRConfig(mode="pretraining", delay=0.3, cutoff=0.4, stability_threshold=0.99))
        # the optimizer after the adapter: it must hold the parameters that the adapter trains
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        scheduler = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
        loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True, drop_last=True)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.controller = OIALRController(self.model, self.optimizer, total_steps=steps)
        self.accelerator.register_for_checkpointing(self.controller)

    def batches(self, start: int, stop: int) -> Iterator[list[torch.Tensor]]:
        """The batches of optimizer steps `start` … `stop`; each epoch has an order of its own."""
        step = start
        while step < stop:
            epoch, done = divmod(step, len(self.loader))
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, done) if done else self.loader
            for batch in loader:
                if step == stop:
                    return
                yield batch
                step += 1

    def train(self, stop: int) -> None:
        """Go on until optimizer step `stop`."""
        self.model.train()
        start = self.controller.steps
        for pixels, labels in tqdm(self.batches(start, stop), total=stop - start, desc=f"steps {start} to {stop}"):
            loss = self.model(pixel_values=pixels, labels=labels).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.controller.step()  # after each optimizer step, with gradients cleared

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the validation images that are classified correctly."""
        self.model.eval()
        logits = self.model(pixel_values=self.x_validation.to(self.accelerator.device)).logits
        return float((logits.argmax(-1).cpu() == self.y_validation).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/accelerate_loop"), help="where checkpoints go")
    parser.add_argument("--max_steps", type=int, default=400, help="optimizer steps of the whole run")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the images")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, also if there is a GPU")
    args = parser.parse_args()
    settings = {"steps": args.max_steps, "learning_rate": args.learning_rate, "seed": args.seed, "cpu": args.cpu}
    checkpoint = args.output_dir / "state"

    run = Run(**settings)
    run.train(args.max_steps // 2)
    run.accelerator.save_state(str(checkpoint))
    run.train(args.max_steps)

    resumed = Run(**settings)  # as a new process would make it: dense layers, fresh optimizer
    resumed.accelerator.load_state(str(checkpoint))
    resumed.train(args.max_steps)

    say = run.accelerator.print  # on the main process only
    say(f"\n{rank_table(resumed.model)}\n")
    say(f"processes: {run.accelerator.num_processes}")
    say(f"trainable parameters: {resumed.controller.history[-1].trainable_percent:.1f} % of the dense model")
    say(f"accuracy: {run.accuracy():.2%} uninterrupted, {resumed.accuracy():.2%} resumed at step {args.max_steps // 2}")
    same = all(torch.equal(a, b) for a, b in zip(run.model.parameters(), resumed.model.parameters(), strict=True))
    say(f"weights equal bit for bit: {same}")


if __name__ == "__main__":
    main()
