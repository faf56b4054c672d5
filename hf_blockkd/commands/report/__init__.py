"""What runs left behind as one page and its pictures: `report`."""

from .writing import Report, report

__all__ = ["Report", "report"]
