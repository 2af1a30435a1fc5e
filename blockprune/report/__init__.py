"""Results as tables and plots. No torch: a report can be made on another machine."""

from __future__ import annotations

from blockprune.report.files import staged_folder, write_report
from blockprune.report.plots import plot_accuracy, plot_blocks
from blockprune.report.tables import comparison_markdown, comparison_table, reading_notes

__all__ = [
    "comparison_markdown",
    "comparison_table",
    "plot_accuracy",
    "plot_blocks",
    "reading_notes",
    "staged_folder",
    "write_report",
]
