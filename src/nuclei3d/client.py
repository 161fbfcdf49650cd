"""The client: volumes to a service, masks back, with retries."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.experiment.invocation import RequestParams, refuse_second_model
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.segmenter import Segmentation

if TYPE_CHECKING:
    from nuclei3d.segmentation.masks import Nucleus

#: Environment variable with the bearer token that a service asks for and a client sends.
TOKEN_VARIABLE = "NUCLEI3D_TOKEN"

_AGAIN = (502, 503)
_CONNECT_S = 10.0


@dataclass(frozen=True)
class RemoteSegmentation(Segmentation):
    """What a service answers; `parameters` are those that took effect, `model` its name and version."""

    parameters: Mapping[str, Any]
    model: Mapping[str, str]


@dataclass(frozen=True)
class RemoteModel:
    """A model behind a service's address (``http://host:5050``): `nuclei3d serve` or `mlflow models serve`.

    What `predict` says (None: the service's default) is sent; the device is the service's own business. The
    bearer `token`, if None, is taken from the environment variable NUCLEI3D_TOKEN, if there is one. A service
    that is busy or not there is tried again for `patience_s`; one answer may take `timeout_s`.
    """

    url: str
    predict: PredictParams = field(default_factory=PredictParams)
    token: str | None = None
    patience_s: float = 300.0
    timeout_s: float = 3600.0

    def segment(
        self,
        image: NDArray[Any],
        voxel_size_um: VoxelSize | Sequence[float],
        progress: Callable[[float], None] | None = None,
    ) -> RemoteSegmentation:
        """Have a volume segmented; parameters as those of `Segmenter.segment`.

        The voxel size is sent along, so that the service need not read it from the file. InputError is raised
        if the parameters name a further model, the service refuses the request, or it stays busy or away for
        `patience_s`.
        """
        import tifffile

        refuse_second_model(self.predict)
        size = VoxelSize.of(voxel_size_um)
        answer = self._post(_request_body(image, size, self.predict))
        try:
            prediction = json.loads(answer)["predictions"][0]
            labels = tifffile.imread(io.BytesIO(base64.b64decode(prediction["labels"])))
            labels = np.asarray(labels).reshape(image.shape).astype(np.uint32)
            nuclei = [_nucleus(record) for record in prediction["nuclei"]]
        except (KeyError, IndexError, TypeError, ValueError, binascii.Error) as error:
            raise InputError(
                f"{self.url} answered no nuclei ({type(error).__name__}); does it serve nuclei3d?"
            ) from None
        if progress is not None:
            progress(1.0)
        scores = np.zeros(1 + max((nucleus.label for nucleus in nuclei), default=0), np.float32)
        for nucleus in nuclei:
            scores[nucleus.label] = nucleus.score
        return RemoteSegmentation(
            labels=labels,
            scores=scores,
            seconds=prediction.get("seconds", {}),
            _measure=lambda: nuclei,
            warnings=tuple(map(str, prediction.get("warnings", ()))),
            parameters=prediction.get("parameters", {}),
            model=prediction.get("model", {}),
        )

    def served_model(self) -> object:
        """Ask which model answers (name, version, digests); None if it is not said, or not at once."""
        import requests

        try:
            address = f"{self.url.rstrip('/')}/version"
            answer = requests.get(address, headers=self._headers(), timeout=_CONNECT_S).json()
        except (requests.exceptions.RequestException, ValueError):
            return None
        return answer.get("model") if isinstance(answer, dict) else None

    def _headers(self) -> dict[str, str]:
        token = self.token or os.environ.get(TOKEN_VARIABLE)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _post(self, body: bytes) -> bytes:
        import requests

        headers = {"Content-Type": "application/json", **self._headers()}
        address = f"{self.url.rstrip('/')}/invocations"
        end = time.monotonic() + self.patience_s
        pause = 1.0
        said = False
        while True:
            try:
                response = requests.post(
                    address, data=body, headers=headers, timeout=(_CONNECT_S, self.timeout_s)
                )
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
                raise InputError(
                    f"{self.url} is no address of a service; expected http://host:port"
                ) from None
            except requests.exceptions.ReadTimeout:
                raise InputError(f"{self.url} gave no answer within {self.timeout_s:g} s") from None
            except requests.exceptions.RequestException as error:
                reason, wait = f"does not answer ({type(error).__name__})", pause
            else:
                if response.status_code == 200:
                    return response.content
                if response.status_code not in _AGAIN:
                    raise InputError(
                        f"{self.url} refused the request ({response.status_code}): {_message(response.text)}"
                    )
                reason = f"is busy ({response.status_code})"
                wait = _retry_after(response.headers.get("Retry-After"), pause)
            if time.monotonic() + wait > end:
                raise InputError(f"{self.url} {reason}; start the service or try again later")
            if not said:
                say(f"{self.url} {reason}; trying again for up to {self.patience_s:g} s")
                said = True
            time.sleep(wait)
            pause = min(2 * pause, 30.0)


def _nucleus(record: Mapping[str, Any]) -> Nucleus:
    from nuclei3d.segmentation.masks import Nucleus

    known: dict[str, Any] = {name: math.nan if value is None else value for name, value in record.items()}
    return Nucleus(**known)


def is_service(model: str) -> bool:
    """Tell whether ``--model`` names a service rather than a file or a registered model."""
    return model.startswith(("http://", "https://"))


def _request_body(image: NDArray[Any], voxel_size: VoxelSize, predict: PredictParams) -> bytes:
    import tifffile

    from nuclei3d.images.tiff import storable

    file = io.BytesIO()
    image = storable(image)
    # An axis of length 3 or 4 could be taken for colours: the type of the pixels is said.
    big = image.nbytes > 2**31
    tifffile.imwrite(file, image, photometric="minisblack", ome=True, metadata={"axes": "ZYX"}, bigtiff=big)
    params = {
        name: value
        for name, value in predict.model_dump(mode="json").items()
        if value is not None and name in RequestParams.model_fields
    }
    params["voxel_size_um"] = list(voxel_size.zyx)
    head = b'{"params":' + json.dumps(params).encode() + b',"dataframe_records":[{"volume":"'
    return head + base64.b64encode(file.getbuffer()) + b'"}]}'


def _retry_after(header: str | None, pause: float) -> float:
    try:
        return max(0.1, min(60.0, float(header))) if header is not None else pause
    except ValueError:
        return pause


def _message(text: str) -> str:
    """Take the sentence out of an answer in the form of MLflow's errors."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    # MLflow's own server puts the whole data frame before the sentence.
    return " ".join(text.rpartition("Error: ")[2].split())[:300]
