"""``blockprune demo``: tickets found at initialisation, on real data, in a few minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from blockprune.cli.output import INTERRUPTED
from blockprune.cli.progress import Bar
from blockprune.data import load_digits
from blockprune.lottery.experiment import Policy, tickets_at_initialisation
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import Progress as TrainingProgress
from blockprune.models import resnet32
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.report import comparison_table, reading_notes, staged_folder, write_report

__all__ = ["Settings", "demo_command", "settings_of"]


@dataclass(frozen=True)
class Settings:
    """What the demo trains, and how long.

    The digits stay at their native 8x8 pixels: enlarging them adds nothing but time.
    """

    recipe: Recipe
    policy: Policy
    test_share: float = 0.3


def settings_of(*, quick: bool, seed: int) -> Settings:
    """Return the demo's settings: 20 epochs, or 3 with ``quick``."""
    epochs = 3 if quick else 20
    recipe = Recipe(
        epochs=epochs,
        lr=0.1,
        weight_decay=5e-4,
        schedule="one_cycle",
        warmup_epochs=0.3 * epochs,
        batch_size=64,
        seed=seed,
    )
    return Settings(recipe, Policy(recover_p=5))


def demo_command(out: Path, quick: bool, seed: int, force: bool) -> int:
    """Train a dense ResNet32 and its GraSP tickets on digits, and report the comparison.

    Args:
        out: folder of the results.
        quick: fewer epochs: under 40 seconds instead of under 4 minutes.
        seed: of the split, the weights, the scoring batch and the data order.
        force: write into a folder that is not empty.

    Returns:
        The exit code: 0, or 130 after Ctrl-C, when ``out`` is as it was before.

    Raises:
        BlockpruneError: ``out`` is in the way, or ``seed`` is negative.
    """
    return run_demo(settings_of(quick=quick, seed=seed), out, force=force)


def run_demo(settings: Settings, out: Path, *, force: bool = False) -> int:
    """Run the demo with any settings; see :func:`demo_command`."""
    console = Console(highlight=False)
    try:
        with staged_folder(out, force=force) as folder:
            data = load_digits(test_share=settings.test_share, seed=settings.recipe.seed)
            with preserved_rng():
                seed_rng(settings.recipe.seed)
                dense = resnet32(data.num_classes, in_channels=data.image_shape[0])
            with _one_thread(), _DemoBar(settings) as watcher:
                result = tickets_at_initialisation(
                    dense, data, settings.recipe, settings.policy, name="ResNet32", watcher=watcher
                )
            files = write_report(result, folder)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; nothing was written to {out}.", err=True)
        return INTERRUPTED
    console.print(comparison_table(result))
    console.print()
    for note in reading_notes(result):
        console.print(note, markup=False)
    console.print(f"\nWritten to {out}: {', '.join(files)}", markup=False)
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    # Operations on 8x8 images are too small to share: more threads gain a sixth on an idle
    # machine and lose many times that on a busy one, and one thread makes steadier figures.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _DemoBar(Bar):
    """The experiment's watcher: one bar over all steps of all networks."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._networks = 1 + len(settings.policy.ps)

    def stage(self, text: str) -> None:
        """Show what begins."""
        self.update(description=text)

    def step(self, p: int, step: TrainingProgress) -> None:
        """Advance by one training step."""
        name = "dense" if p == 0 else f"p={p}  "
        self.update(
            description=f"Epoch {step.epoch:>2}/{step.epochs}  {name}  loss {step.loss:.3f}",
            total=self._networks * step.epochs * step.iterations,
            advance=1,
        )
