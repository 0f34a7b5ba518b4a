"""The queue of a study's cells: an Optuna storage that any number of processes share.

A cell is a trial that was enqueued before; its key and name are the trial's attributes, and so is
its row once it is done. Optuna hands each waiting trial to one process only.
"""

import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..._errors import FewbitsError, FileError, refused_by_the_machine
from ._cells import Cell

# Seconds between two signs of life of a process, and after how long without one it counts as dead.
HEARTBEAT, GRACE = 30, 180


class Queue:
    """In place: the cells that wait, run, and are done, in a storage.

    Args:
        folder: of the study; holds one lock per living process of this machine.
        name: the study's name in the storage.
        url: an SQLAlchemy URL, such as "postgresql://…"; study.db in the folder if not given.

    Raises:
        FewbitsError: if optuna is not installed.
        FileError: if the storage cannot be opened.
    """

    def __init__(self, folder: Path, name: str, url: str | None = None):
        try:
            import optuna
        except ImportError as error:
            raise FewbitsError("studies need: pip install 'fewbits[study]'") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._pruned = optuna.TrialPruned()
        self._states = optuna.trial.TrialState
        # Of a cell that needs no other trial; a twin that was passed over is pruned.
        self._alive = (self._states.COMPLETE, self._states.RUNNING, self._states.WAITING)
        self._broken = optuna.exceptions.StorageInternalError
        self._stale = optuna.storages.fail_stale_trials
        self._workers = folder / "workers"
        self.worker: str = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._lock = FileLock(self._workers / f"{self.worker}.lock")
        self._unfinished: bool = False
        try:
            self._workers.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise FileError(
                f"{self._workers}: cannot be written to ({error.strerror}). Choose another --out."
            ) from error
        # Held while the storage is made, and while cells are enqueued or one is taken: SQLite may
        # hand one to two.
        self._turn = FileLock(folder / "study.lock")
        self._where = where = url or f"sqlite:///{(folder / 'study.db').resolve()}"
        try:
            with self._turn, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # heartbeats are marked experimental
                storage = optuna.storages.RDBStorage(
                    where, heartbeat_interval=HEARTBEAT, grace_period=GRACE
                )
                self._study = optuna.create_study(
                    storage=storage, study_name=name, direction="maximize", load_if_exists=True
                )
        except Exception as error:  # SQLAlchemy and its drivers raise many kinds
            self.close()
            raise FileError(
                f"{where}: the storage cannot be opened ({_driver_says(error)})."
            ) from error

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Say in one line what the storage refuses: a full disk, a lost connection.

        Raises:
            FileError: with the reason; what was recorded before is kept.
        """
        try:
            yield
        except Exception as error:
            # Optuna's own error is often hidden behind one that it causes.
            broken = next((e for e in _chain(error) if isinstance(e, self._broken)), None)
            if broken is None:
                raise
            raise FileError(
                f"{self._where}: the storage failed ({_driver_says(broken)}). Mend it, and run the"
                " same command to go on."
            ) from error

    def close(self) -> None:
        """In place: let go of what a living process holds."""
        self._lock.release()
        if not self._unfinished:  # else who finds the lock free lets the cell wait again
            (self._workers / f"{self.worker}.lock").unlink(missing_ok=True)

    # -- what there is --------------------------------------------------------------------------

    def _trials(self, *states: Any) -> list[Any]:
        trials = self._study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if "cell" in trial.user_attrs]

    def done(self) -> dict[str, dict[str, Any]]:
        """Return what was kept of each finished cell, by the cell's key."""
        found = {}
        for trial in self._trials(self._states.COMPLETE):
            found.setdefault(trial.user_attrs["cell"], dict(trial.user_attrs["result"]))
        return found

    def failed(self) -> dict[str, str]:
        """Return why each cell failed, by key, of those that neither wait, run nor are done."""
        alive = {trial.user_attrs["cell"] for trial in self._trials(*self._alive)}
        return {
            t.user_attrs["cell"]: t.user_attrs["error"]
            for t in self._trials(self._states.FAIL)
            if "error" in t.user_attrs and t.user_attrs["cell"] not in alive
        }

    def running(self) -> int:
        """Return how many cells other processes are at."""
        return len(self._trials(self._states.RUNNING))

    # -- filling --------------------------------------------------------------------------------

    def fill(self, cells: Iterable[Cell], *, retry: bool = False) -> int:
        """In place: let every cell wait that neither waits, runs, is done, nor has failed.

        A cell whose process died, without an error to show, waits again.

        Args:
            cells: all of the study.
            retry: whether failed cells wait again as well.

        Returns:
            how many wait that did not before.
        """
        with self._turn:
            self._release_dead()
            there = {trial.user_attrs["cell"] for trial in self._trials(*self._alive)}
            if not retry:
                there |= self.failed().keys()
            missing = [cell for cell in cells if cell.key not in there]
            for cell in missing:
                about = {"cell": cell.key, "name": cell.name} | cell.settings()
                self._study.enqueue_trial({}, user_attrs=about)
        return len(missing)

    def _release_dead(self) -> None:
        """In place, while it is our turn: fail the cells of processes that no longer live."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # marked experimental
            self._stale(self._study)
        running = self._trials(self._states.RUNNING)
        dead = [path for path in self._workers.glob("*.lock") if self._is_free(path)]
        names = {path.stem for path in dead}
        for trial in running:
            # Without a name it was killed while it took the cell. Of one without a file here, on
            # another machine, the heartbeat decides.
            if trial.user_attrs.get("worker") in {None, *names}:
                self._fail(trial.number)
        for path in dead:
            path.unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        """Whether the process whose lock this is has ended."""
        if path.stem == self.worker:
            return False
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False

    def _fail(self, number: int) -> None:
        with suppress(ValueError, RuntimeError):  # another process was faster
            self._study.tell(number, state=self._states.FAIL)

    # -- doing ----------------------------------------------------------------------------------

    def do_next(
        self, cells: Mapping[str, Cell], do: Callable[[Cell], tuple[float, dict[str, Any]]]
    ) -> bool:
        """In place: take a cell that waits, so that no other process gets it, and do it.

        An exception is kept as the reason why the cell failed. A cell that is interrupted waits
        again at the next `fill`.

        Args:
            cells: those that this process knows how to do, by key.
            do: returns the cell's accuracy in percent and what to keep of it, JSON's types.

        Returns:
            whether a cell waited.
        """
        if not self._trials(self._states.WAITING):
            return False
        at: list[int] = []

        def objective(trial: Any) -> float:
            at.append(trial.number)
            key = trial.user_attrs.get("cell")
            if key not in cells or self._twin(key, trial.number):
                # Nothing waited any more, the file has changed since, or two processes enqueued
                # the same.
                raise self._pruned
            trial.set_user_attr("worker", self.worker)
            self._turn.release()
            try:
                accuracy, result = do(cells[key])
            except Exception as error:
                trial.set_user_attr("error", _one_line(error))
                raise
            trial.set_user_attr("result", result)
            return accuracy

        self._turn.acquire()
        self._unfinished = True
        try:  # it also gives signs of life meanwhile
            self._study.optimize(objective, n_trials=1, catch=(Exception,))
        except Exception:
            # Another process has ended the cell: it took this one for dead, when a clock was set,
            # or two machines got the same. What was trained lies in its folder.
            trials = self._study.get_trials(deepcopy=False)
            if not any(t.number in at and t.state.is_finished() for t in trials):
                raise
        finally:
            self._turn.release(force=True)
        self._unfinished = False
        return True

    def _twin(self, key: str, number: int) -> bool:
        return any(
            t.user_attrs["cell"] == key and t.number < number for t in self._trials(*self._alive)
        )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, FewbitsError):
        return text
    return refused_by_the_machine(error) or f"{type(error).__name__}: {text}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from, the first of them last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _driver_says(error: BaseException) -> str:
    """Return what the database said, without the statement that it refused."""
    return _one_line(list(_chain(error))[-1])
