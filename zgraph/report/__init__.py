"""See inside a compiled step: one page that opens from a disk, and its data.

``recorder`` watches the passes and writes down what each left, ``document`` makes plain data of it, ``page`` a page
and ``chrome_trace`` a trace. ``model.report()`` and ``zgraph report`` put them together.
"""

from zgraph.report.document import Report, files_of, make_report
from zgraph.report.recorder import Recorder

__all__ = ["Recorder", "Report", "files_of", "make_report"]
