"""Where the state of a search is kept, and how trials survive the death of their worker.

Locks of a search: who may take the next trial, and which workers are still alive.
"""

from __future__ import annotations

import copy
import fcntl
import os
import re
import socket
import threading
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config.sections import SearchParams
from nuclei3d.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Engine


class KernelLock(JournalFileOpenLock):
    """A lock on a file that the kernel itself gives back when the process holding it is killed.

    Optuna's own locks are files whose presence means "locked"; after a kill they hold everybody up for half
    a minute.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._held = handle
        return True

    def release(self) -> None:
        """Give the lock back."""
        handle, self._held = self._held, None
        if handle is not None:
            os.close(handle)


class WorkerMark:
    """A worker's name, and a file that it keeps locked as long as it lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._path = folder / f"{self.name}.lock"
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def close(self) -> None:
        """Take the mark away."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)

    def is_dead(self, name: str, *, missing_is_dead: bool) -> bool:
        """Tell whether another worker is known to be gone; False also where its mark lies elsewhere."""
        if name == self.name:
            return False
        try:
            handle = os.open(self._folder / f"{name}.lock", os.O_RDWR)
        except OSError:
            return missing_is_dead
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(handle)
        (self._folder / f"{name}.lock").unlink(missing_ok=True)
        return True


@contextmanager
def advisory_lock(engine: Engine) -> Iterator[None]:
    """Hold a lock in the database, which ends with the connection, also when the process is killed."""
    from sqlalchemy import text

    key = zlib.crc32(b"nuclei3d search")
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


POSTGRESQL = "postgresql"
JOURNAL_NAME = "study.journal"
WORKER = "worker"
REASON = "reason"
ERROR = "error"
DIED = "its process died"
_JOURNAL_BEGINS = b'{"op_code":'
# What belongs to one attempt at a trial and is forgotten when the trial is run again.
_OF_ATTEMPT = (WORKER, REASON, ERROR)


@dataclass
class StudyStorage:
    """The storage of a search as one worker sees it; made by `open_storage`.

    Attributes
    ----------
    backend
        Optuna's storage.
    mark
        This worker.
    """

    backend: JournalStorage | RDBStorage
    mark: WorkerMark
    _retry: RetryHeartbeatStaleTrialCallback
    _claim_lock: KernelLock | None
    _engine: Engine | None
    _journal: Path | None = None

    @property
    def has_heartbeats(self) -> bool:
        """Whether workers elsewhere show by a heartbeat in the database that they are alive."""
        return isinstance(self.backend, RDBStorage)

    @property
    def files(self) -> list[Path]:
        """The journal, if the study is kept in one."""
        return [] if self._journal is None else [self._journal]

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the only worker, on all machines, that creates a study or takes a trial."""
        if self._engine is None:
            assert self._claim_lock is not None
            self._claim_lock.acquire()
            try:
                yield
            finally:
                self._claim_lock.release()
            return
        with advisory_lock(self._engine):
            yield

    def take(self, trial_id: int) -> None:
        """Write on a trial that this worker runs it. To be called within the `claim` that took it."""
        if isinstance(self.backend, RDBStorage):
            self.backend.record_heartbeat(trial_id)
        self.backend.set_trial_user_attr(trial_id, WORKER, self.mark.name)

    def explain(self, trial: FrozenTrial, reason: str, *, is_error: bool = False) -> None:
        """Write on a trial, before it gets its last state, why it gets it."""
        self.backend.set_trial_user_attr(trial._trial_id, REASON, reason)
        if is_error:
            self.backend.set_trial_user_attr(trial._trial_id, ERROR, True)

    def recover(self, study: Study) -> None:
        """Queue the trials whose worker died, to be run again. To be called within `claim`.

        A trial that runs without a worker's name on it was left by one that died while it took the trial:
        taking and naming happen within one claim. One that failed without an error was ended by the `recover`
        of another worker, which may itself have died before it could queue the trial.
        """
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            if worker is None or self.mark.is_dead(worker, missing_is_dead=not self.has_heartbeats):
                self.give_back(study, trial, DIED)
        if self.has_heartbeats:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if not trial.user_attrs.get(ERROR):
                self.queue_again(study, trial)

    def give_back(self, study: Study, trial: FrozenTrial, reason: str) -> None:
        """End a trial as failed and queue it to be run again. To be called within `claim`."""
        try:
            self.explain(trial, reason)
            self.backend.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            # ended by somebody else, who took this worker for dead
            return
        self.queue_again(study, self.backend.get_trial(trial._trial_id))

    def queue_again(self, study: Study, trial: FrozenTrial) -> None:
        """Queue a failed trial with its parameters and curve so far, unless that was done or is too often."""
        if any(attempts(other)[-2:-1] == [trial.number] for other in study.get_trials(deepcopy=False)):
            return
        # Optuna's callback writes into the history that it is given, which the storage shares with its own
        again = copy.deepcopy(trial)
        again.user_attrs = {key: value for key, value in trial.user_attrs.items() if key not in _OF_ATTEMPT}
        self._retry(study, again)

    @contextmanager
    def heartbeat(self, trial_id: int, every_s: int) -> Iterator[None]:
        """Show, while a trial runs, that its worker is alive."""
        backend = self.backend
        if not isinstance(backend, RDBStorage):
            yield
            return
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(every_s):
                # a server that is away for a moment costs a beat, not the trial
                with suppress(StorageInternalError):
                    backend.record_heartbeat(trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def attempts(trial: FrozenTrial) -> list[int]:
    """Give the numbers of a trial's attempts, the trial itself last; the first names its folder."""
    return [*trial.system_attrs.get("retry_history", ()), trial.number]


@contextmanager
def open_storage(address: str | None, folder: Path, params: SearchParams) -> Iterator[StudyStorage]:
    """Open the storage of a search as a new worker.

    Parameters
    ----------
    address
        None: a journal file in `folder`; ``postgresql://...``: a database for workers on many machines; else
        the path of a journal file.
    folder
        Folder of the search; the workers' marks lie in it.
    params
        Heartbeat and number of retries.

    Raises
    ------
    InputError
        If the database does not answer, the journal cannot be written, or the address is of another kind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        retry = RetryHeartbeatStaleTrialCallback(
            max_retry=params.max_retries, inherit_intermediate_values=True
        )
    if address is not None and re.match(r"postgres(ql)?(\+\w+)?:", address):
        opened = _open_postgresql(address, folder, params, retry)
    elif address is None or "://" not in address:
        opened = _open_journal(Path(address) if address else folder / JOURNAL_NAME, retry)
    else:
        kind = address.split("://")[0]
        raise InputError(
            f"--storage {kind}://... does not suit several workers; give postgresql://user@host/database, or "
            "the path of a journal file"
        )
    try:
        yield opened
    finally:
        opened.mark.close()
        if opened._engine is not None:
            opened._engine.dispose()


@contextmanager
def explained_outage() -> Iterator[None]:
    """Turn the loss of the database in the middle of a search into one clear line."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        reason = " ".join(str(getattr(error.__cause__ or error, "orig", error)).split())[:200]
        raise InputError(
            f"the database of the search stopped answering ({reason}); what was finished is kept: start the "
            "same command again"
        ) from error


def refuse_shared_database(storage: str | None, tracking: str) -> None:
    """Refuse one database for Optuna and MLflow: both keep their version in a table of the same name."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        first, second = make_url(storage or ""), make_url(tracking)
    except ArgumentError:
        # at least one is no database, or will be found to be none
        return
    same = (first.host, first.port or 5432, first.database) == (
        second.host,
        second.port or 5432,
        second.database,
    )
    if first.get_backend_name() == second.get_backend_name() == POSTGRESQL and same:
        raise InputError(
            f"the study and MLflow's runs cannot share the database '{first.database}'; give --storage a "
            "database of its own (createdb optuna)"
        )


def without_password(address: str) -> str:
    """Give an address fit for showing."""
    from sqlalchemy import make_url

    return make_url(address).render_as_string(hide_password=True) if "://" in address else address


def _open_journal(path: Path, retry: RetryHeartbeatStaleTrialCallback) -> StudyStorage:
    # Optuna resolves its lock against the working directory, so the path is absolute
    path = path.absolute()
    lock = KernelLock(path.with_name(f"{path.name}.lock"))
    _refuse_other_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        try:
            _drop_half_line(path)
        finally:
            lock.release()
        backend = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        mark = WorkerMark(path.with_name(f"{path.name}.workers"))
    except OSError as error:
        raise InputError(f"cannot write the journal of the search {path}: {error.strerror}") from None
    except (ValueError, KeyError):
        raise InputError(f"the journal of the search {path} is damaged; give another --out") from None
    claim = KernelLock(path.with_name(f"{path.name}.claim"))
    return StudyStorage(backend, mark, retry, claim, None, path)


def _refuse_other_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"--storage {path} is a folder; give the path of a file")
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_JOURNAL_BEGINS))
    except OSError:
        # a new one; or one that cannot be opened for writing either
        return
    if not _JOURNAL_BEGINS.startswith(beginning):
        raise InputError(f"{path} is no journal of a search; give another file with --storage")


def _drop_half_line(path: Path) -> None:
    """Cut off a last line that a full disk or a power cut left unfinished; nobody went on from it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _open_postgresql(
    address: str, folder: Path, params: SearchParams, retry: RetryHeartbeatStaleTrialCallback
) -> StudyStorage:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        # psycopg 3, whatever SQLAlchemy's default for the bare name is
        address = f"{POSTGRESQL}+psycopg://{address.split('://', 1)[1]}"
        engine = create_engine(address, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    except (ImportError, NoSuchModuleError):
        raise InputError("PostgreSQL needs the package psycopg: pip install 'nuclei3d[postgresql]'") from None
    except (ArgumentError, IndexError):
        raise InputError(
            "--storage is no address of a database; expected postgresql://user@host:5432/database"
        ) from None
    try:
        # the tables are made under the lock: two workers that make them at once trip over each other
        with advisory_lock(engine), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            backend = RDBStorage(
                address,
                engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}},
                heartbeat_interval=params.heartbeat_s,
                grace_period=params.grace_s,
            )
        mark = WorkerMark(folder / "workers")
    except SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", error)).split())[:200]
        raise InputError(f"cannot use the storage {without_password(address)}: {reason}") from None
    except OSError as error:
        raise InputError(f"cannot write the folder of the search {folder}: {error.strerror}") from None
    opened = StudyStorage(backend, mark, retry, None, engine)

    backend.heartbeat_stale_trial_callback = opened.queue_again
    return opened
