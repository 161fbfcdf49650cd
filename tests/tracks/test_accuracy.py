"""Scores of tracks agree with those of an independent program, and say what went wrong."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nuclei3d.stages.track_files import read_track_masks, read_tracks, track_masks
from nuclei3d.tracks.accuracy import FrameMatch, TrackScores, match_frame, score_tracks
from nuclei3d.tracks.nuclei import Nuclei, Tracks, trace_lineages

Film = list[NDArray[np.uint16]]


def write(folder: Path, prefix: str, film: Film, table: list[tuple[int, int, int, int]]) -> Path:
    folder.mkdir()
    for time, labels in enumerate(film):
        name = f"{'man_track' if prefix == 'man' else 'mask'}{time:03d}.tif"
        tifffile.imwrite(folder / name, labels, photometric="minisblack")
    path = folder / f"{prefix}_track.txt"
    path.write_text("".join(f"{a} {b} {c} {d}\n" for a, b, c, d in table))
    return path


def blocks(*places: tuple[int, int]) -> NDArray[np.uint16]:
    """Cubes: (label, place along x)."""
    labels = np.zeros((4, 6, 60), np.uint16)
    for label, x in places:
        labels[1:3, 1:5, x : x + 5] = label
    return labels


TRUE_FILM = [
    blocks((1, 0), (2, 20), (3, 40)),
    blocks((1, 1), (2, 21), (3, 41)),
    blocks((1, 2), (4, 17), (5, 25), (3, 42)),
    blocks((1, 3), (4, 15), (5, 27), (3, 43)),
]
TRUE_TABLE = [(1, 0, 3, 0), (2, 0, 1, 0), (3, 0, 3, 0), (4, 2, 3, 2), (5, 2, 3, 2)]
#: Nucleus 1 is missed once, the division one frame late, 3 changes its number, one nucleus is made up.
FOUND_FILM = [
    blocks((1, 0), (2, 20), (3, 40)),
    blocks((2, 21), (3, 41), (9, 50)),
    blocks((6, 2), (2, 17), (8, 25), (3, 42)),
    blocks((6, 3), (4, 15), (5, 27), (7, 43)),
]
FOUND_TABLE = [
    *[(1, 0, 0, 0), (2, 0, 2, 0), (3, 0, 2, 0), (4, 3, 3, 2), (5, 3, 3, 2)],
    *[(6, 2, 3, 1), (7, 3, 3, 0), (8, 2, 2, 0), (9, 1, 1, 0)],
]


def scores(true: Path, found: Path) -> TrackScores:
    tracks = [read_tracks(path) for path in (true, found)]
    films = [
        read_track_masks(track_masks(path), own) for path, own in zip((true, found), tracks, strict=True)
    ]
    return score_tracks(tracks[0], tracks[1], (match_frame(a, b) for a, b in zip(*films, strict=True)))


def test_the_scores_of_the_challenge_are_those_of_py_ctcmetrics(tmp_path: Path) -> None:
    from ctc_metrics import evaluate_sequence

    true = write(tmp_path / "01_GT", "man", TRUE_FILM, TRUE_TABLE)
    found = write(tmp_path / "01_RES", "res", FOUND_FILM, FOUND_TABLE)
    ours = scores(true, found)
    (tmp_path / "gt" / "TRA").mkdir(parents=True)
    for path in true.parent.iterdir():
        (tmp_path / "gt" / "TRA" / path.name).write_bytes(path.read_bytes())
    theirs = evaluate_sequence(str(found.parent), str(tmp_path / "gt"), ["TRA", "DET", "LNK"])
    for name in ("TRA", "DET", "LNK"):
        assert getattr(ours, name.lower()) == pytest.approx(theirs[name], abs=1e-9), name
        assert 0 < theirs[name] < 1
    assert (ours.n_true, ours.n_pred, ours.n_divisions, ours.n_divisions_pred) == (14, 14, 1, 1)


def test_a_late_division_counts_only_with_tolerance(tmp_path: Path) -> None:
    table = [(1, 0, 3, 0), (2, 0, 2, 0), (3, 0, 3, 0), (4, 3, 3, 2), (5, 3, 3, 2), (8, 2, 2, 0)]
    film = [
        np.where(labels == 4, 2, np.where(labels == 5, 8, labels)).astype(np.uint16)
        for labels in TRUE_FILM[:3]
    ]
    true = write(tmp_path / "true", "man", TRUE_FILM, TRUE_TABLE)
    late = scores(true, write(tmp_path / "late", "res", [*film, TRUE_FILM[3]], table))
    assert (late.division_f1, late.det) == (0, 1)
    exact = scores(true, write(tmp_path / "exact", "res", TRUE_FILM, TRUE_TABLE))
    assert (exact.tra, exact.lnk, exact.division_f1, exact.division_f1_tolerant) == (1, 1, 1, 1)


def test_what_learning_counts_is_what_traccuracy_counts(tmp_path: Path) -> None:
    from nuclei3d.config.sections import TracksParams
    from nuclei3d.images.voxel_size import VoxelSize
    from nuclei3d.tracks.learning import KnownFilm
    from nuclei3d.tracks.linking import link_nuclei
    from nuclei3d.tracks.nuclei import measure_frame

    true = read_tracks(write(tmp_path / "true", "man", TRUE_FILM, TRUE_TABLE))
    size = VoxelSize(1.0, 1.0, 1.0)
    for film in (TRUE_FILM, FOUND_FILM):
        nuclei = Nuclei.joined(measure_frame(labels, size, time) for time, labels in enumerate(film))
        matches = [match_frame(a, b) for a, b in zip(TRUE_FILM, film, strict=True)]
        for limit in (0.01, 20.0):
            params = TracksParams(division_limit=limit, max_step=0.7, division_distance=3.0)
            expected = score_tracks(true, link_nuclei(nuclei, params), matches)
            counts = KnownFilm.of(nuclei, true, matches).count(params)
            assert counts.division_f1 == expected.division_f1


def test_no_tracks_at_all_score_zero(tmp_path: Path) -> None:
    true = write(tmp_path / "true", "man", TRUE_FILM, TRUE_TABLE)
    nothing = scores(true, write(tmp_path / "none", "res", [blocks()] * 4, []))
    assert (nothing.tra, nothing.det, nothing.lnk) == (0, 0, 0)


def test_one_mask_over_two_nuclei_stands_for_both_and_divides_for_one() -> None:
    labels = blocks((1, 10), (2, 15))
    found = match_frame(labels, np.where(labels > 0, 7, 0))
    assert found.majority == [(1, 7), (2, 7)]
    assert len(found.single) == 1


def test_a_mask_of_less_than_half_a_nucleus_is_a_miss_but_may_divide() -> None:
    labels = blocks((3, 10))
    small = np.where(np.arange(60) < 12, labels, 0)
    found = match_frame(labels, small)
    assert (found.majority, found.single) == ([], [(3, 3)])


def test_a_division_between_two_false_ones_is_right_once_with_tolerance() -> None:
    def tracks(labels: list[int], predecessor: list[int], frames: list[int]) -> Tracks:
        rows = Nuclei.unmeasured(np.array(frames), np.array(labels))
        return Tracks(rows, np.array(predecessor))

    true = tracks([1, 1, 1, 2, 1, 2], [-1, 0, 1, 1, 2, 3], [0, 1, 2, 2, 3, 3])
    found = tracks([1, 1, 2, 1, 2, 1, 2], [-1, 0, 0, 1, 2, 3, 3], [0, 1, 1, 2, 2, 3, 3])
    same = [[(1, 1)], [(1, 1)], [(1, 1), (2, 2)], [(1, 1), (2, 2)]]
    score = score_tracks(true, found, [FrameMatch(pairs, pairs) for pairs in same])
    assert score.division_f1 == 0
    # one of one true, one of two found
    assert score.division_f1_tolerant == pytest.approx(2 / 3)


def test_lineages_become_tracks() -> None:
    tracks: Tracks = trace_lineages(
        [
            [(0,), (1,)],
            [(1,), (0, 0), (0, 1)],
            [(0, 0)],  # two are not seen
            [(0, 0), (1, 0, 0), (0, 1)],  # one divided twice meanwhile, and a daughter is seen
        ]
    )
    assert tracks.predecessor.tolist() == [-1, -1, 1, 0, 0, 3, 5, 2, 4]
