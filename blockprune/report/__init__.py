"""Results as tables and plots. No torch: a report can be made on another machine."""

from __future__ import annotations

from blockprune.report.bench import BenchResult
from blockprune.report.bench_plot import plot_bench
from blockprune.report.bench_tables import bench_notes, bench_tables
from blockprune.report.files import staged_folder, write_report
from blockprune.report.page import page_html
from blockprune.report.plots import plot_accuracy, plot_blocks
from blockprune.report.record_csv import networks_csv, scores_csv, verdicts_csv
from blockprune.report.run_files import read_run, write_run_report
from blockprune.report.suite import index_html, runs_in
from blockprune.report.tables import comparison_markdown, comparison_table, reading_notes

__all__ = [
    "BenchResult",
    "bench_notes",
    "bench_tables",
    "comparison_markdown",
    "comparison_table",
    "index_html",
    "networks_csv",
    "page_html",
    "plot_accuracy",
    "plot_bench",
    "plot_blocks",
    "read_run",
    "reading_notes",
    "runs_in",
    "scores_csv",
    "staged_folder",
    "verdicts_csv",
    "write_report",
    "write_run_report",
]
