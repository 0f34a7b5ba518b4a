"""Studies: a grid of trainings in one file, shared by any number of processes."""

from ._cells import Cell as Cell
from ._cells import Study as Study
from ._cells import read_study as read_study
from ._queue import Queue as Queue
from ._results import gather_results as gather_results
from ._worker import Worker as Worker
