"""Pictures of a run."""

from veneer.report.plots import plot_loss

__all__ = ["plot_loss"]
