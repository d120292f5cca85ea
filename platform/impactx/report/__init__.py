"""The report of a job: one HTML page that needs nothing else, and its pictures and tables as files.

It is made from the records of `impactx.results.export` and computes no statistics of its own.
"""

from __future__ import annotations

from impactx.report.build import ReportError, build_report, write_report

__all__ = ["ReportError", "build_report", "write_report"]
