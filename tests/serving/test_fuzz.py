"""Whatever is sent, the service refuses it in one line or answers it: no 500, no path, no growth.

NUCLEI3D_FUZZ is the number of examples, for runs longer than the suite's.
"""

import base64
import io
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import schemathesis
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.experiment.invocation import open_frame, read_volume, take_apart
from threshold_model import open_admission

EXAMPLES = int(os.environ.get("NUCLEI3D_FUZZ", "40"))
Serving = Callable[..., AbstractContextManager[Any]]
RELAXED = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
ADMISSION = open_admission(Params())
SIZES = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}


def seed(**options: Any) -> bytes:
    file = io.BytesIO()
    image = np.random.default_rng(0).integers(0, 200, (3, 8, 9)).astype(np.uint16)
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


SEEDS = [
    seed(ome=True, metadata={"axes": "ZYX", **SIZES}),
    seed(ome=True, metadata={"axes": "ZYX", **SIZES}, compression="zlib", tile=(16, 16)),
    seed(imagej=True, metadata={"axes": "ZYX", "spacing": 2.0, "unit": "um"}, resolution=(2, 2)),
    seed(ome=True, bigtiff=True, metadata={"axes": "ZYX", **SIZES}),
    seed(metadata={"axes": "ZYX"}),
    seed(photometric="minisblack", compression="lzw", predictor=True),
]
NUMBERS = [b"0", b"-1", b"4294967295", b"99999999999999999999", b"1e308", b"nan", b"\xff", b""]


@st.composite
def damaged_tiffs(draw: st.DrawFn) -> bytes:
    """A valid file with bytes and numbers exchanged, parts doubled or left out."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(content) - 1))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            content[at] = draw(st.integers(0, 255))
        elif kind == 1:
            content[at : at + 4] = draw(st.integers(0, 2**32 - 1)).to_bytes(4, "little")
        elif kind == 2:
            digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
            place = digits[at % len(digits)]
            content[place : place + 1] = draw(st.sampled_from(NUMBERS))
        elif kind == 3:
            content[at:at] = content[at : at + draw(st.integers(1, 200))]
        else:
            del content[at : at + draw(st.integers(1, 200))]
        if not content:
            break
    return bytes(content)


@RELAXED
@given(content=damaged_tiffs())
def test_a_damaged_tiff_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        volume = base64.b64encode(content).decode()
        (folder / "body.json").write_text(json.dumps({"dataframe_records": [{"volume": volume}]}))
        told = ""
        try:
            (file,), asked = take_apart(ADMISSION, folder / "body.json", folder)
            read_volume(open_frame(file, asked, 10**6)[0])
        except InputError as error:
            told = str(error)
        assert name not in told
    assert psutil.Process().memory_info().rss < 4e9


def test_the_service_refuses_what_its_description_allows_and_forbids(serving: Serving) -> None:
    with serving(max_body_mb=5) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        volume = base64.b64encode(SEEDS[0]).decode()

        @RELAXED
        @given(case=schema["/invocations"]["POST"].as_strategy(), valid=st.booleans())
        def send(case: schemathesis.Case, valid: bool) -> None:
            if valid and isinstance(case.body, dict):
                case.body["dataframe_records"] = [{"volume": volume}]
                case.body.pop("dataframe_split", None)
            response = case.call(timeout=60)
            assert response.status_code in (200, 400, 408, 413, 415), response.text
            if response.status_code != 200:
                assert json.loads(response.text)["message"].isprintable()

        send()
        running.wait_for(lambda: running.service.ready)
        assert running.service.places == 0
