"""What runs left behind as one page and its pictures: `report`."""

from .command import add_options, run
from .writing import report

__all__ = ["add_options", "report", "run"]
