"""Files of requests, answered through a night: OpenAI's batch format in, one line out for each."""

from .journal import Journal
from .records import BatchError, Line, read_lines
from .run import Report, run_batch

__all__ = ["BatchError", "Journal", "Line", "Report", "read_lines", "run_batch"]
