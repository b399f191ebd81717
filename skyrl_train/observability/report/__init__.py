"""The run as one HTML page: `python -m skyrl_train.observability.report runs/quickstart`."""

from skyrl_train.observability.report.page import REPORT_NAME, render_page, write_report

__all__ = ["REPORT_NAME", "render_page", "write_report"]
