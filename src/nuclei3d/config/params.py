"""All parameters of the project as one validated object."""

from typing import Annotated

from pydantic import Field

from nuclei3d.config.calibrate import CalibrateParams
from nuclei3d.config.data import DataParams
from nuclei3d.config.evaluate import EvaluateParams
from nuclei3d.config.normalization import NormalizationParams
from nuclei3d.config.predict import PredictParams
from nuclei3d.config.prepare import PrepareParams
from nuclei3d.config.search import SearchParams
from nuclei3d.config.section import Section
from nuclei3d.config.serve import ServeParams
from nuclei3d.config.simulate import SimulateParams
from nuclei3d.config.tracking import TrackingParams
from nuclei3d.config.train import TrainParams


class Params(Section):
    """Everything in params.yaml; each field is one section."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataParams = DataParams()
    simulate: SimulateParams = SimulateParams()
    normalization: NormalizationParams = NormalizationParams()
    prepare: PrepareParams = PrepareParams()
    train: TrainParams = TrainParams()
    calibrate: CalibrateParams = CalibrateParams()
    predict: PredictParams = PredictParams()
    evaluate: EvaluateParams = EvaluateParams()
    search: SearchParams = SearchParams()
    tracking: TrackingParams = TrackingParams()
    serve: ServeParams = ServeParams()
