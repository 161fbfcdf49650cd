"""The body of a request: received to disk within limits, then taken apart."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import IO, Any

from fastapi import Request

from nuclei3d.errors import InputError
from nuclei3d.tracking.invocation import (
    RequestParams,
    VolumeLimits,
    check_row,
    decode_volume,
    open_frame,
    path_below,
    read_request_params,
)

_FORMATS = ("dataframe_records", "dataframe_split")
_DRAIN_S = 20.0
_SILENCE_S = 30.0


class TooLargeError(Exception):
    """The body is larger than the service takes."""


class GoneError(Exception):
    """The sender hung up."""


class TooSlowError(Exception):
    """The sender said nothing for too long."""


async def receive_body(request: Request, file: IO[bytes], limit_bytes: int) -> None:
    """Write the body of a request to `file`.

    Raises
    ------
    TooLargeError
        If it is larger than `limit_bytes`.
    TooSlowError
        If nothing came for half a minute.
    GoneError
        If the sender hung up.
    """
    received = 0
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), _SILENCE_S)
        except TimeoutError:
            raise TooSlowError from None
        if message["type"] == "http.disconnect":
            raise GoneError
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > limit_bytes:
            raise TooLargeError
        await asyncio.to_thread(file.write, chunk) if len(chunk) > 1 << 20 else file.write(chunk)
        if not message.get("more_body", False):
            request.state.received = True
            file.flush()
            return


async def drain_body(request: Request) -> None:
    """Let a sender that is refused finish sending, for a while: only then will it read the answer.

    A client that still sends when the connection is closed sees a broken connection and not the status.
    """
    if getattr(request.state, "received", False):
        return

    async def drop() -> None:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(drop(), _DRAIN_S)
    except TimeoutError:
        return


async def until_disconnect(request: Request) -> None:
    """Return when the sender hangs up; to be called after the whole body was received."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def take_apart(body: Path, folder: Path, limits: VolumeLimits) -> tuple[list[Path], RequestParams]:
    """Split a body into files and parameters, and check all of it, so that a bad request need not wait.

    Parameters
    ----------
    body
        File with the JSON that MLflow defines: ``dataframe_records`` or ``dataframe_split``, and ``params``.
        It is emptied.
    folder
        Where the volumes that were sent are put, one file each.
    limits
        The root of paths and the largest volume.

    Raises
    ------
    InputError
        If anything in it is not as it should be.
    """
    try:
        tree = json.loads(body.read_bytes())
    except (ValueError, RecursionError):
        raise InputError("the body is not valid JSON") from None
    body.write_bytes(b"")
    if not isinstance(tree, dict):
        raise InputError("the body must be a JSON object with 'dataframe_records' or 'dataframe_split'")
    unknown = sorted(set(tree) - {*_FORMATS, "params"})
    if unknown:
        raise InputError(f"unknown field '{unknown[0]}'; known: {', '.join(_FORMATS)}, params")
    given = [name for name in _FORMATS if name in tree]
    if len(given) != 1:
        raise InputError("the body must have exactly one of 'dataframe_records' and 'dataframe_split'")
    params = tree.get("params") or {}
    if not isinstance(params, dict):
        raise InputError("'params' must be an object with names and values")
    wishes = read_request_params(params)
    records = _records(tree) if given[0] == _FORMATS[0] else _split(tree.pop(_FORMATS[1]))
    tree.clear()
    if not records:
        raise InputError("the request has no rows")
    files = []
    for number, record in enumerate(records):
        volume, path = check_row(record)
        if path is not None:
            file = path_below(limits.root, path)
        else:
            file = folder / f"{number}.tif"
            file.write_bytes(decode_volume(volume))
        record.clear()
        open_frame(file, wishes, limits.max_voxels)
        files.append(file)
    return files, wishes


def _records(tree: dict[str, Any]) -> list[dict[str, Any]]:
    records = tree.pop("dataframe_records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError("'dataframe_records' must be a list of objects with 'volume' or 'path'")
    return records


def _split(frame: Any) -> list[dict[str, Any]]:
    if not isinstance(frame, dict) or not {"columns", "data"} <= set(frame):
        raise InputError("'dataframe_split' must be an object with 'columns' and 'data'")
    unknown = sorted(set(frame) - {"columns", "data", "index"})
    if unknown:
        raise InputError(f"unknown field '{unknown[0]}' in 'dataframe_split'; known: columns, data, index")
    columns, data = frame["columns"], frame["data"]
    if not isinstance(columns, list) or not isinstance(data, list):
        raise InputError("'columns' and 'data' of 'dataframe_split' must be lists")
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        raise InputError("each row of 'data' must have as many values as there are 'columns'")
    return [dict(zip(map(str, columns), row, strict=True)) for row in data]
