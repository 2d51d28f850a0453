"""Progress of long work: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Board:
    """Set of tasks shown together. Use as a context manager.

    ``console`` may be given to share one with other output; its being a terminal decides.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bars = None
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("[dim]left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                speed_estimate_period=60,
            )

    def __enter__(self) -> Board:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars:
            self._bars.stop()

    def task(self, title: str, total: int | None = None, parent: Task | None = None) -> Task:
        """Add a task of ``total`` units (``start`` may set it); its parent advances with it."""
        return Task(self, title, total, parent)


class Task:
    """One bar of a board."""

    def __init__(self, board: Board, title: str, total: int | None, parent: Task | None) -> None:
        self.board, self.title, self.parent = board, title, parent
        self.done, self.total = 0, total
        self._started_at: float | None = None
        self._started_from = 0
        self._id = None
        if board._bars:
            self._id = board._bars.add_task(title, total=total, start=False, note="")

    def start(self, total: int, done: int = 0) -> None:
        """The clock runs from here. ``done`` units were done in an earlier run."""
        self._started_at = time.monotonic()
        self.total, self.done, self._started_from = total, done, done
        if self.parent:
            self.parent.advance(done)
        if self.board._bars:
            self.board._bars.start_task(self._id)
            self.board._bars.update(self._id, total=total, completed=done)

    def advance(self, units: int = 1) -> None:
        self.done += units
        if self.board._bars:
            self.board._bars.advance(self._id, units)
        if self.parent:
            self.parent.advance(units)

    def say(self, note: str) -> None:
        """Note beside the bar; where there is no bar, a line with the time left."""
        if self.board._bars:
            self.board._bars.update(self._id, note=note)
            return
        whole = self.parent or self
        line = f"{self.title} {self.done}/{self.total}: {note}; {whole.time_left()} left"
        self.tell(line)

    def tell(self, line: str) -> None:
        """A line of its own, above the bars."""
        self.board.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def time_left(self) -> str:
        """Minutes and seconds at the speed so far."""
        if self._started_at is None or self.done == self._started_from:
            return "?"
        per_unit = (time.monotonic() - self._started_at) / (self.done - self._started_from)
        minutes, seconds = divmod(round(per_unit * (self.total - self.done)), 60)
        return f"{minutes}:{seconds:02d}"
