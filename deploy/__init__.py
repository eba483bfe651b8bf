"""Everything that puts a run on machines: settings, launcher, command line, display, report."""

from deploy.launch import Result, launch

__all__ = ["Result", "launch"]
