"""What runs left behind as one page and its pictures: `report`."""

from .command import add_options, run
from .writing import Report, report

__all__ = ["Report", "add_options", "report", "run"]
