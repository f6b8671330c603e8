# SPDX-License-Identifier: Apache-2.0
"""Progress bars for a terminal."""

from __future__ import annotations

from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from onnxcollapse.rewriting.progress import Progress, Task


class RichTask(Task):
    """One bar, taken away when its work ends."""

    def __init__(self, bars: rich_progress.Progress, description: str, total: int) -> None:
        self._bars = bars
        self._id = bars.add_task(description, total=total or None)

    def advance(self, steps: int = 1) -> None:
        """Moves the bar."""
        self._bars.advance(self._id, steps)

    def update(self, done: int, total: int) -> None:
        """Sets the bar."""
        self._bars.update(self._id, completed=done, total=total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.remove_task(self._id)


class _Rate(rich_progress.ProgressColumn):
    """Steps a second, once there is a rate."""

    def render(self, task: rich_progress.Task) -> Text:
        """Writes the rate."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s", justify="right")


class RichProgress(Progress):
    """A stack of bars with rate and remaining time."""

    def __init__(self, console: Console) -> None:
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            _Rate(),
            rich_progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def start(self) -> RichProgress:
        """Shows the bars."""
        self._bars.start()
        return self

    def stop(self) -> None:
        """Takes the bars away."""
        self._bars.stop()

    def task(self, description: str, total: int) -> RichTask:
        """Adds a bar."""
        return RichTask(self._bars, description, total)
