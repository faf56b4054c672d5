"""What runs left behind as one page and its pictures: `report`."""

from .command import run
from .writing import report

__all__ = ["report", "run"]
