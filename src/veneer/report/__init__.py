"""Pictures and pages of data and runs."""

from veneer.report.certificate_page import certificate_page
from veneer.report.data_page import data_page
from veneer.report.plots import plot_loss
from veneer.report.run_page import run_page, write_run_page

__all__ = ["certificate_page", "data_page", "plot_loss", "run_page", "write_run_page"]
