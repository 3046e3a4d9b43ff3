"""What a run did, as one HTML page: `sra report`."""

from sra.report.run import read_run, write_report

__all__ = ["read_run", "write_report"]
