"""Where the state of a search is kept: a journal file on one machine, PostgreSQL across machines."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout
from optuna import Study
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from nuclei3d.config.sections import SearchParams
from nuclei3d.errors import InputError, reason_of

if TYPE_CHECKING:
    from sqlalchemy import Engine

POSTGRESQL = "postgresql"
JOURNAL_NAME = "study.journal"
#: The trial's attribute that names the worker at work on it.
WORKER = "worker"
_JOURNAL_BEGINS = b'{"op_code":'


@dataclass(frozen=True)
class StudyStorage:
    """Optuna's storage of a search, and the journal file that it is kept in (None: a database).

    `claim` makes a context within which this process is the only one, on all machines, that creates a study
    or takes a trial. It ends with the process, however that dies.
    """

    backend: BaseStorage
    claim: Callable[[], AbstractContextManager[Any]]
    journal: Path | None = None

    @contextmanager
    def one_parent(self) -> Iterator[None]:
        """Be the only command that starts workers on the journal; a database may have many, and no lock.

        So whatever runs in a journal when a command begins was left by one that died.
        """
        if self.journal is None:
            yield
            return
        try:
            with FileLock(f"{self.journal}.parent", timeout=0):
                yield
        except Timeout:
            raise InputError(
                f"another search works on {self.journal}; wait for it, or stop it and start it again with "
                "more --workers; several commands can share a search only in PostgreSQL (--storage)"
            ) from None

    def beat(self, trial_id: int) -> None:
        """Show in a database that a trial is alive: its last sign of life may be that of a dead worker."""
        if isinstance(self.backend, RDBStorage):
            self.backend.record_heartbeat(trial_id)

    def requeue(self, study: Study, dead: str | None = None) -> None:
        """Put the trials whose worker died back into the queue; to be called within a claim.

        A trial that runs without a worker's name on it was left by one that died while it took the trial:
        taking and naming happen within one claim. Names of workers known to be dead begin with `dead`; of
        others only the heartbeat tells.
        """
        fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            if worker is None or (dead is not None and worker.startswith(dead)):
                _put_back(self.backend, trial._trial_id)


def _put_back(storage: BaseStorage, trial_id: int) -> None:
    """Let a trial wait for a worker again, with its number, values and curve; unless it has just ended."""
    with suppress(UpdateFinishedTrialError):
        storage.set_trial_user_attr(trial_id, WORKER, None)
        storage.set_trial_state_values(trial_id, TrialState.WAITING)


class _Database(RDBStorage):
    def record_heartbeat(self, trial_id: int) -> None:
        # a server that is away for a moment costs a beat, not the trial
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        # Optuna would end them as failed and queue copies, in two steps between which a process may die
        for trial_id in super()._get_stale_trial_ids(study_id):
            _put_back(self, trial_id)
        return []


@contextmanager
def open_storage(address: str | None, folder: Path, params: SearchParams) -> Iterator[StudyStorage]:
    """Open the storage of a search.

    The address is ``postgresql://...``, for workers on many machines, or the path of a journal file; None
    means one in the folder of the search.
    """
    if address is not None and re.match(r"postgres(ql)?(\+\w+)?:", address):
        with _open_postgresql(address, params) as opened:
            yield opened
    elif address is None or "://" not in address:
        yield _open_journal(Path(address) if address else folder / JOURNAL_NAME)
    else:
        kind = address.split("://")[0]
        raise InputError(
            f"--storage {kind}://... does not suit several workers; give postgresql://user@host/database, or "
            "the path of a journal file"
        )


@contextmanager
def explained_outage() -> Iterator[None]:
    """Turn the loss of the database in the middle of a search into one clear line."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise InputError(
            f"the database of the search stopped answering ({_reason(error.__cause__ or error)}); what was "
            "finished is kept: start the same command again"
        ) from error


def refuse_shared_database(storage: str | None, tracking: str) -> None:
    """Refuse one database for Optuna and MLflow: both keep their version in a table of the same name."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        urls = [make_url(storage or ""), make_url(tracking)]
    except ArgumentError:
        # at least one is no database, or will be found to be none
        return
    first, second = ((url.get_backend_name(), url.host, url.port or 5432, url.database) for url in urls)
    if first == second and first[0] == POSTGRESQL:
        raise InputError(
            f"the study and MLflow's runs cannot share the database '{first[-1]}'; give --storage a database "
            "of its own (createdb optuna)"
        )


def _open_journal(path: Path) -> StudyStorage:
    # the kernel gives this lock back when its holder is killed; Optuna's own, with the same methods, are
    # files whose presence means "locked", and hold everybody up for half a minute then
    lock = FileLock(f"{path.absolute()}.lock")
    if path.is_dir():
        raise InputError(f"--storage {path} is a folder; give the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            _mend(path)
        backend = JournalFileBackend(str(path.absolute()), lock_obj=cast(Any, lock))
        storage = JournalStorage(backend)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot write the journal of the search {path}: {error.strerror}") from None
    except (ValueError, KeyError):
        raise InputError(f"the journal of the search {path} is damaged; give another --out") from None
    return StudyStorage(storage, partial(FileLock, f"{path.absolute()}.claim"), path)


def _mend(path: Path) -> None:
    """Cut off a last line that a full disk or a power cut left unfinished; nobody went on from it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not _JOURNAL_BEGINS.startswith(content[: len(_JOURNAL_BEGINS)]):
            raise InputError(f"{path} is no journal of a search; give another file with --storage")
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


@contextmanager
def _open_postgresql(address: str, params: SearchParams) -> Iterator[StudyStorage]:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
    try:
        # psycopg 3, whatever SQLAlchemy's default for the bare name is
        address = f"{POSTGRESQL}+psycopg://{address.split('://', 1)[1]}"
        engine = create_engine(address, **options)
    except (ImportError, NoSuchModuleError):
        raise InputError("PostgreSQL needs the package psycopg: pip install 'nuclei3d[postgresql]'") from None
    except (ArgumentError, IndexError):
        raise InputError(
            "--storage is no address of a database; expected postgresql://user@host:5432/database"
        ) from None
    try:
        # the tables are made under the lock: two workers that make them at once trip over each other
        with _advisory_lock(engine), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            backend = _Database(
                address,
                engine_kwargs=options,
                heartbeat_interval=params.heartbeat_s,
                grace_period=params.grace_s,
            )
    except SQLAlchemyError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise InputError(f"cannot use the storage {shown}: {_reason(error)}") from None
    try:
        yield StudyStorage(backend, partial(_advisory_lock, engine))
    finally:
        backend.engine.dispose()
        engine.dispose()


@contextmanager
def _advisory_lock(engine: Engine) -> Iterator[None]:
    """Hold a lock in the database, which ends with the connection, also when the process is killed."""
    from sqlalchemy import text

    key = zlib.crc32(b"nuclei3d search")
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


def _reason(error: BaseException) -> str:
    return reason_of(getattr(error, "orig", error), 200)
