"""The bars that :mod:`slim_core.progress` draws on a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text


def new_bars() -> Progress:
    """Return bars on standard error that vanish when they are done."""
    whole = Column(no_wrap=True)  # on a narrow terminal it is the bar that gets shorter
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        _TimeLeft(table_column=whole),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, expand=True)


def advance(bars: Progress, task: TaskID, left: float | None) -> None:
    """Move a bar by one step; ``left`` is the estimate in seconds until its end."""
    bars.update(task, advance=1, left=left, at=time.monotonic())


class _TimeLeft(ProgressColumn):
    """The estimate of the last step, counted down.

    That of rich looks at the last half minute and knows nothing if a step takes longer.
    """

    def render(self, task: Task) -> Text:
        """Return hours, minutes and seconds."""
        left = task.fields["left"]
        if left is None:
            return Text("eta -:--:--", style="progress.remaining")
        seconds = int(max(0.0, left - (time.monotonic() - task.fields["at"])))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"eta {hours}:{minutes:02}:{seconds:02}", style="progress.remaining")
