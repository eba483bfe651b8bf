"""Everything that puts a run on machines: settings, launcher, command line, display, report."""

from deploy.launch import launch
from deploy.run import Result

__all__ = ["Result", "launch"]
